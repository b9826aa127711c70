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
// Sums in float32: each thread its places, ascending, then over lanes, warps and groups.

#include "packs.h"
#include "sums.h"
#include "vectors.h"

const float square = sum_parts<THREADS>(squares, squares_shape[0]);
const float norm = sqrtf(square);
const float inverse = 1.0f / norm;
float acc = 0.0f;
if (threadIdx.x * 4 < WIDTH) {
  for (int p = blockIdx.x; p < y_shape[0]; p += gridDim.x) {
    const size_t at = (size_t)p * WIDTH + threadIdx.x * 4;
    const Four product = load_pack<4>(y + at);
    const Four column = load_four(w + at);
    const Four known = load_four(before + at);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float rest = fmaf(-norm, known.elements[e], product.elements[e] * inverse);
      acc = fmaf(column.elements[e] * inverse, rest, acc);
    }
  }
}
acc = sum_group<THREADS>(acc);
if (threadIdx.x == 0) {
  out[blockIdx.x] = acc;
}
