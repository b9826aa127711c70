// Parts of the products of columns with two vectors, and of these with one another, over the panels
// p of group g: out[j, g] = sum of basis[p, j, i] x[p, i], out[count + j, g] that with z, and
// out[2 count, g] = sum of x[p, i] z[p, i].
//
// Inputs
//   basis   (P, S, W) float32: P panels of W elements of S columns
//   x, z    (P, 1, W) float32
//   counts  (3) int32: count, the number of columns that are multiplied, the first ones
// Output
//   out     (2 count + 1, G) float32
// Launch
//   (G THREADS, ceil(count / ROWS), 1) threads, at least (G THREADS, 1, 1), in groups of (THREADS,
//   1, 1), G at most P.
// Template
//   WIDTH: W, a multiple of 4, at most 4 THREADS; THREADS, a multiple of 32, at least 2 ROWS + 1;
//   ROWS columns of a group.
// Sums in float32: each thread its places, ascending, then over lanes and simdgroups.

#include "common.h"

threadgroup float sums[2 * ROWS + 1][THREADS / 32];
const uint l = thread_index_in_threadgroup;
const uint group = threadgroup_position_in_grid.x;
const uint G = threadgroups_per_grid.x;
const int count = counts[0];
const int first = threadgroup_position_in_grid.y * ROWS;
const size_t stride = (size_t)basis_shape[1] * WIDTH;
float acc[2 * ROWS + 1] = {};
if (l * 4 < WIDTH) {
  for (uint p = group; p < uint(basis_shape[0]); p += G) {
    const size_t at = (size_t)p * WIDTH + l * 4;
    const float4 of_x = load4<float>(x + at);
    const float4 of_z = load4<float>(z + at);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int j = max(min(first + r, count - 1), 0);
      const float4 column = load4<float>(basis + p * stride + j * WIDTH + l * 4);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        acc[r] = fma(column[e], of_x[e], acc[r]);
        acc[ROWS + r] = fma(column[e], of_z[e], acc[ROWS + r]);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      acc[2 * ROWS] = fma(of_x[e], of_z[e], acc[2 * ROWS]);
    }
  }
}
#pragma unroll
for (int r = 0; r <= 2 * ROWS; r++) {
  const float sum = sum_lanes<1, 32>(acc[r]);
  if (l % 32 == 0) {
    sums[r][l / 32] = sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
if (l <= 2 * ROWS) {
  float sum = 0.0f;
  for (int w = 0; w < THREADS / 32; w++) {
    sum += sums[l][w];
  }
  const int j = first + int(l % ROWS);
  if (l < 2 * ROWS && j < count) {
    out[(size_t)(l / ROWS * count + j) * G + group] = sum;
  }
  if (l == 2 * ROWS && first == 0) {
    out[(size_t)(2 * count) * G + group] = sum;
  }
}
