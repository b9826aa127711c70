// Loops over the index arrays of patterns, on the host, as in ../core/index.py: the same results.
// Letters as in ../metal/README.md. Indices are trusted but where a function says that it checks.

#include <string.h>
#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "vectors.h"

namespace mlx_sparse_nn {
namespace {

// What is checked before a loop may end early: a constant, so that loops are vectorised.
constexpr int64_t STRIP = 1024;
// Keys for which the places where their next entries go stay in the first cache.
constexpr int64_t FEW_KEYS = 8192;
// Parts into which the entries of more keys are moved first: with more, the lines that are written
// in turn leave the cache. Gaps between them, in entries: else they might lie at one address modulo
// the size of the cache.
constexpr int64_t MAX_PARTS = 512;
constexpr int64_t GAP = 13;

// Whether wrong(i) is 0 for each i < n.
template <class F>
bool none(int64_t n, const F& wrong) {
  int64_t i = 0;
  for (; i + STRIP <= n; i += STRIP) {
    int found = 0;
    for (int64_t j = 0; j < STRIP; ++j) found |= wrong(i + j);
    if (found) return false;
  }
  for (; i < n; ++i) {
    if (wrong(i)) return false;
  }
  return true;
}

// Copies int32 or int64, whole vectors at a time, and checks what it has read: nobody can change it
// in between. Whether all are in [0, limit), which is at most 2^31.
template <class From>
bool copy_and_check(const From* from, int64_t n, int64_t limit, int32_t* to) {
  using Unsigned = std::make_unsigned_t<From>;
  constexpr int L = REGISTER_BYTES / sizeof(From);
  const Unsigned bound = limit;
  vec<From, L> wrong = {};
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const auto values = *reinterpret_cast<const loose_vec<From, L>*>(from + i);
    wrong |= bit_cast<vec<Unsigned, L>>(values) >= bound;
    *reinterpret_cast<loose_vec<int32_t, L>*>(to + i) =
        __builtin_convertvector(values, vec<int32_t, L>);
  }
  From any = 0;
  for (int l = 0; l < L; ++l) any |= wrong[l];
  for (; i < n; ++i) {
    const From value = from[i];
    any |= static_cast<Unsigned>(value) >= bound;
    to[i] = static_cast<int32_t>(value);
  }
  return any == 0;
}

// Entries of a CSR by their column; each carries its row.
struct Columns {
  const int32_t* indptr;
  const int32_t* indices;
  int64_t R;

  template <class F>
  void each(const F& f) const {
    for (int32_t r = 0; r < R; ++r) {
      for (int32_t i = indptr[r]; i < indptr[r + 1]; ++i) f(indices[i], r, i);
    }
  }
};

// Entries by the first of two coordinates; each carries the second.
struct Coordinates {
  const int32_t* first;
  const int32_t* second;
  int64_t n;

  template <class F>
  void each(const F& f) const {
    for (int64_t i = 0; i < n; ++i) f(first[i], second[i], i);
  }
};

// Entries sorted by their keys, those of one key as they came.
struct Sorted {
  int32_t* starts;  // (n_keys + 1)
  int32_t* carried;
  int32_t* places;
  int64_t n_keys;

