// Two vectors less their parts along columns, and the second less that along the first:
// out[p, i] = x[p, i] - sum over j of a_j basis[p, j, i], and
// last[p, i] = z[p, i] - sum over j of b_j basis[p, j, i] - (c - sum over j of a_j b_j) out[p, i],
// where a, b and c are sums of the overlaps: a_j of overlaps[j, :], and so on. Of orthonormal
// columns and a normalised x, the results are orthogonal to them and nearly to one another.
//
// Inputs
//   basis      (P, S, W) float32: P panels of W elements of S columns
//   x, z       (P, 1, W) float32
//   overlaps   (2 count + 1, up to THREADS) float32, count at most MOST
// Outputs
//   out, last  (P, 1, W) float32
//   parts      (G) float32, whose sum is the square of the norm of out
//   of_last    (G) float32, the same of last
// Launch
//   (G THREADS, 1, 1) threads in groups of (THREADS, 1, 1), G at most P.
// Template
//   WIDTH: W, a multiple of 4, at most 4 THREADS; THREADS, a multiple of 32; MOST.
// Sums in float32: over j ascending; squares as in recur_rest.

#include "packs.h"
#include "sums.h"
#include "vectors.h"

__shared__ float factors[2 * MOST + 1];
const int n_factors = overlaps_shape[0];
const int n_parts = overlaps_shape[1];
const int count = n_factors / 2;
for (int j = threadIdx.x / 32; j < n_factors; j += THREADS / 32) {
  float sum = 0.0f;
  for (int g = threadIdx.x % 32; g < n_parts; g += 32) {
    sum += overlaps[(size_t)j * n_parts + g];
  }
  sum = sum_lanes<1, 32>(sum);
  if (threadIdx.x % 32 == 0) {
    factors[j] = sum;
  }
}
__syncthreads();
float along = factors[2 * count];
for (int j = 0; j < count; j++) {
  along = fmaf(-factors[j], factors[count + j], along);
}
const size_t stride = (size_t)basis_shape[1] * WIDTH;
float acc_x = 0.0f;
float acc_z = 0.0f;
if (threadIdx.x * 4 < WIDTH) {
  for (int p = blockIdx.x; p < basis_shape[0]; p += gridDim.x) {
    const size_t at = (size_t)p * WIDTH + threadIdx.x * 4;
    const float* columns = basis + p * stride + threadIdx.x * 4;
    Four of_x = load_four(x + at);
    Four of_z = load_four(z + at);
#pragma unroll 8
    for (int j = 0; j < count; j++) {
      const Four column = load_four(columns + (size_t)j * WIDTH);
#pragma unroll
      for (int e = 0; e < 4; e++) {
        of_x.elements[e] = fmaf(-factors[j], column.elements[e], of_x.elements[e]);
        of_z.elements[e] = fmaf(-factors[count + j], column.elements[e], of_z.elements[e]);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      of_z.elements[e] = fmaf(-along, of_x.elements[e], of_z.elements[e]);
      acc_x = fmaf(of_x.elements[e], of_x.elements[e], acc_x);
      acc_z = fmaf(of_z.elements[e], of_z.elements[e], acc_z);
    }
    store_four(out + at, of_x);
    store_four(last + at, of_z);
  }
}
acc_x = sum_group<THREADS>(acc_x);
acc_z = sum_group<THREADS>(acc_z);
if (threadIdx.x == 0) {
  parts[blockIdx.x] = acc_x;
  of_last[blockIdx.x] = acc_z;
}
