// y[v, n, r B + o] = bias[r B + o] + sum of W_j[o, k] x[v, n, indices[j] B + k] over the blocks j
// of block-row r and k < B. W_j is data[v, j], or the transpose of data[v, perm[j]]. Letters as in
// README.md.
//
// Inputs
//   data     (V, n_blocks, B, B) T
//   indptr   (R + 1) int32, indices (n_blocks) int32
//   perm     (n_blocks) int32; not read unless TRANSPOSED
//   x        (V, N, n_cols) T
//   bias     (n_rows) T; not read unless BIAS
// Output
//   y        (V, N, n_rows) T
// Launch
//   (R THREADS, ceil(N / ROWS), V) threads in groups of (THREADS, 1, 1), THREADS = 64 for B = 8,
//   else 128. One group owns one block-row and ROWS rows of x. Neighbours share their rows of x.
// Template
//   T float, half or bfloat; B 8, 16, 32, 64 or 128; INSIDE columns of the last block-column, 1 to
//   B; ROWS of x in a tile, a multiple of 16; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: blocks in stored order, k ascending, then the bias.

#include "common.h"

constexpr int ACROSS = B < 16 ? 1 : 2;  // simdgroups side by side over the B outputs; 2 over n
constexpr int THREADS = 64 * ACROSS;
constexpr int TILES_N = ROWS / 16;         // 8 x 8 tiles of a simdgroup over the rows of x,
constexpr int TILES_O = B / (8 * ACROSS);  // and over the outputs
constexpr int DEPTH = B < 32 ? B : 32;     // k in a stage
constexpr int PAD = 4;                     // elements, against bank conflicts
constexpr int LDX = DEPTH + PAD;
constexpr int LDW = (TRANSPOSED ? B : DEPTH) + PAD;
threadgroup T x_tile[ROWS * LDX];
threadgroup T w_tile[(TRANSPOSED ? DEPTH : B) * LDW];
threadgroup float scratch[2 * ACROSS * 64];

const int r = threadgroup_position_in_grid.x;
const int n0 = threadgroup_position_in_grid.y * ROWS;
const int v = threadgroup_position_in_grid.z;
const int thread_index = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int simd_group = simdgroup_index_in_threadgroup;
const int tile_n = simd_group / ACROSS * TILES_N * 8;
const int tile_o = simd_group % ACROSS * TILES_O * 8;
const int N = x_shape[x_ndim - 2];
const int n_cols = x_shape[x_ndim - 1];
const int n_rows = (indptr_shape[0] - 1) * B;
const int n_inside = n_cols - B + INSIDE;

simdgroup_float8x8 acc[TILES_N][TILES_O];
#pragma unroll
for (int tn = 0; tn < TILES_N; tn++) {
#pragma unroll
  for (int to = 0; to < TILES_O; to++) {
    acc[tn][to] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
}

const device T* x_panel = x + ((size_t)v * N + n0) * n_cols;
const int end = indptr[r + 1];
for (int j = indptr[r]; j < end; j++) {
  const int stored = TRANSPOSED ? perm[j] : j;
  const device T* block = data + ((size_t)v * indices_shape[0] + stored) * (B * B);
  const device T* x_block = x_panel + indices[j] * B;
  for (int k0 = 0; k0 < B; k0 += DEPTH) {
    // How many k of the stage lie in the matrix.
    const int depth = INSIDE < B ? min(DEPTH, n_inside - indices[j] * B - k0) : DEPTH;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<T, ROWS, DEPTH, LDX, THREADS>(x_block + k0, n_cols, N - n0, x_tile, thread_index);
    if (TRANSPOSED) {
      stage<T, DEPTH, B, LDW, THREADS>(block + k0 * B, B, depth, w_tile, thread_index);
    } else {
      stage<T, B, DEPTH, LDW, THREADS>(block + k0, B, B, w_tile, thread_index, depth);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int k = 0; k < DEPTH; k += 8) {
      simdgroup_matrix<T, 8, 8> xs[TILES_N];
      simdgroup_matrix<T, 8, 8> ws[TILES_O];
#pragma unroll
      for (int tn = 0; tn < TILES_N; tn++) {
        simdgroup_load(xs[tn], x_tile + (tile_n + 8 * tn) * LDX + k, LDX);
      }
#pragma unroll
      for (int to = 0; to < TILES_O; to++) {
        const int o = tile_o + 8 * to;
        if (TRANSPOSED) {
          simdgroup_load(ws[to], w_tile + k * LDW + o, LDW);
        } else {
          simdgroup_load(ws[to], w_tile + o * LDW + k, LDW, ulong2(0, 0), true);
        }
      }
#pragma unroll
      for (int tn = 0; tn < TILES_N; tn++) {
#pragma unroll
        for (int to = 0; to < TILES_O; to++) {
          simdgroup_multiply_accumulate(acc[tn][to], xs[tn], ws[to], acc[tn][to]);
        }
      }
    }
  }
}

// Each lane takes two neighbouring elements of an 8 x 8 tile out of the simdgroup's scratch.
threadgroup float* tile = scratch + simd_group * 64;
#pragma unroll
for (int to = 0; to < TILES_O; to++) {
  const int row = r * B + tile_o + 8 * to + lane % 4 * 2;
  const float bias_0 = BIAS ? float(bias[row]) : 0.0f;
  const float bias_1 = BIAS ? float(bias[row + 1]) : 0.0f;
#pragma unroll
  for (int tn = 0; tn < TILES_N; tn++) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_store(acc[tn][to], tile, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    const int n = n0 + tile_n + 8 * tn + lane / 4;
    if (n < N) {
      y[((size_t)v * N + n) * n_rows + row] = T(tile[2 * lane] + bias_0);
      y[((size_t)v * N + n) * n_rows + row + 1] = T(tile[2 * lane + 1] + bias_1);
    }
  }
}
