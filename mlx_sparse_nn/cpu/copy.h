// Copies between matrices with any steps, of any type, and contiguous rows of accumulators.

#pragma once

#include <algorithm>

#include "vectors.h"

namespace mlx_sparse_nn {

// to[i] = from[i] for i < n, widened or rounded.
template <class From, class To>
INLINE void copy_run(const From* from, To* to, int64_t n) {
  constexpr int W = sizeof(From) == 8 ? LANES<double> : LANES<float>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store<W>(to + i, load<W>(from + i));
  if constexpr (W > 8) {
    for (; i + 8 <= n; i += 8) store<8>(to + i, load<8>(from + i));
  }
  if constexpr (W > 4) {
    for (; i + 4 <= n; i += 4) store<4>(to + i, load<4>(from + i));
  }
  for (; i < n; ++i) put(to + i, widen(from[i]));
}

// to[i, k] = from[i, k] for i < rows and k < cols; zero for cols <= k < padded.
template <class E, class A = accumulator<E>>
void gather(const E* from, int64_t row_step, int64_t col_step, int64_t rows, int64_t cols, A* to,
            int64_t to_step, int64_t padded) {
  constexpr int T = LANES<A>;
  for (int64_t i = 0; i < rows && cols < padded; ++i) {
    for (int64_t k = cols; k < padded; ++k) to[i * to_step + k] = 0;
  }
  if (col_step == 1) {
    for (int64_t i = 0; i < rows; ++i) copy_run(from + i * row_step, to + i * to_step, cols);
    return;
  }
  const int64_t whole = row_step == 1 ? rows / T * T : 0;
  for (int64_t k0 = 0; k0 < padded; k0 += T) {
    for (int64_t i = 0; i < whole && k0 + T <= padded; i += T) {
      vec<A, T> tile[T];
#pragma GCC unroll 16
      for (int k = 0; k < T; ++k) {
        tile[k] = k0 + k < cols ? load<T>(from + i + (k0 + k) * col_step) : vec<A, T>{};
      }
      transpose<A, T>(tile);
#pragma GCC unroll 16
      for (int k = 0; k < T; ++k) store<T>(to + (i + k) * to_step + k0, tile[k]);
    }
    const int64_t end = std::min(cols, k0 + T);
    for (int64_t i = k0 + T <= padded ? whole : 0; i < rows; ++i) {
      for (int64_t k = k0; k < end; ++k) {
        to[i * to_step + k] = widen(from[i * row_step + k * col_step]);
      }
    }
  }
}

// to[i, k] = from[i, k] for i < rows and k < cols.
template <class E, class A = accumulator<E>>
void scatter(const A* from, int64_t from_step, int64_t rows, int64_t cols, E* to, int64_t row_step,
             int64_t col_step) {
  constexpr int T = LANES<A>;
  if (col_step == 1) {
    for (int64_t i = 0; i < rows; ++i) copy_run(from + i * from_step, to + i * row_step, cols);
    return;
  }
  const int64_t whole = row_step == 1 ? rows / T * T : 0;
  for (int64_t k0 = 0; k0 < cols; k0 += T) {
    const int64_t end = std::min(cols, k0 + T);
    for (int64_t i = 0; i < whole && k0 + T <= cols; i += T) {
      vec<A, T> tile[T];
#pragma GCC unroll 16
      for (int k = 0; k < T; ++k) tile[k] = load<T>(from + (i + k) * from_step + k0);
      transpose<A, T>(tile);
#pragma GCC unroll 16
      for (int k = 0; k < T; ++k) store<T>(to + i + (k0 + k) * col_step, tile[k]);
    }
    for (int64_t i = k0 + T <= cols ? whole : 0; i < rows; ++i) {
      for (int64_t k = k0; k < end; ++k) {
        put(to + i * row_step + k * col_step, from[i * from_step + k]);
      }
    }
  }
}

}  // namespace mlx_sparse_nn