  // The same by what they carry.
  template <class F>
  void each(const F& f) const {
    for (int32_t key = 0; key < n_keys; ++key) {
      for (int32_t i = starts[key]; i < starts[key + 1]; ++i) f(carried[i], key, places[i]);
    }
  }
};

// Keys of a part, as a power of two.
int part_shift(int64_t n_keys) {
  int shift = 0;
  while ((n_keys - 1) >> shift >= MAX_PARTS) ++shift;
  return shift;
}

// Whether it pays to move entries in two steps, and they can be packed for it: keys carry numbers
// in [0, limit).
bool moves_by_parts(int64_t n, int64_t n_keys, int64_t limit) {
  return n > FEW_KEYS && n_keys > FEW_KEYS && limit <= int64_t(1) << (32 - part_shift(n_keys));
}

// Sorts entries by their keys in [0, out.n_keys): by parts if there is room, for room_for(n)
// numbers. `out` may then lie where the entries are.
template <class Entries>
void sort(const Entries& entries, int64_t n, Sorted out, uint64_t* room) {
  int32_t* next = out.starts + 1;  // where the next entry of a key goes: in the end, its end
  memset(out.starts, 0, (out.n_keys + 1) * sizeof *next);
  entries.each([=](int32_t key, int32_t, int32_t) { ++next[key]; });
  int32_t begin = 0;
  for (int64_t key = 0; key < out.n_keys; ++key) {
    const int32_t count = next[key];
    next[key] = begin;
    begin += count;
  }
  const auto put = [=](int64_t key, int32_t carried, int32_t place) {
    const int32_t to = next[key]++;
    out.carried[to] = carried;
    out.places[to] = place;
  };
  if (!room) return entries.each(put);
  // Entries go first to the part of their key, packed, and from there to their places: what is
  // written at a time is then in the cache.
  const int shift = part_shift(out.n_keys);
  const int64_t n_parts = ((out.n_keys - 1) >> shift) + 1;
  const uint32_t mask = (uint32_t(1) << shift) - 1;
  int64_t ends[MAX_PARTS];
  for (int64_t part = 0; part < n_parts; ++part) ends[part] = next[part << shift] + part * GAP;
  entries.each([=, &ends](int32_t key, int32_t carried, int32_t place) {
    const uint32_t packed = uint32_t(carried) << shift | (key & mask);
    room[ends[key >> shift]++] = uint64_t(place) << 32 | packed;
  });
  int64_t i = 0;
  for (int64_t part = 0; part < n_parts; ++part) {
    const uint64_t* entry = room + part * GAP;
    for (const int64_t end = ends[part] - part * GAP; i < end; ++i) {
      __builtin_prefetch(out.carried + i + n / n_parts, 1);  // of the next part
      __builtin_prefetch(out.places + i + n / n_parts, 1);
      const uint32_t packed = entry[i];
      put((part << shift) + (packed & mask), packed >> shift, entry[i] >> 32);
    }
  }
}

// Columns that the words of a bitmap stand for, and words that those of its index stand for.
constexpr int WORD = 6;
// Entries of a from that whose row of b is read to the one whose row is fetched.
constexpr int AHEAD = 16;
// Entries of b from which on its rows are fetched: with fewer, they are in the second cache.
constexpr int64_t MANY = 100000;

// The columns of a row as bits, by words of 64; and a bit for each of these words that is not 0.
struct RowOfBits {
  uint64_t* bits;
  uint64_t* touched;
  int32_t first = INT32_MAX;  // of `touched`, what is not 0
  int32_t last = -1;
  int32_t word = 0;      // of columns that are gathered, since neighbours often share one
  uint64_t columns = 0;  // bits of them

  INLINE void add(int32_t column) {
    if (column >> WORD != word) {
      if (columns) put(word, columns);
      word = column >> WORD;
      columns = 0;
    }
    columns |= uint64_t(1) << (column & 63);
  }

  INLINE void put(int32_t at, uint64_t some) {
    const int32_t t = at >> WORD;
    bits[at] |= some;
    touched[t] |= uint64_t(1) << (at & 63);
    first = std::min(first, t);
    last = std::max(last, t);
  }

  // Writes the columns in order, and clears the row. Returns how many there are.
  INLINE int32_t take(int32_t* out) {
    const int32_t* begin = out;
    if (columns) put(word, columns);
    for (int32_t t = first; t <= last; ++t) {
      for (uint64_t words = touched[t]; words; words &= words - 1) {
        const int32_t at = t << WORD | __builtin_ctzll(words);
        for (uint64_t found = bits[at]; found; found &= found - 1) {
          *out++ = at << WORD | __builtin_ctzll(found);
        }
        bits[at] = 0;
      }
      touched[t] = 0;
    }
    return out - begin;
  }
};

// Neighbouring columns of each row of a CSR as words, and the bits in them.
void pack_columns(const int32_t* indptr, const int32_t* indices, int64_t R, int32_t* starts,
                  int32_t* words, uint64_t* columns) {
  int32_t n = 0;
  for (int64_t r = 0; r < R; ++r) {
    starts[r] = n;
    for (int32_t j = indptr[r]; j < indptr[r + 1]; ++j) {
      const int32_t word = indices[j] >> WORD;
      if (n == starts[r] || words[n - 1] != word) {
        words[n] = word;
        columns[n++] = 0;
      }
      columns[n - 1] |= uint64_t(1) << (indices[j] & 63);
    }
  }
  starts[R] = n;
}

}  // namespace

// Whether all indices lie in [0, limit).
MLX_SPARSE_EXPORT bool in_range(const int32_t* indices, int64_t n, int64_t limit) {
  const uint32_t bound = std::min<int64_t>(limit, uint32_t(1) << 31);
  return none(n, [=](int64_t i) { return static_cast<uint32_t>(indices[i]) >= bound; });
}

