// Blocks times few rows of x, bound by reading the stored values: each vector is one of stored
// values, read once. It is a part of a row of a block, or rows of a small block. For A, lanes of a
// sum are added at the end; for the transpose, they are outputs.
//
// There are kernels of some numbers of rows, N; a row of x that is missing is some other. x is
// packed to (C, N, x_step): where a block has fewer columns than a vector has lanes, its x is
// repeated. Sums of a group are kept for the next one.

#pragma once

#include "blocks.h"

namespace mlx_sparse_nn {
namespace {

constexpr int SMALL = BLOCK && BLOCK * BLOCK < W ? BLOCK * BLOCK : W;
constexpr int V = BLOCK ? SMALL : std::min(4, W);    // lanes
constexpr int RUN = BLOCK && BLOCK < V ? BLOCK : V;  // lanes that lie in one row of a block
constexpr int IN_REGISTERS = REGISTERS / 2;          // vectors of sums

// One row of x takes values as they lie, and as fast as they come: they are fetched this far ahead,
// from memory to the second cache and from there to the first.
constexpr int64_t FAR = (1 << 15) / sizeof(E);
constexpr int64_t NEAR = (1 << 12) / sizeof(E);

// Vectors of a row of a block; the sums of a block-row, one for each row, or rows; x of a block.
INLINE constexpr int64_t row_vectors(int64_t B) { return B > V ? B / V : 1; }
INLINE constexpr int64_t row_sums(int64_t B) { return B * B / (V * row_vectors(B)); }
INLINE constexpr int64_t x_step(int64_t B) { return B > V ? B : V; }

constexpr int at_most(int n, int bound) { return n > bound && n > 1 ? at_most(n / 2, bound) : n; }

// Of the transpose, sums of the same outputs that are kept apart, since an addition takes 4 cycles.
constexpr int K = row_vectors(BLOCK), SUMS = BLOCK ? row_sums(BLOCK) : 4;
constexpr int CHAINS = K >= 4 ? 1 : std::min(4 / K, SUMS);

// Vectors of sums of a block-row and one row of x.
INLINE int64_t few_sums(int64_t B) { return std::max(row_sums(B), CHAINS * row_vectors(B)); }

// Rows that these kernels compute faster than panels do, at most.
INLINE int64_t most_few(int64_t B, bool transposed) {
  if (BLOCK == 0) return B % 4 == 0 ? 1 : 0;
  if (BLOCK < W) return 4;
  return transposed || WIDENED ? 8 : 6;
}
constexpr int MOST_FEW = BLOCK == 0 ? 1 : BLOCK < W ? 4 : 8;

// The rows of the kernel for `few`.
INLINE int64_t few_width(int64_t few) { return few < 2 ? few : round_up(few, 2); }

// sums (row_sums, N, V)
template <int N>
void multiply_few(const Group& g, const A* x, A* sums) {
  constexpr int ROWS = at_most(SUMS, IN_REGISTERS / N);
  constexpr bool STREAMS = N == 1 && BLOCK > 0 && !WIDENED;
  const int64_t B = g.side(), vectors = row_vectors(B), n_sums = row_sums(B);
  // One or two rows take wide blocks one by one, since memory likes to be read in order.
  const int at_once = vectors > 1 && N <= 2 ? 1 : g.n + 1;
  for (int e0 = 0; e0 == 0 || e0 < g.n; e0 += at_once) {
    const int e1 = std::min(g.n, e0 + at_once);
    for (int64_t i = 0; i < n_sums; i += ROWS) {
      vec<A, V> acc[ROWS * N] = {};
      if (!g.first || e0) load_all<V>(sums + i * N * V, acc);
      for (int e = e0; e < e1; ++e) {
        const E* w = g.stored(e) + i * vectors * V;
        const E* ahead = STREAMS ? w + FAR : g.ahead(e) + i * vectors * V;
        const A* xs = x + g.column[e] * (N * x_step(B));
        for (int64_t k = 0; k < vectors; ++k) {
          vec<A, V> xv[N];
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) xv[n] = load<V>(xs + n * x_step(B) + k * V);
#pragma GCC unroll 16
          for (int m = 0; m < ROWS; ++m) {
            const vec<A, V> values = load<V>(w + (m * vectors + k) * V);
            __builtin_prefetch(ahead + (m * vectors + k) * V, 0, 2);
            if (STREAMS) __builtin_prefetch(w + NEAR + (m * vectors + k) * V, 0, 3);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) acc[m * N + n] += values * xv[n];
          }
        }
      }
      store_all<V>(sums + i * N * V, acc);
    }
  }
}

