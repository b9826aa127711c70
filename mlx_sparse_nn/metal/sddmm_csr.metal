// The product of sddmm_tiles.metal for scalars (B = 1) and for blocks of less than 8.
//
// Where WIDTH > 1, x and y lie by columns: then lanes side by side read neighbouring places.
//
// Inputs
//   y        (V, N, n_rows) T, or (V, n_rows, N) where WIDTH > 1
//   x        (V, N, n_cols) T, or (V, n_cols, N) where WIDTH > 1
//   indptr, indices, step: as there
// Output
//   out      as there, B 1 to 7
// Launch
//   (ceil((R + floor(n_blocks / BLOCKS)) WIDTH / 256) 256, S, V) threads in groups of (256, 1, 1).
//   WIDTH neighbouring threads own up to BLOCKS neighbouring blocks of a block-row, which share
//   what they read of y. Some find nothing to do.
// Template
//   T float, half or bfloat; OUT, T or float; B; BLOCKS; WIDTH a power of two, at most 32.
// Sums in float32: each lane every WIDTH-th row n, ascending, then over lanes.

#include "common.h"
#include "outer.h"
#include "search.h"

constexpr int DEPTH = 20 / ((BLOCKS + 1) * B);  // rows n whose loads are under way together

const int position = threadgroup_position_in_grid.x * 256 + thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int lane_n = lane % WIDTH;
const int split = threadgroup_position_in_grid.y;
const int v = threadgroup_position_in_grid.z;
const int R = indptr_shape[0] - 1;
const int n_blocks = indices_shape[0];
const int N = x_shape[WIDTH > 1 ? x_ndim - 1 : x_ndim - 2];
const int n_cols = x_shape[WIDTH > 1 ? x_ndim - 2 : x_ndim - 1];
const int n_rows = R * B;

// The block-row of the simdgroup's first group, and from there this one's: each has a group at
// least.
const int group = position / WIDTH;
int r = row_of_group<1, BLOCKS>(indptr, R, (position - lane) / WIDTH, lane);
int high = min(r + lane / WIDTH, R - 1);
while (r < high) {
  const int middle = (r + high + 1) / 2;
  if (indptr[middle] / BLOCKS + middle <= group) {
    r = middle;
  } else {
    high = middle - 1;
  }
}
const int begin = indptr[r];
const int end = indptr[r + 1];
const int first = begin + (group - (begin / BLOCKS + r)) * BLOCKS;

float acc[BLOCKS * B * B];
#pragma unroll
for (int e = 0; e < BLOCKS * B * B; e++) {
  acc[e] = 0.0f;
}
if (first < end) {
  const size_t y_col = WIDTH > 1 ? N : 1;
  const size_t x_col = y_col;
  const size_t y_step = WIDTH > 1 ? WIDTH : n_rows;
  const size_t x_step = WIDTH > 1 ? WIDTH : n_cols;
  int n = split * step[0] + lane_n;
  const int end_n = min(N, (split + 1) * step[0]);
  size_t y_at = (size_t)v * N * n_rows + r * B * y_col + (WIDTH > 1 ? n : n * y_step);
  size_t x_at[BLOCKS];
#pragma unroll
  for (int block = 0; block < BLOCKS; block++) {
    const int j = min(first + block, end - 1);
    x_at[block] = (size_t)v * N * n_cols + indices[j] * B * x_col + (WIDTH > 1 ? n : n * x_step);
  }
  while (n < end_n) {
    const bool whole = n + (DEPTH - 1) * WIDTH < end_n;
    if (whole) {
      add_rows<T, B, BLOCKS, DEPTH>(y, y_at, y_col, y_step, x, x_at, x_col, x_step, acc);
    } else {
      add_rows<T, B, BLOCKS, 1>(y, y_at, y_col, y_step, x, x_at, x_col, x_step, acc);
    }
    const int depth = whole ? DEPTH : 1;
    n += depth * WIDTH;
    y_at += depth * y_step;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
      x_at[block] += depth * x_step;
    }
  }
}

const size_t base = ((size_t)split * threadgroups_per_grid.z + v) * n_blocks + first;
#pragma unroll
for (int e = 0; e < BLOCKS * B * B; e++) {
  const float sum = sum_lanes<1, WIDTH>(acc[e]);
  if (lane_n == e % WIDTH && first + e / (B * B) < end) {
    out[base * (B * B) + e] = OUT(sum);
  }
}
