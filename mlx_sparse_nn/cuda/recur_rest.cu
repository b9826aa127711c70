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
// Sums in float32: each thread its places, ascending, then over lanes, warps and groups.

#include "packs.h"
#include "sums.h"
#include "vectors.h"

const float square = sum_parts<THREADS>(squares, squares_shape[0]);
const float a = sum_parts<THREADS>(dots, dots_shape[0]);
const float norm = sqrtf(square);
const float inverse = 1.0f / norm;
float acc = 0.0f;
if (threadIdx.x * 4 < WIDTH) {
  for (int p = blockIdx.x; p < y_shape[0]; p += gridDim.x) {
    const size_t at = (size_t)p * WIDTH + threadIdx.x * 4;
    const Four product = load_pack<4>(y + at);
    const Four known = load_four(before + at);
    Four column = load_four(w + at);
    Four rest;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      column.elements[e] *= inverse;
      const float value = fmaf(-norm, known.elements[e], product.elements[e] * inverse);
      rest.elements[e] = fmaf(-a, column.elements[e], value);
      acc = fmaf(rest.elements[e], rest.elements[e], acc);
    }
    store_four(out + at, rest);
    store_four(x + at, column);
  }
}
acc = sum_group<THREADS>(acc);
if (threadIdx.x == 0) {
  parts[blockIdx.x] = acc;
}
if (blockIdx.x == 0 && threadIdx.x < 2) {
  numbers[threadIdx.x] = threadIdx.x == 0 ? a : norm;
}
