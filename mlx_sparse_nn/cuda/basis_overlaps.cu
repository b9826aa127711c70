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
// Sums in float32: each thread its places, ascending, then over lanes and warps.

#include "packs.h"
#include "sums.h"
#include "vectors.h"

const int count = counts[0];
const int first = blockIdx.y * ROWS;
const size_t stride = (size_t)basis_shape[1] * WIDTH;
float acc[2 * ROWS + 1] = {};
if (threadIdx.x * 4 < WIDTH) {
  for (int p = blockIdx.x; p < basis_shape[0]; p += gridDim.x) {
    const size_t at = (size_t)p * WIDTH + threadIdx.x * 4;
    const Four of_x = load_four(x + at);
    const Four of_z = load_four(z + at);
    Four columns[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const int j = max(min(first + r, count - 1), 0);
      columns[r] = load_four(basis + p * stride + j * WIDTH + threadIdx.x * 4);
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        acc[r] = fmaf(columns[r].elements[e], of_x.elements[e], acc[r]);
        acc[ROWS + r] = fmaf(columns[r].elements[e], of_z.elements[e], acc[ROWS + r]);
      }
    }
#pragma unroll
    for (int e = 0; e < 4; e++) {
      acc[2 * ROWS] = fmaf(of_x.elements[e], of_z.elements[e], acc[2 * ROWS]);
    }
  }
}
__shared__ float sums[2 * ROWS + 1][THREADS / 32];
#pragma unroll
for (int r = 0; r <= 2 * ROWS; r++) {
  const float sum = sum_lanes<1, 32>(acc[r]);
  if (threadIdx.x % 32 == 0) {
    sums[r][threadIdx.x / 32] = sum;
  }
}
__syncthreads();
if (threadIdx.x <= 2 * ROWS) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) {
    sum += sums[threadIdx.x][w];
  }
  const int j = first + threadIdx.x % ROWS;
  if (threadIdx.x < 2 * ROWS && j < count) {
    out[(size_t)(threadIdx.x / ROWS * count + j) * gridDim.x + blockIdx.x] = sum;
  }
  if (threadIdx.x == 2 * ROWS && first == 0) {
    out[(size_t)(2 * count) * gridDim.x + blockIdx.x] = sum;
  }
}
