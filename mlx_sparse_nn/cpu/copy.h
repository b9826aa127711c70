// Copies between matrices with any steps, of any type, and contiguous rows of accumulators.

#pragma once

#include <stdint.h>

#include <algorithm>

#include "vectors.h"

namespace mlx_sparse_nn {

// to[i] = from[i] for i < n, widened or rounded: N at a time while there are as many.
template <int N, class From, class To>
INLINE void copy_run(const From* from, To* to, int64_t n) {
  int64_t i = 0;
  for (; i + N <= n; i += N) store<N>(to + i, load<N>(from + i));
  if constexpr (N > 1) copy_run<(N > 4 ? N / 2 : 1)>(from + i, to + i, n - i);
}

// Tiles of T along n >= T elements at p. The second begins where a vector of T does not lie across
// cache lines, the last one ends at n: they write again what others wrote.
template <int T, class E>
INLINE int64_t next_tile(int64_t i, int64_t n, const E* p) {
  if (i + T >= n) return n;
  const int64_t to_boundary = T - reinterpret_cast<uintptr_t>(p) / sizeof(E) % T;
  return std::min(i ? i + T : to_boundary, n - T);
}

// to[i, k] = from[k, i] for i < rows and k < cols, of which `valid` exist and the others are zero.
// T x T at a time if there are as many, or 4 x 4, or one by one.
template <int T, class From, class To>
void copy_transposed(const From* from, int64_t from_step, int64_t rows, int64_t cols, int64_t valid,
                     To* to, int64_t to_step) {
  if constexpr (T == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < cols; ++k) {
        put(to + i * to_step + k, k < valid ? widen(from[k * from_step + i]) : 0);
      }
    }
  } else if (rows < T || cols < T) {
    copy_transposed<(T > 4 ? 4 : 1)>(from, from_step, rows, cols, valid, to, to_step);
  } else {
    for (int64_t k0 = 0; k0 < cols; k0 = next_tile<T>(k0, cols, to)) {
      for (int64_t i = 0; i < rows; i = next_tile<T>(i, rows, from)) {
        using Lanes = decltype(load<T>(from));
        Lanes tile[T];
#pragma GCC unroll 16
        for (int k = 0; k < T; ++k) {
          tile[k] = k0 + k < valid ? load<T>(from + (k0 + k) * from_step + i) : Lanes{};
        }
        transpose<accumulator<From>, T>(tile);
#pragma GCC unroll 16
        for (int k = 0; k < T; ++k) store<T>(to + (i + k) * to_step + k0, tile[k]);
      }
    }
  }
}

// to[i, k] = from[i, k] for i < rows and k < cols; zero for cols <= k < padded.
template <class E, class A = accumulator<E>>
void gather(const E* from, int64_t row_step, int64_t col_step, int64_t rows, int64_t cols, A* to,
            int64_t to_step, int64_t padded) {
  constexpr int T = LANES<A>;
  if (row_step == 1 && col_step != 1) {
    return copy_transposed<T>(from, col_step, rows, padded, cols, to, to_step);
  }
  for (int64_t i = 0; i < rows; ++i) {
    if (col_step == 1) {
      copy_run<T>(from + i * row_step, to + i * to_step, cols);
    } else {
      for (int64_t k = 0; k < cols; ++k) {
        to[i * to_step + k] = widen(from[i * row_step + k * col_step]);
      }
    }
    for (int64_t k = cols; k < padded; ++k) to[i * to_step + k] = 0;
  }
}

// to[i, k] = from[i, k] for i < rows and k < cols. One step of `to` is 1.
template <class E, class A = accumulator<E>>
void scatter(const A* from, int64_t from_step, int64_t rows, int64_t cols, E* to, int64_t row_step,
             int64_t col_step) {
  constexpr int T = LANES<A>;
  if (col_step == 1) {
    for (int64_t i = 0; i < rows; ++i) copy_run<T>(from + i * from_step, to + i * row_step, cols);
  } else {
    copy_transposed<T>(from, from_step, cols, rows, rows, to, col_step);
  }
}

}  // namespace mlx_sparse_nn
