// Parts of a = <x, y'>: what y = H w, over the norm of w, has of x = w / norm, less what is known
// of it, norm times before: out[g] = sum of x_i (y_i / norm - norm before_i) over the places of
// group g.
//
// Inputs
//   y, w, before  (P, 1, W) float32: P panels of W elements
//   squares       (up to THREADS) float32, whose sum is the square of the norm of w
// Output
//   out           (G) float32
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
const float square = sum_group<THREADS>(l < n_squares ? squares[l] : 0.0f, sums, l);
const float norm = precise::sqrt(square);
const float inverse = 1.0f / norm;
float acc = 0.0f;
if (l * 4 < WIDTH) {
  for (uint p = group; p < uint(y_shape[0]); p += G) {
    const size_t at = (size_t)p * WIDTH + l * 4;
    const float4 product = load4<float>(y + at);
    const float4 column = load4<float>(w + at);
    const float4 known = load4<float>(before + at);
    const float4 rest = fma(float4(-norm), known, product * inverse);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      acc = fma(column[e] * inverse, rest[e], acc);
    }
  }
}
acc = sum_group<THREADS>(acc, sums, l);
if (l == 0) {
  out[group] = acc;
}
