// The product of sddmm_csr.cu for scalars of a large graph: every stored value by itself, whatever
// the lengths of the rows.
//
// Inputs
//   y        (V, n_rows, N)
//   x        (V, n_cols, N)
//   rows     (n_blocks), the row of each stored value
//   indices  (n_blocks)
// Output
//   out      (V, n_blocks)
// Launch
//   (ceil(n_blocks / (256 / GROUP AT_ONCE)) 256, 1, V) threads in groups of (256, 1, 1). GROUP
//   neighbouring threads have AT_ONCE stored values, each thread VEC neighbouring n of every
//   GROUP VEC.
// Template
//   T float, half or bfloat16; GROUP and VEC powers of two, VEC a divisor of N and GROUP at most
//   32; AT_ONCE.
// Sums in float32: each thread its n, ascending, then over threads.

#include "gather.h"
#include "sums.h"

constexpr int GROUPS = 256 / GROUP;

const int n_blocks = indices_shape[0];
const int v = blockIdx.z;
const int N = x_shape[x_ndim - 1];
const int lane = threadIdx.x % GROUP;
const size_t j0 = (size_t)blockIdx.x * (GROUPS * AT_ONCE) + threadIdx.x / GROUP;
const T* yv = y + (size_t)v * y_shape[y_ndim - 2] * N;
const T* xv = x + (size_t)v * x_shape[x_ndim - 2] * N;
const bool aligned = ((size_t)yv | (size_t)xv) % (VEC * sizeof(T)) == 0;

int row[AT_ONCE];
int col[AT_ONCE];
float acc[AT_ONCE];
#pragma unroll
for (int a = 0; a < AT_ONCE; a++) {
  const size_t j = min(j0 + GROUPS * a, (size_t)n_blocks - 1);
  row[a] = __ldcs(rows + j);
  col[a] = __ldcs(indices + j);
  acc[a] = 0.0f;
}
for (int n = lane * VEC; n < N; n += GROUP * VEC) {
  float xs[AT_ONCE][VEC];
  float ys[AT_ONCE][VEC];
#pragma unroll
  for (int a = 0; a < AT_ONCE; a++) {
    load_values(xs[a], xv + (size_t)col[a] * N + n, aligned);
    load_values(ys[a], yv + (size_t)row[a] * N + n, aligned);
  }
#pragma unroll
  for (int a = 0; a < AT_ONCE; a++) {
#pragma unroll
    for (int e = 0; e < VEC; e++) {
      acc[a] = fmaf(ys[a][e], xs[a][e], acc[a]);
    }
  }
}
#pragma unroll
for (int a = 0; a < AT_ONCE; a++) {
  acc[a] = sum_lanes<1, GROUP>(acc[a]);
  if (lane == 0 && j0 + GROUPS * a < n_blocks) {
    out[(size_t)v * n_blocks + j0 + GROUPS * a] = T(acc[a]);
  }
}
