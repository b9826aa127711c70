// out[s, v, j, i, k] = sum of y[v, n, row(j) B + i] x[v, n, indices[j] B + k] over the rows n of
// split s.
//
// Inputs
//   y        (V, N, R B) T
//   x        (V, N, C) T
//   indptr   (R + 1) int32, indices (n_blocks) int32
//   step     (1) int32: rows of a split
// Output
//   out      (S, V, n_blocks, B, B) OUT
// Launch
//   (n_blocks (B / SIDE)^2 THREADS, S, V) threads in groups of (THREADS, 1, 1), THREADS = 32 for
//   SIDE = 8, else 128. One group owns SIDE x SIDE values of a stored block and walks its rows.
// Template
//   T float, half or bfloat; OUT, T or float; B 8, 16, 32, 64 or 128; SIDE min(B, 64).
// Sums in float32, n ascending.

#include "common.h"

constexpr int ACROSS = SIDE < 16 ? 1 : 2;  // simdgroups over i, and as many over k
constexpr int THREADS = 32 * ACROSS * ACROSS;
constexpr int TILES = SIDE / (8 * ACROSS);
constexpr int DEPTH = 32;  // rows staged at a time
constexpr int LD = SIDE + 4;
threadgroup T y_tile[DEPTH * LD];
threadgroup T x_tile[DEPTH * LD];
threadgroup float scratch[ACROSS * ACROSS * 64];

constexpr int PER_BLOCK = (B / SIDE) * (B / SIDE);
const int j = threadgroup_position_in_grid.x / PER_BLOCK;
const int part = threadgroup_position_in_grid.x % PER_BLOCK;
const int i0 = part / (B / SIDE) * SIDE;
const int k0 = part % (B / SIDE) * SIDE;
const int split = threadgroup_position_in_grid.y;
const int v = threadgroup_position_in_grid.z;
const int thread_index = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int group = simdgroup_index_in_threadgroup;
const int tile_i = group / ACROSS * TILES * 8;
const int tile_k = group % ACROSS * TILES * 8;
const int N = x_shape[x_ndim - 2];
const int C = x_shape[x_ndim - 1];
const int R = y_shape[y_ndim - 1];

simdgroup_float8x8 acc[TILES][TILES];
#pragma unroll
for (int a = 0; a < TILES; a++) {
#pragma unroll
  for (int b = 0; b < TILES; b++) {
    acc[a][b] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
}

const int row = row_of(indptr, indptr_shape[0] - 1, j);
const int first = split * step[0];
const int last = min(N, first + step[0]);
const device T* y_cols = y + (size_t)v * N * R + row * B + i0;
const device T* x_cols = x + (size_t)v * N * C + indices[j] * B + k0;
for (int n = first; n < last; n += DEPTH) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  stage<T, DEPTH, SIDE, LD, THREADS>(y_cols + (size_t)n * R, R, last - n, y_tile, thread_index);
  stage<T, DEPTH, SIDE, LD, THREADS>(x_cols + (size_t)n * C, C, last - n, x_tile, thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int depth = min(DEPTH, last - n);
  for (int m = 0; m < depth; m += 8) {
    simdgroup_matrix<T, 8, 8> ys[TILES];
    simdgroup_matrix<T, 8, 8> xs[TILES];
#pragma unroll
    for (int a = 0; a < TILES; a++) {
      simdgroup_load(ys[a], y_tile + m * LD + tile_i + 8 * a, LD, ulong2(0, 0), true);
      simdgroup_load(xs[a], x_tile + m * LD + tile_k + 8 * a, LD);
    }
#pragma unroll
    for (int a = 0; a < TILES; a++) {
#pragma unroll
      for (int b = 0; b < TILES; b++) {
        simdgroup_multiply_accumulate(acc[a][b], ys[a], xs[b], acc[a][b]);
      }
    }
  }
}

const size_t n_blocks = indices_shape[0];
const size_t block = (((size_t)split * threadgroups_per_grid.z + v) * n_blocks + j) * (B * B);
threadgroup float* tile = scratch + group * 64;
for (int a = 0; a < TILES; a++) {
  for (int b = 0; b < TILES; b++) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_store(acc[a][b], tile, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    const int i = i0 + tile_i + 8 * a + lane / 4;
    const int k = k0 + tile_k + 8 * b + lane % 4 * 2;
    out[block + i * B + k] = OUT(float(tile[2 * lane]));
    out[block + i * B + k + 1] = OUT(float(tile[2 * lane + 1]));
  }
}