// Copies indices as int32; whether all are in [0, limit).
MLX_SPARSE_EXPORT bool copy_in_range(const int32_t* indices, int64_t n, int64_t limit,
                                     int32_t* out) {
  return copy_and_check(indices, n, limit, out);
}
MLX_SPARSE_EXPORT bool narrow(const int64_t* indices, int64_t n, int64_t limit, int32_t* out) {
  return copy_and_check(indices, n, limit, out);
}

// Whether indptr (R + 1) begins with 0, never decreases, and ends with n.
MLX_SPARSE_EXPORT bool rises(const int32_t* indptr, int64_t R, int64_t n) {
  return indptr[0] == 0 && indptr[R] == n &&
         none(R, [=](int64_t r) { return indptr[r] > indptr[r + 1]; });
}

// Whether the indices of each row ascend and none repeats.
MLX_SPARSE_EXPORT bool ascends(const int32_t* indptr, const int32_t* indices, int64_t R) {
  for (int64_t r = 0; r < R; ++r) {
    for (int64_t i = indptr[r] + 1; i < indptr[r + 1]; ++i) {
      if (indices[i] <= indices[i - 1]) return false;
    }
  }
  return true;
}

// The row of each entry.
MLX_SPARSE_EXPORT void rows_of(const int32_t* indptr, int64_t R, int32_t* rows) {
  for (int32_t r = 0; r < R; ++r) std::fill(rows + indptr[r], rows + indptr[r + 1], r);
}

// How many int64 sorting n entries takes as `room`.
MLX_SPARSE_EXPORT int64_t room_for(int64_t n) { return n + MAX_PARTS * GAP; }

// Transposes a CSR: of its columns, where each starts, the rows of its entries, and their places.
MLX_SPARSE_EXPORT void transpose(const int32_t* indptr, const int32_t* indices, int64_t R,
                                 int64_t C, int32_t* starts, int32_t* rows, int32_t* places,
                                 uint64_t* room) {
  const bool by_parts = moves_by_parts(indptr[R], C, R);
  sort(Columns{indptr, indices, R}, indptr[R], Sorted{starts, rows, places, C},
       by_parts ? room : nullptr);
}

// Sorts n entries by their row, those of one row as they come: where each row starts, the columns
// of its entries, and the places where they come from.
MLX_SPARSE_EXPORT void sort_rows(const int32_t* rows, const int32_t* columns, int64_t n, int64_t R,
                                 int64_t C, int32_t* starts, int32_t* indices, int32_t* places,
                                 uint64_t* room) {
  sort(Coordinates{rows, columns, n}, n, Sorted{starts, indices, places, R},
       moves_by_parts(n, R, C) ? room : nullptr);
}

// The same, those of one row by their column; `first` takes C + 1 numbers.
MLX_SPARSE_EXPORT void sort_coordinates(const int32_t* rows, const int32_t* columns, int64_t n,
                                        int64_t R, int64_t C, int32_t* starts, int32_t* indices,
                                        int32_t* places, uint64_t* room, int32_t* first) {
  const Coordinates entries{columns, rows, n};
  const Sorted out{starts, indices, places, R};
  if (moves_by_parts(n, R, C) && moves_by_parts(n, C, R)) {
    const Sorted by_column{first, indices, places, C};
    sort(entries, n, by_column, room);
    sort(by_column, n, out, room);
  } else {
    int32_t* half = reinterpret_cast<int32_t*>(room);
    const Sorted by_column{first, half, half + n, C};
    sort(entries, n, by_column, nullptr);
    sort(by_column, n, out, nullptr);
  }
}

// Unites two CSR patterns whose rows ascend. Of what either stores: where each row starts, the
// columns, and in `order` the entries of both, those of b numbered behind those of a; `starts` says
// where those of each place begin. Returns how many places there are.
MLX_SPARSE_EXPORT int64_t unite(const int32_t* a_indptr, const int32_t* a_indices,
                                const int32_t* b_indptr, const int32_t* b_indices, int64_t R,
                                int32_t* indptr, int32_t* indices, int32_t* order,
                                int32_t* starts) {
  const int32_t n_a = a_indptr[R];
  int32_t found = 0;
  int32_t entry = 0;
  indptr[0] = 0;
  for (int64_t r = 0; r < R; ++r) {
    int32_t i = a_indptr[r];
    int32_t j = b_indptr[r];
    while (i < a_indptr[r + 1] || j < b_indptr[r + 1]) {
      const int32_t a_col = i < a_indptr[r + 1] ? a_indices[i] : INT32_MAX;
      const int32_t b_col = j < b_indptr[r + 1] ? b_indices[j] : INT32_MAX;
      indices[found] = std::min(a_col, b_col);
      starts[found++] = entry;
      if (a_col <= b_col) order[entry++] = i++;
      if (b_col <= a_col) order[entry++] = n_a + j++;
    }
    indptr[r + 1] = found;
  }
  return found;
}

