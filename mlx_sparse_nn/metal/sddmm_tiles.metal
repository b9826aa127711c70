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
//   (G PARTS 128, S, V) threads in groups of (128, 1, 1). A block is cut into PARTS = ceil(B /
//   SIDE) parts of SIDE rows, and CUTS = ceil(B / STRIP) strips of STRIP columns. One group owns a
//   part of up to GROUP neighbouring strips of a block-row, which share a tile of y, and walks its
//   rows n. G is R ceil(strips of a block-row / GROUP) where EVEN, else R + floor(strips / GROUP),
//   where some groups find nothing to do.
// Template
//   T float, half or bfloat; OUT, T or float; B 8 and more; EVEN whether all block-rows are equally
//   long; SIMDS_I, of 4 simdgroups, along the rows of a part; TILES_I and TILES_K, the 8 x 8 tiles
//   of a simdgroup along these rows and along a strip; STRIPS of a simdgroup.
// Sums in float32, n ascending.

#include "common.h"
#include "stage.h"
#include "panels.h"
#include "search.h"

constexpr int THREADS = 128;
constexpr int SIMDS_K = 4 / SIMDS_I;
constexpr int SIDE = 8 * TILES_I * SIMDS_I;
constexpr int STRIP = 8 * TILES_K;
constexpr int GROUP = STRIPS * SIMDS_K;
constexpr int WIDTH = GROUP * STRIP;
constexpr int TILES = STRIPS * TILES_K;
constexpr int PARTS = (B + SIDE - 1) / SIDE;
constexpr int CUTS = (B + STRIP - 1) / STRIP;
constexpr int DEPTH = (TILES_I * TILES > 20 ? 32 : 64) / sizeof(T);  // rows n in a stage
constexpr int LDY = SIDE + 8;
constexpr int LDX = WIDTH + 8;
threadgroup vec<T, 4> y_mem[DEPTH * LDY / 4];
threadgroup vec<T, 4> x_mem[DEPTH * LDX / 4];
threadgroup T* y_tile = (threadgroup T*)y_mem;
threadgroup T* x_tile = (threadgroup T*)x_mem;
threadgroup int found[1];

const int group = threadgroup_position_in_grid.x / PARTS;
const int i0 = threadgroup_position_in_grid.x % PARTS * SIDE;
const int split = threadgroup_position_in_grid.y;
const int v = threadgroup_position_in_grid.z;
const int thread_index = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int simd_group = simdgroup_index_in_threadgroup;
const int tile_i = simd_group / SIMDS_K * TILES_I * 8;
const int tile_k = simd_group % SIMDS_K * TILES * 8;
const int R = indptr_shape[0] - 1;
const int n_blocks = indices_shape[0];
const int N = x_shape[x_ndim - 2];
const int n_cols = x_shape[x_ndim - 1];
const int n_rows = y_shape[y_ndim - 1];

