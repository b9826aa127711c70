// Blocks times many rows of x. A panel holds x of 4 to 2 W rows: (n_cols, lanes), so that a vector
// is one column of x. Stored values are broadcast: a tile of registers is up to TALL rows of A by
// the lanes of the panel. Steps along rows and columns of a block tell A from its transpose.

#pragma once

#include "blocks.h"

namespace mlx_sparse_nn {
namespace {

constexpr int PANEL = 2 * W;    // lanes of a whole panel
constexpr int64_t CHUNK = 128;  // rows of x that are packed at once
constexpr int MOST = CHUNK / PANEL + 3;

// Which panels take the rows of a chunk: whole ones, then narrower ones. `few` rows, at most
// most_few, are left to few_rows.h.
struct Plan {
  int n = 0;
  int lanes[MOST];
  int64_t first[MOST];  // row
  int64_t few;

  Plan(int64_t rows, int64_t most_few) {
    int64_t done = 0;
    for (int l = PANEL; l >= 4; l /= 2) {
      // Of 16 lanes and more, a panel is taken if more than 3 / 4 are used.
      const int64_t bound = l > 8 ? l * 3 / 4 : l > 4 ? std::max<int64_t>(4, most_few) : most_few;
      while (rows - done > bound) {
        lanes[n] = l;
        first[n++] = done;
        done = std::min(rows, done + l);
      }
    }
    few = rows - done;
  }
};

// sums[i] of rows i of the blocks, `lanes` of each; `start` is what they begin with.
template <int ROWS, int L>
INLINE void multiply_tile(const Group& g, int64_t i, int64_t i_step, int64_t k_step, int64_t B,
                          const A* x, const A* start, A* sums) {
  constexpr int V = L < W ? L : W, Q = L / V;
  vec<A, V> acc[ROWS * Q];
  if (g.first) {
#pragma GCC unroll 16
    for (int m = 0; m < ROWS * Q; ++m) acc[m] = vec<A, V>{} + start[i + m / Q];
  } else {
    load_all<V>(sums + i * L, acc);
  }
  for (int e = 0; e < g.n; ++e) {
    const A* w = g.values(e) + i * i_step;
    const E* ahead = g.ahead(e) + i * B;
    const A* xs = x + g.column[e] * (B * L);
#pragma GCC unroll 4
    for (int64_t k = 0; k < B; ++k) {
      // Tiles fetch the next group in the order in which it lies; for few lanes no nearer than to
      // the second cache.
      __builtin_prefetch(ahead + k * ROWS, 0, L < PANEL ? 2 : 3);
      vec<A, V> xv[Q];
      load_all<V>(xs + k * L, xv);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) {
        const A value = w[m * i_step + k * k_step];
#pragma GCC unroll 2
        for (int q = 0; q < Q; ++q) acc[m * Q + q] += value * xv[q];
      }
    }
  }
  store_all<V>(sums + i * L, acc);
}

// The rows of the blocks from i on, ROWS at a time while there are as many.
template <int ROWS, int L>
INLINE void multiply_rows(const Group& g, int64_t i, int64_t i_step, int64_t k_step, int64_t B,
                          const A* x, const A* start, A* sums) {
  for (; i + ROWS <= B; i += ROWS) {
    multiply_tile<ROWS, L>(g, i, i_step, k_step, B, x, start, sums);
  }
  if constexpr (BLOCK == 0 && ROWS > 1) {
    multiply_rows<ROWS / 2, L>(g, i, i_step, k_step, B, x, start, sums);
  }
}

// sums (B, L) of the group and one panel.
template <int L>
void multiply_panel(const Group& g, const A* x, const A* start, A* sums) {
  constexpr int ROWS = BLOCK && BLOCK < TALL ? BLOCK : TALL;
  const int64_t B = g.side();
  if constexpr (BLOCK == 0) {
    multiply_rows<ROWS, L>(g, 0, g.place ? 1 : B, g.place ? B : 1, B, x, start, sums);
  } else if (g.place) {
    multiply_rows<ROWS, L>(g, 0, 1, B, B, x, start, sums);
  } else {
    multiply_rows<ROWS, L>(g, 0, B, 1, B, x, start, sums);
  }
}

void multiply_panel(int lanes, const Group& g, const A* x, const A* start, A* sums) {
  if (lanes == PANEL) return multiply_panel<PANEL>(g, x, start, sums);
  if constexpr (PANEL > 16) {
    if (lanes == 16) return multiply_panel<16>(g, x, start, sums);
  }
  if constexpr (PANEL > 8) {
    if (lanes == 8) return multiply_panel<8>(g, x, start, sums);
  }
  if constexpr (PANEL > 4) multiply_panel<4>(g, x, start, sums);
}

}  // namespace
}  // namespace mlx_sparse_nn
