// out[s, v, j, i, k] = sum of y[v, n, r B + i] x[v, n, indices[j] B + k] over the rows n of split
// s, where r is the block-row of j. Letters as in README.md.
//
// Inputs
//   y        (V, N, n_rows) T
//   x        (V, N, n_cols) T
//   indptr   (R + 1) int32, indices (n_blocks) int32
//   step     (1) int32: rows n of a split
// Output
//   out      (S, V, n_blocks, B, B) OUT
// Launch
//   (n_blocks (B / SIDE)^2 THREADS, S, V) threads in groups of (THREADS, 1, 1), THREADS = 32 for
//   SIDE = 8, else 128. One group owns SIDE x SIDE values of a stored block and walks its rows n.
// Template
//   T float, half or bfloat; OUT, T or float; B 8, 16, 32, 64 or 128; SIDE min(B, 64).
// Sums in float32, n ascending.

#include "common.h"

constexpr int ACROSS = SIDE < 16 ? 1 : 2;  // simdgroups over i, and as many over k
constexpr int THREADS = 32 * ACROSS * ACROSS;
constexpr int TILES = SIDE / (8 * ACROSS);
constexpr int DEPTH = 32;  // rows n in a stage
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
const int simd_group = simdgroup_index_in_threadgroup;
const int tile_i = simd_group / ACROSS * TILES * 8;
const int tile_k = simd_group % ACROSS * TILES * 8;
const int N = x_shape[x_ndim - 2];
const int n_cols = x_shape[x_ndim - 1];
const int n_rows = y_shape[y_ndim - 1];

simdgroup_float8x8 acc[TILES][TILES];
#pragma unroll
for (int ti = 0; ti < TILES; ti++) {
#pragma unroll
  for (int tk = 0; tk < TILES; tk++) {
    acc[ti][tk] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
}

const int r = row_of(indptr, indptr_shape[0] - 1, j);
const int begin_n = split * step[0];
const int end_n = min(N, begin_n + step[0]);
const device T* y_cols = y + (size_t)v * N * n_rows + r * B + i0;
const device T* x_cols = x + (size_t)v * N * n_cols + indices[j] * B + k0;
for (int n0 = begin_n; n0 < end_n; n0 += DEPTH) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  stage<T, DEPTH, SIDE, LD, THREADS>(y_cols + (size_t)n0 * n_rows, n_rows, end_n - n0, y_tile,
                                     thread_index);
  stage<T, DEPTH, SIDE, LD, THREADS>(x_cols + (size_t)n0 * n_cols, n_cols, end_n - n0, x_tile,
                                     thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  const int depth = min(DEPTH, end_n - n0);
  for (int m = 0; m < depth; m += 8) {
    simdgroup_matrix<T, 8, 8> ys[TILES];
    simdgroup_matrix<T, 8, 8> xs[TILES];
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      simdgroup_load(ys[t], y_tile + m * LD + tile_i + 8 * t, LD, ulong2(0, 0), true);
      simdgroup_load(xs[t], x_tile + m * LD + tile_k + 8 * t, LD);
    }
#pragma unroll
    for (int ti = 0; ti < TILES; ti++) {
#pragma unroll
      for (int tk = 0; tk < TILES; tk++) {
        simdgroup_multiply_accumulate(acc[ti][tk], ys[ti], xs[tk], acc[ti][tk]);
      }
    }
  }
}

const size_t n_blocks = indices_shape[0];
const size_t base = (((size_t)split * threadgroups_per_grid.z + v) * n_blocks + j) * (B * B);
threadgroup float* tile = scratch + simd_group * 64;
for (int ti = 0; ti < TILES; ti++) {
  for (int tk = 0; tk < TILES; tk++) {
    simdgroup_barrier(mem_flags::mem_threadgroup);
    simdgroup_store(acc[ti][tk], tile, 8);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    const int i = i0 + tile_i + 8 * ti + lane / 4;
    const int k = k0 + tile_k + 8 * tk + lane % 4 * 2;
    out[base + i * B + k] = OUT(float(tile[2 * lane]));
    out[base + i * B + k + 1] = OUT(float(tile[2 * lane + 1]));
  }
}
