// A step of Lanczos' recurrence: x = w / norm, a the sum of dots, and the rest of y = H w,
// out = y / norm - norm before - a x.
//
// Inputs
//   y, w, before  (P, 1, W) float32: P panels of W elements
//   squares       (up to THREADS) float32, whose sum is the square of the norm of w
//   dots          (up to THREADS) float32, whose sum is a
// Outputs
//   out           (P, 1, W) float32
//   x             (P, 1, W) float32
//   parts         (G) float32, whose sum is the square of the norm of out
//   numbers       (2) float32: a and the norm of w
// Launch
//   (G THREADS, 1, 1) threads in groups of (THREADS, 1, 1), G at most P.
// Template
//   WIDTH: W, a multiple of 4, at most 4 THREADS; THREADS, a multiple of 32.
// Sums in float32: each thread its places, ascending, then over lanes, simdgroups and groups.

#include "common.h"
#include "vectors.h"

threadgroup float sums[THREADS / 32];
const uint l = thread_index_in_threadgroup;
const uint group = threadgroup_position_in_grid.x;
const uint G = threadgroups_per_grid.x;
const uint n_squares = squares_shape[0];
const uint n_dots = dots_shape[0];
const float square = sum_group<THREADS>(l < n_squares ? squares[l] : 0.0f, sums, l);
const float a = sum_group<THREADS>(l < n_dots ? dots[l] : 0.0f, sums, l);
const float norm = precise::sqrt(square);
const float inverse = 1.0f / norm;
float acc = 0.0f;
if (l * 4 < WIDTH) {
  for (uint p = group; p < uint(y_shape[0]); p += G) {
    const size_t at = (size_t)p * WIDTH + l * 4;
    const float4 product = load4<float>(y + at);
    const float4 known = load4<float>(before + at);
    const float4 column = load4<float>(w + at) * inverse;
    const float4 rest = fma(float4(-a), column, fma(float4(-norm), known, product * inverse));
#pragma unroll
    for (int e = 0; e < 4; e++) {
      acc = fma(rest[e], rest[e], acc);
      out[at + e] = rest[e];
      x[at + e] = column[e];
    }
  }
}
acc = sum_group<THREADS>(acc, sums, l);
if (l == 0) {
  parts[group] = acc;
}
if (group == 0 && l < 2) {
  numbers[l] = l == 0 ? a : norm;
}
