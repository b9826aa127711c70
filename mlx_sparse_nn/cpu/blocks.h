// What the kernels of blocks share: the types and sizes that follow from ELEMENT and BLOCK.

#pragma once

#include <algorithm>

#include "kernels.h"
#include "vectors.h"

namespace mlx_sparse_nn {
namespace {

using E = ELEMENT;
using A = accumulator<E>;
constexpr bool WIDENED = sizeof(E) != sizeof(A);

constexpr int W = LANES<A>;
constexpr int TALL = REGISTERS == 32 ? 8 : 4;  // rows of A in a tile of registers, 2 vectors wide

INLINE int64_t side(const Csr& a) { return BLOCK ? BLOCK : a.B; }
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Rows of blocks of block-row r, or columns of block-column r, that lie in a matrix of n of them.
INLINE int64_t inside(int64_t n, int64_t r, int64_t B) { return std::min(B, n - r * B); }

// How many block-columns come before the first that is `last`.
INLINE int64_t count_before(const int32_t* columns, int64_t n, int64_t last) {
  constexpr int L = LANES<int32_t>;
  int64_t e = 0;
  for (; e + L <= n; e += L) {
    const auto are_last =
        *reinterpret_cast<const loose_vec<int32_t, L>*>(columns + e) == int32_t(last);
    if (total<int32_t, L>(are_last)) break;
  }
  while (e < n && columns[e] != last) ++e;
  return e;
}

// Vectors that lie one after the other.
template <int V, int COUNT>
INLINE void load_all(const A* from, vec<A, V> (&to)[COUNT]) {
#pragma GCC unroll 32
  for (int i = 0; i < COUNT; ++i) to[i] = load<V>(from + i * V);
}
template <int V, int COUNT>
INLINE void store_all(A* to, const vec<A, V> (&from)[COUNT]) {
#pragma GCC unroll 32
  for (int i = 0; i < COUNT; ++i) store<V>(to + i * V, from[i]);
}

// Neighbouring blocks of one block-row, which are multiplied by all rows of x before the next.
struct Group {
  int n;
  bool first;  // of its block-row: sums begin here
  int64_t B;
  const int32_t* column;  // block-columns
  const int32_t* place;   // where blocks lie in data; null: one after the other
  const int32_t* next;    // the same of the next group, which is fetched meanwhile
  const E* data;
  const A* wide;  // blocks one after the other, widened

  INLINE int64_t side() const { return BLOCK ? BLOCK : B; }
  INLINE int64_t size() const { return side() * side(); }
  INLINE const E* stored(int e) const { return data + (place ? place[e] : int64_t(e)) * size(); }
  INLINE const E* ahead(int e) const { return data + (place ? next[e] : int64_t(n + e)) * size(); }
  INLINE const A* values(int e) const {
    return WIDENED ? wide + e * size() : reinterpret_cast<const A*>(stored(e));
  }
};

}  // namespace
}  // namespace mlx_sparse_nn