// The block-row of this group, its first strip, and the last one that it may take.
const int each = n_blocks / R * CUTS;
const int groups = (each + GROUP - 1) / GROUP;
int r = 0;
if (EVEN) {
  r = group / groups;
} else {
  if (simd_group == 0) {
    r = row_of_group<CUTS, GROUP>(indptr, R, group, lane);
    if (lane == 0) {
      found[0] = r;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  r = found[0];
}
const int begin = EVEN ? r * each : indptr[r] * CUTS;
const int end = EVEN ? begin + each : indptr[r + 1] * CUTS;
const int first = begin + (EVEN ? group % groups : group - (begin / GROUP + r)) * GROUP;
if (first >= end) {
  return;
}

simdgroup_float8x8 acc[TILES_I][TILES];
#pragma unroll
for (int ti = 0; ti < TILES_I; ti++) {
#pragma unroll
  for (int tk = 0; tk < TILES; tk++) {
    acc[ti][tk] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
}

// Where this thread stages. Behind a block's end are others of its columns, or zeros, since nothing
// is stored of their products; threads that are left over load what others load.
const int y_row = min(thread_index / (SIDE / 8), stage_step<SIDE, THREADS>() - 1);
const int x_row = min(thread_index / (WIDTH / 8), stage_step<WIDTH, THREADS>() - 1);
const int col = thread_index % (WIDTH / 8) * 8;
const int i = i0 + thread_index % (SIDE / 8) * 8;
const int strip = min(first + col / STRIP, end - 1);
const int k = strip % CUTS * STRIP + col % STRIP;
const int begin_n = split * step[0];
const int end_n = min(N, begin_n + step[0]);
const device T* y_rows = y + ((size_t)v * N + begin_n + y_row) * n_rows + (size_t)r * B;
const device T* x_rows =
    x + ((size_t)v * N + begin_n + x_row) * n_cols + (size_t)indices[strip / CUTS] * B;
const bool computes = first + tile_k / STRIP < end;

for (int n0 = begin_n; n0 < end_n; n0 += DEPTH) {
  const int valid = end_n - n0;
  vec<T, 4> ys[stage_vectors<DEPTH, SIDE, THREADS>()];
  vec<T, 4> xs[stage_vectors<DEPTH, WIDTH, THREADS>()];
  load_panel<T, B, DEPTH, SIDE, THREADS>(y_rows, n_rows, valid, y_row, i, ys);
  load_panel<T, B, DEPTH, WIDTH, THREADS>(x_rows, n_cols, valid, x_row, k, xs);
  align_panel<T, B, DEPTH, SIDE, THREADS>(i, ys);
  align_panel<T, B, DEPTH, WIDTH, THREADS>(k, xs);
  y_rows += (size_t)DEPTH * n_rows;
  x_rows += (size_t)DEPTH * n_cols;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  store_stage<T, DEPTH, SIDE, LDY, THREADS>(ys, thread_index, y_mem);
  store_stage<T, DEPTH, WIDTH, LDX, THREADS>(xs, thread_index, x_mem);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (computes) {
    for (int m = 0; m < min(valid, DEPTH); m += 8) {
      simdgroup_matrix<T, 8, 8> y_tiles[TILES_I];
#pragma unroll
      for (int ti = 0; ti < TILES_I; ti++) {
        simdgroup_load(y_tiles[ti], y_tile + m * LDY + tile_i + 8 * ti, LDY, ulong2(0, 0), true);
      }
#pragma unroll
      for (int tk = 0; tk < TILES; tk++) {
        simdgroup_matrix<T, 8, 8> x_tile8;
        simdgroup_load(x_tile8, x_tile + m * LDX + tile_k + 8 * tk, LDX);
#pragma unroll
        for (int ti = 0; ti < TILES_I; ti++) {
          simdgroup_multiply_accumulate(acc[ti][tk], y_tiles[ti], x_tile8, acc[ti][tk]);
        }
      }
    }
  }
}

// Each lane holds two neighbours of a row of a tile.
const int row8 = (lane / 4 & 4) + lane / 2 % 4;
const int col8 = (lane / 4 & 2) * 2 + lane % 2 * 2;
const size_t base = ((size_t)split * threadgroups_per_grid.z + v) * n_blocks;
#pragma unroll
for (int tk = 0; tk < TILES; tk++) {
  const int stored = first + tile_k / STRIP + tk / TILES_K;
  const int out_k = stored % CUTS * STRIP + tk % TILES_K * 8 + col8;
  device OUT* block = out + (base + stored / CUTS) * (B * B);
#pragma unroll
  for (int ti = 0; ti < TILES_I; ti++) {
    const int out_i = i0 + tile_i + 8 * ti + row8;
    if (stored < end && out_i < B) {
      if (out_k < B) {
        block[out_i * B + out_k] = OUT(acc[ti][tk].thread_elements()[0]);
      }
      if (out_k + 1 < B) {
        block[out_i * B + out_k + 1] = OUT(acc[ti][tk].thread_elements()[1]);
      }
    }
  }
}