// How many pairs of entries of two CSR patterns their product takes, n those of a.
MLX_SPARSE_EXPORT int64_t n_pairs(const int32_t* a_indices, int64_t n, const int32_t* b_indptr) {
  int64_t pairs = 0;
  for (int64_t i = 0; i < n; ++i) pairs += b_indptr[a_indices[i] + 1] - b_indptr[a_indices[i]];
  return pairs;
}

// How many uint64 finding the places of a product takes as `room`: b stores n entries in K rows of
// C columns.
MLX_SPARSE_EXPORT int64_t room_for_places(int64_t K, int64_t C, int64_t n) {
  return (C >> WORD) + (C >> 2 * WORD) + 2 + n + (n + K + 2) / 2;
}

// The places of a product of two CSR patterns: where each row starts, and the columns, in order.
// Returns how many there are, at most n_pairs.
MLX_SPARSE_EXPORT int64_t multiply(const int32_t* a_indptr, const int32_t* a_indices, int64_t R,
                                   const int32_t* b_indptr, const int32_t* b_indices, int64_t K,
                                   int64_t C, int32_t* indptr, int32_t* indices, uint64_t* room) {
  const int64_t n = b_indptr[K];
  uint64_t* const touched = room + (C >> WORD) + 1;
  uint64_t* const columns = touched + (C >> 2 * WORD) + 1;
  std::fill(room, columns, 0);
  int64_t runs = 0;
  for (int64_t j = 1; j < n; ++j) runs += b_indices[j] >> WORD != b_indices[j - 1] >> WORD;
  const bool packs = 2 * (runs + K) < n;
  int32_t* words = reinterpret_cast<int32_t*>(columns + n);
  int32_t* starts = words + n;
  if (packs) pack_columns(b_indptr, b_indices, K, starts, words, columns);
  int32_t found = 0;
  indptr[0] = 0;
  for (int64_t r = 0; r < R; ++r) {
    RowOfBits row{room, touched};
    for (int32_t i = a_indptr[r]; i < a_indptr[r + 1]; ++i) {
      const int32_t k = a_indices[i];
      if (packs) {
        for (int32_t j = starts[k]; j < starts[k + 1]; ++j) row.put(words[j], columns[j]);
        continue;
      }
      if (n > MANY && i + AHEAD < a_indptr[R]) __builtin_prefetch(b_indptr + a_indices[i + AHEAD]);
      if (n > MANY && i + AHEAD / 2 < a_indptr[R]) {
        __builtin_prefetch(b_indices + b_indptr[a_indices[i + AHEAD / 2]]);
      }
      for (int32_t j = b_indptr[k]; j < b_indptr[k + 1]; ++j) row.add(b_indices[j]);
    }
    found += row.take(indices + found);
    indptr[r + 1] = found;
  }
  return found;
}

// The pairs of entries of two CSR patterns whose products add up to the places of their product, c:
// by place, those of one place as rows of a have them; `starts` says where those of each place
// begin, and the end of all. `place_of` takes C numbers.
MLX_SPARSE_EXPORT void pairs(const int32_t* a_indptr, const int32_t* a_indices, int64_t R,
                             const int32_t* b_indptr, const int32_t* b_indices,
                             const int32_t* c_indptr, const int32_t* c_indices, int32_t* starts,
                             int32_t* of_a, int32_t* of_b, int32_t* place_of) {
  int32_t* next = starts + 1;  // where the next pair of a place goes: in the end, its end
  int32_t begin = 0;
  starts[0] = 0;
  for (int64_t r = 0; r < R; ++r) {
    const auto each = [=](const auto& f) {
      for (int32_t i = a_indptr[r]; i < a_indptr[r + 1]; ++i) {
        const int32_t k = a_indices[i];
        for (int32_t j = b_indptr[k]; j < b_indptr[k + 1]; ++j) f(place_of[b_indices[j]], i, j);
      }
    };
    for (int32_t place = c_indptr[r]; place < c_indptr[r + 1]; ++place) {
      place_of[c_indices[place]] = place;
      next[place] = 0;
    }
    each([=](int32_t place, int32_t, int32_t) { ++next[place]; });
    for (int32_t place = c_indptr[r]; place < c_indptr[r + 1]; ++place) {
      const int32_t count = next[place];
      next[place] = begin;
      begin += count;
    }
    each([=](int32_t place, int32_t i, int32_t j) {
      const int32_t to = next[place]++;
      of_a[to] = i;
      of_b[to] = j;
    });
  }
}

}  // namespace mlx_sparse_nn
