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

#include "packs.h"
#include "sums.h"
#include "vectors.h"

const int R = factors_shape[0];
const int M = factors_shape[1];
const int r0 = blockIdx.y * ROWS;
if (threadIdx.x * 4 < WIDTH) {
  const size_t at = threadIdx.x * 4;
  const float* columns = basis + ((size_t)blockIdx.x * basis_shape[1] + counts[0]) * WIDTH + at;
  Four acc[ROWS] = {};
#pragma unroll 4
  for (int j = 0; j < M; j++) {
    const Four column = load_four(columns + (size_t)j * WIDTH);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float factor = factors[min(r0 + r, R - 1) * M + j];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        acc[r].elements[e] = fmaf(factor, column.elements[e], acc[r].elements[e]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (r0 + r < R) {
      store_four(out + ((size_t)blockIdx.x * R + r0 + r) * WIDTH + at, acc[r]);
    }
  }
}
