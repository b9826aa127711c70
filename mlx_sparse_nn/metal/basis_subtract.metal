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

#include "common.h"
#include "vectors.h"

threadgroup float factors[2 * MOST + 1];
threadgroup float sums[THREADS / 32];
const uint l = thread_index_in_threadgroup;
const uint group = threadgroup_position_in_grid.x;
const uint G = threadgroups_per_grid.x;
const uint n_factors = overlaps_shape[0];
const uint n_parts = overlaps_shape[1];
const uint count = n_factors / 2;
for (uint j = l / 32; j < n_factors; j += THREADS / 32) {
  float sum = 0.0f;
  for (uint g = l % 32; g < n_parts; g += 32) {
    sum += overlaps[(size_t)j * n_parts + g];
  }
  sum = sum_lanes<1, 32>(sum);
  if (l % 32 == 0) {
    factors[j] = sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
float along = factors[2 * count];
for (uint j = 0; j < count; j++) {
  along = fma(-factors[j], factors[count + j], along);
}
const size_t stride = (size_t)basis_shape[1] * WIDTH;
float acc_x = 0.0f;
float acc_z = 0.0f;
if (l * 4 < WIDTH) {
  for (uint p = group; p < uint(basis_shape[0]); p += G) {
    const size_t at = (size_t)p * WIDTH + l * 4;
    float4 of_x = load4<float>(x + at);
    float4 of_z = load4<float>(z + at);
    for (uint j = 0; j < count; j++) {
      const float4 column = load4<float>(basis + p * stride + j * WIDTH + l * 4);
      of_x = fma(float4(-factors[j]), column, of_x);
      of_z = fma(float4(-factors[count + j]), column, of_z);
    }
    of_z = fma(float4(-along), of_x, of_z);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      acc_x = fma(of_x[e], of_x[e], acc_x);
      acc_z = fma(of_z[e], of_z[e], acc_z);
      out[at + e] = of_x[e];
      last[at + e] = of_z[e];
    }
  }
}
acc_x = sum_group<THREADS>(acc_x, sums, l);
acc_z = sum_group<THREADS>(acc_z, sums, l);
if (l == 0) {
  parts[group] = acc_x;
  of_last[group] = acc_z;
}
