// y[v, n, r B + o] = bias[r B + o] + sum of W_j[o, k] x[v, n, indices[j] B + k] over the blocks j
// of block-row r and k < B, where W_j is data[v, j], or the transpose of data[v, perm[j]].
//
// Inputs
//   data     (V, n_blocks, B, B) T
//   indptr   (R + 1) int32, indices (n_blocks) int32
//   perm     (n_blocks) int32; not read unless TRANSPOSED
//   x        (V, N, C) T
//   bias     (R B) T; not read unless BIAS
// Output
//   y        (V, N, R B) T
// Launch
//   (R THREADS, ceil(N / ROWS), V) threads in groups of (THREADS, 1, 1), THREADS = 64 for B = 8,
//   else 128. One group owns ROWS rows of x and one block-row: x panels are shared by neighbours.
// Template
//   T float, half or bfloat; B 8, 16, 32, 64 or 128; ROWS of x in a tile, a multiple of 16;
//   TRANSPOSED and BIAS 0 or 1.
// Sums in float32: blocks in stored order, k ascending, then the bias.

#include "common.h"

constexpr int ACROSS = B < 16 ? 1 : 2;  // simdgroups side by side over the B outputs; 2 over rows
constexpr int THREADS = 64 * ACROSS;
constexpr int TILES_N = ROWS / 16;         // 8 x 8 tiles of a simdgroup over the rows of x,
constexpr int TILES_O = B / (8 * ACROSS);  // and over the outputs
constexpr int DEPTH = B < 32 ? B : 32;     // k staged at a time
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
const int group = simdgroup_index_in_threadgroup;
const int tile_n = group / ACROSS * TILES_N * 8;
const int tile_o = group % ACROSS * TILES_O * 8;
const int N = x_shape[x_ndim - 2];
const int C = x_shape[x_ndim - 1];
const int out = (indptr_shape[0] - 1) * B;

simdgroup_float8x8 acc[TILES_N][TILES_O];
#pragma unroll
for (int i = 0; i < TILES_N; i++) {
#pragma unroll
  for (int j = 0; j < TILES_O; j++) {
    acc[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
}

const device T* x_panel = x + ((size_t)v * N + n0) * C;
const int end = indptr[r + 1];
for (int j = indptr[r]; j < end; j++) {
  const int stored = TRANSPOSED ? perm[j] : j;
  const device T* block = data + ((size_t)v * indices_shape[0] + stored) * (B * B);
  const device T* x_block = x_panel + indices[j] * B;
  for (int k0 = 0; k0 < B; k0 += DEPTH) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    stage<T, ROWS, DEPTH, LDX, THREADS>(x_block + k0, C, N - n0, x_tile, thread_index);
    if (TRANSPOSED) {
      stage<T, DEPTH, B, LDW, THREADS>(block + k0 * B, B, DEPTH, w_tile, thread_index);
    } else {
      stage<T, B, DEPTH, LDW, THREADS>(block + k0, B, B, w_tile, thread_index);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int k = 0; k < DEPTH; k += 8) {
      simdgroup_matrix<T, 8, 8> xs[TILES_N];
      simdgroup_matrix<T, 8, 8> ws[TILES_O];
#pragma unroll
      for (int i = 0; i < TILES_N; i++) {
        simdgroup_load(xs[i], x_tile + (tile_n + 8 * i) * LDX + k, LDX);
      }
#pragma unroll
      for (int j = 0; j < TILES_O; j++) {
        const int o = tile_o + 8 * j;
        if (TRANSPOSED) {
          simdgroup_load(ws[j], w_tile + k * LDW + o, LDW);
        } else {
          simdgroup_load(ws[j], w_tile + o * LDW + k, LDW, ulong2(0, 0), true);
        }
      }
#pragma unroll
      for (int i = 0; i < TILES_N; i++) {
#pragma unroll
        for (int j = 0; j < TILES_O; j++) {
          simdgroup_multiply_accumulate(acc[i][j], xs[i], ws[j], acc[i][j]);
        }
      }
    }
  }
}

// Each lane takes two neighbouring elements of an 8 x 8 tile out of the simdgroup's scratch.
threadgroup float* tile = scratch + group * 64;
#pragma unroll
for (int j = 0; j < TILES_O; j++) {
  const int o = r * B + tile_o + 8 * j + lane % 4 * 2;
  const float bias_a = BIAS ? float(bias[o]) : 0.0f;
  const float bias_b = BIAS ? float(bias[o + 1]) : 0.0f;
#pragma unroll
  for (int i = 0; i < TILES_N; i++) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_store(acc[i][j], tile, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    const int n = n0 + tile_n + 8 * i + lane / 4;
    if (n < N) {
      y[((size_t)v * N + n) * out + o] = T(tile[2 * lane] + bias_a);
      y[((size_t)v * N + n) * out + o + 1] = T(tile[2 * lane + 1] + bias_b);
    }
  }
}
