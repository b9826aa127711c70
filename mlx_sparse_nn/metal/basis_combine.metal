// Combinations of columns: out[p, r, i] = sum over j of factors[r, j] basis[p, first + j, i].
//
// Inputs
//   basis    (P, S, W) float32: P panels of W elements of S columns
//   factors  (R, M) float32
//   counts   (3) int32: first
// Output
//   out      (P, R, W) float32
// Launch
//   (P THREADS, ceil(R / ROWS), 1) threads in groups of (THREADS, 1, 1).
// Template
//   WIDTH: W, a multiple of 4, at most 4 THREADS; THREADS; ROWS combinations of a group.
// Sums in float32: over j ascending.

#include "common.h"

const uint l = thread_index_in_threadgroup;
const uint p = threadgroup_position_in_grid.x;
const uint R = factors_shape[0];
const uint M = factors_shape[1];
const uint r0 = threadgroup_position_in_grid.y * ROWS;
if (l * 4 < WIDTH) {
  const size_t begin = ((size_t)p * basis_shape[1] + counts[0]) * WIDTH + l * 4;
  float4 acc[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    acc[r] = float4(0.0f);
  }
  for (uint j = 0; j < M; j++) {
    const float4 column = load4<float>(basis + begin + (size_t)j * WIDTH);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float factor = factors[min(r0 + r, R - 1) * M + j];
      acc[r] = fma(float4(factor), column, acc[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (r0 + r < R) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        out[((size_t)p * R + r0 + r) * WIDTH + l * 4 + e] = acc[r][e];
      }
    }
  }
}
