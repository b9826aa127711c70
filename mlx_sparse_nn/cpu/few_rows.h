// Blocks times 1 to FEW rows of x, bound by reading the stored values: each vector is one of
// stored values, read once. It is a part of a row of a block, or rows of a small block. For A,
// lanes of a sum are added at the end; for the transpose, they are outputs.
//
// x is packed to (C, N, X_STEP): where a block has fewer columns than a vector has lanes, its x is
// repeated.

#pragma once

#include "blocks.h"

namespace mlx_sparse_nn {
namespace {

constexpr int V = SIDE * SIDE < W ? SIDE * SIDE : W;  // lanes
constexpr int K = SIDE > V ? SIDE / V : 1;            // vectors of a row of a block
constexpr int RUN = SIDE < V ? SIDE : V;              // lanes that lie in one row
constexpr int X_STEP = SIDE > V ? SIDE : V;
constexpr int SUMS = SIDE * SIDE / (V * K);  // sums of a block-row: one for each row, or rows

// Of the transpose, sums of the same outputs that are kept apart: one addition takes long.
constexpr int CHAINS = K >= 4 ? 1 : 4 / K < SUMS ? 4 / K : SUMS;

// Vectors of sums in registers.
constexpr int IN_REGISTERS = REGISTERS / 2;

constexpr int at_most(int n, int bound) { return n > bound && n > 1 ? at_most(n / 2, bound) : n; }

// Vectors that hold the sums of a block-row and one row of x.
constexpr int FEW_SUMS = SUMS > CHAINS* K ? SUMS : CHAINS * K;

// sums (SUMS, N, V)
template <int N>
void multiply_few(const Group& g, const A* x, A* sums) {
  constexpr int ROWS = at_most(SUMS, IN_REGISTERS / N);
  // One or two rows take wide blocks one by one, since memory likes to be read in order.
  const int at_once = K > 1 && N <= 2 ? 1 : g.n + 1;
  for (int e0 = 0; e0 == 0 || e0 < g.n; e0 += at_once) {
    const int e1 = std::min(g.n, e0 + at_once);
    for (int i = 0; i < SUMS; i += ROWS) {
      vec<A, V> acc[ROWS * N] = {};
      if (!g.first || e0) read<V>(sums + i * N * V, acc);
      for (int e = e0; e < e1; ++e) {
        const E* w = g.stored(e) + i * K * V;
        const E* ahead = g.ahead(e) + i * K * V;
        const A* xs = x + g.column[e] * (N * X_STEP);
        for (int k = 0; k < K; ++k) {
          vec<A, V> xv[N];
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) xv[n] = load<V>(xs + n * X_STEP + k * V);
#pragma GCC unroll 16
          for (int m = 0; m < ROWS; ++m) {
            const vec<A, V> values = load<V>(w + (m * K + k) * V);
            __builtin_prefetch(ahead + (m * K + k) * V, 0, 2);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) acc[m * N + n] += values * xv[n];
          }
        }
      }
      write<V>(sums + i * N * V, acc);
    }
  }
}

// out[o, n] for o < B: the sums of lanes.
template <int N>
void finish_few(const A* sums, A* out, int64_t n_step) {
  constexpr int PARTS = V / RUN;
  for (int o = 0; o < SIDE; o += RUN) {
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
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const auto lanes = std::make_integer_sequence<int, V>{};
      acc[F % CHAINS * N + n] += values * spread<F>(load<V>(x + n * X_STEP), lanes);
    }
    multiply_small_t<N, F + 1>(w, ahead, x, acc);
  }
}

// The same of the transpose: sums (K, CHAINS, N, V). Row k of a block adds to chain k % CHAINS.
template <int N>
void multiply_few_t(const Group& g, const A* x, A* sums) {
  constexpr int KS = at_most(K, IN_REGISTERS / (N * CHAINS));
  for (int o = 0; o < K; o += KS) {
    vec<A, V> acc[KS * CHAINS * N] = {};
    if (!g.first) read<V>(sums + o * CHAINS * N * V, acc);
    for (int e = 0; e < g.n; ++e) {
      const E* w = g.stored(e) + o * V;
      const E* ahead = g.ahead(e) + o * V;
      const A* xs = x + g.column[e] * (N * X_STEP);
      if constexpr (SIDE < V) {
        multiply_small_t<N>(w, ahead, xs, acc);
      } else {
        for (int k0 = 0; k0 < SIDE; k0 += CHAINS) {
#pragma GCC unroll 16
          for (int i = 0; i < CHAINS * KS; ++i) {
            const int k = k0 + i / KS, at = k * SIDE + i % KS * V;
            const vec<A, V> values = load<V>(w + at);
            __builtin_prefetch(ahead + at, 0, 2);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) {
              acc[(i % KS * CHAINS + i / KS) * N + n] += values * xs[n * X_STEP + k];
            }
          }
        }
      }
    }
    write<V>(sums + o * CHAINS * N * V, acc);
  }
}

// out[o, n] for o < B: the sums of chains, and of the rows of a small block in a vector.
template <int N>
void finish_few_t(const A* sums, A* out, int64_t n_step) {
  for (int n = 0; n < N; ++n) {
    for (int o = 0; o < SIDE; o += RUN) {
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
    if (last) finish_few_t<N>(sums, out, n_step);
  } else {
    multiply_few<N>(g, x, sums);
    if (last) finish_few<N>(sums, out, n_step);
  }
}

// The group's part of sums; after the last group, out (N, B), rows n_step apart.
void few_rows(int64_t N, const Group& g, const A* x, A* sums, bool last, A* out, int64_t n_step) {
  if constexpr (BLOCK > 0) {
    if (N == 1) few_rows<1>(g, x, sums, last, out, n_step);
    if (N == 2) few_rows<2>(g, x, sums, last, out, n_step);
    if (N == 3) few_rows<3>(g, x, sums, last, out, n_step);
    if (N == 4) few_rows<4>(g, x, sums, last, out, n_step);
  }
}

}  // namespace
}  // namespace mlx_sparse_nn