// out[o, n] for o < B: the sums of lanes.
template <int N>
void finish_few(int64_t B, const A* sums, A* out, int64_t n_step) {
  constexpr int PARTS = V / RUN;
  for (int64_t o = 0; o < B; o += RUN) {
    for (int n = 0; n < N; ++n) {
      vec<A, RUN> rows[RUN];
#pragma GCC unroll 16
      for (int i = 0; i < RUN; ++i) {
        rows[i] = load<RUN>(sums + ((o + i) / PARTS * N + n) * V + (o + i) % PARTS * RUN);
      }
      store<RUN>(out + n * n_step + o, totals<A, RUN>(rows));
    }
  }
}

// What lanes of vector F of a block are multiplied by: lane l by x[F V / RUN + l / RUN].
template <int F, int... LANE>
INLINE vec<A, V> spread(vec<A, V> x, std::integer_sequence<int, LANE...>) {
  return shuffle<A, V, (F * (V / RUN) + LANE / RUN)...>(x);
}

// A small block of the transpose, vector F and those after it.
template <int N, int F = 0>
INLINE void multiply_small_t(const E* w, const E* ahead, const A* x, vec<A, V> (&acc)[CHAINS * N]) {
  if constexpr (F < SUMS) {
    const vec<A, V> values = load<V>(w + F * V);
    __builtin_prefetch(ahead + F * V, 0, 2);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const auto lanes = std::make_integer_sequence<int, V>{};
      acc[F % CHAINS * N + n] += values * spread<F>(load<V>(x + n * V), lanes);
    }
    multiply_small_t<N, F + 1>(w, ahead, x, acc);
  }
}

// The same of the transpose: sums (row_vectors, CHAINS, N, V). Row k adds to chain k % CHAINS.
template <int N>
void multiply_few_t(const Group& g, const A* x, A* sums) {
  constexpr int ACROSS = at_most(K, IN_REGISTERS / (N * CHAINS));
  const int64_t B = g.side();
  for (int64_t o = 0; o < row_vectors(B); o += ACROSS) {
    vec<A, V> acc[ACROSS * CHAINS * N] = {};
    if (!g.first) load_all<V>(sums + o * CHAINS * N * V, acc);
    for (int e = 0; e < g.n; ++e) {
      const E* w = g.stored(e) + o * V;
      const E* ahead = g.ahead(e) + o * V;
      const A* xs = x + g.column[e] * (N * x_step(B));
      if constexpr (RUN < V) {
        multiply_small_t<N>(w, ahead, xs, acc);
      } else {
        for (int64_t k0 = 0; k0 < B; k0 += CHAINS) {
#pragma GCC unroll 16
          for (int i = 0; i < CHAINS * ACROSS; ++i) {
            const int64_t k = k0 + i / ACROSS, at = k * B + i % ACROSS * V;
            const vec<A, V> values = load<V>(w + at);
            __builtin_prefetch(ahead + at, 0, 2);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
              acc[(i % ACROSS * CHAINS + i / ACROSS) * N + n] += values * xs[n * B + k];
            }
          }
        }
      }
    }
    store_all<V>(sums + o * CHAINS * N * V, acc);
  }
}

// out[o, n] for o < B: the sums of chains, and of the rows of a small block in a vector.
template <int N>
void finish_few_t(int64_t B, const A* sums, A* out, int64_t n_step) {
  for (int n = 0; n < N; ++n) {
    for (int64_t o = 0; o < B; o += RUN) {
      vec<A, RUN> sum = {};
      for (int i = 0; i < CHAINS * V; i += RUN) {
        sum += load<RUN>(sums + ((o / V * CHAINS + i / V) * N + n) * V + i % V);
      }
      store<RUN>(out + n * n_step + o, sum);
    }
  }
}

template <int N>
INLINE void few_rows(const Group& g, const A* x, A* sums, bool last, A* out, int64_t n_step) {
  if (g.place) {
    multiply_few_t<N>(g, x, sums);
    if (last) finish_few_t<N>(g.side(), sums, out, n_step);
  } else if constexpr (N <= 6 || WIDENED) {
    multiply_few<N>(g, x, sums);
    if (last) finish_few<N>(g.side(), sums, out, n_step);
  }
}

// The group's part of sums; after the last group, out (N, B), rows n_step apart.
void few_rows(int64_t N, const Group& g, const A* x, A* sums, bool last, A* out, int64_t n_step) {
  if (N == 1) few_rows<1>(g, x, sums, last, out, n_step);
  if constexpr (MOST_FEW > 1) {
    if (N == 2) few_rows<2>(g, x, sums, last, out, n_step);
    if (N == 4) few_rows<4>(g, x, sums, last, out, n_step);
  }
  if constexpr (MOST_FEW > 4) {
    if (N == 6) few_rows<6>(g, x, sums, last, out, n_step);
    if (N == 8) few_rows<8>(g, x, sums, last, out, n_step);
  }
}

}  // namespace
}  // namespace mlx_sparse_nn
