// The product of spmm_csr.cu for scalars, one row of x, and short rows: a sparse matrix times a
// vector. Values and indices are copied to shared memory in stored order, whatever the lengths of
// the rows. Then neighbouring threads walk neighbouring rows: in matrices such as the Ising
// Hamiltonian, these ask for neighbouring places of x at the same time.
//
// A matrix of few diagonals takes a byte a value in place of its column: which diagonal it is on.
//
// Inputs, output: as there with B = 1 and N = 1. No TRANSPOSED. By DIAGONALS,
//   indices  (n_blocks) uint8, the diagonal of each value
//   perm     (D) int32, D at most 256: column less row of each diagonal
// Launch
//   (ceil(R / ROWS) ROWS, 1, V) threads in groups of (ROWS, 1, 1). One group owns ROWS rows of A.
// Template
//   T float, half or bfloat16; INDEX, int, or unsigned char by DIAGONALS; ROWS of A; HELD values at
//   a time, a multiple of 16; DIAGONALS and BIAS 0 or 1.
// Sums in float32: each row its values in stored order, then the bias.

#include "copies.h"

constexpr int CHUNK = 16 / sizeof(INDEX);
__shared__ __align__(16) INDEX cols[HELD];
__shared__ __align__(16) T values[HELD];
__shared__ int ahead[DIAGONALS ? 256 : 1];

const int R = indptr_shape[0] - 1;
const int r0 = blockIdx.x * ROWS;
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int r = min(r0 + thread, R - 1);
const int row_begin = indptr[r];
const int row_end = indptr[r + 1];
const int begin = indptr[r0];
const int end = indptr[min(r0 + ROWS, R)];
const T* stored = data + (size_t)v * indices_shape[0];
const T* xv = x + (size_t)v * x_shape[x_ndim - 1];
const bool values_aligned = (size_t)stored % 16 == 0;
const bool cols_aligned = (size_t)indices % 16 == 0;

if (DIAGONALS) {
  for (int i = thread; i < perm_shape[0]; i += ROWS) {
    ahead[i] = perm[i];
  }
}
float acc = 0.0f;
for (int j0 = begin / 16 * 16; j0 < end; j0 += HELD) {
  const int count = min(HELD, end - j0);
#pragma unroll
  for (int i = 0; i < HELD; i += CHUNK * ROWS) {
    copy_some(cols, indices + j0, i + CHUNK * thread, count, cols_aligned);
  }
#pragma unroll
  for (int i = 0; i < HELD; i += 16 / sizeof(T) * ROWS) {
    copy_some(values, stored + j0, i + 16 / (int)sizeof(T) * thread, count, values_aligned);
  }
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  const int stop = min(row_end, j0 + count) - j0;
#pragma unroll 8
  for (int i = max(row_begin, j0) - j0; i < stop; i++) {
    const int col = DIAGONALS ? r + ahead[cols[i]] : cols[i];
    acc = fmaf(float(values[i]), float(xv[col]), acc);
  }
  __syncthreads();
}
if (r0 + thread < R) {
  y[(size_t)v * R + r] = T(acc + (BIAS ? float(bias[r]) : 0.0f));
}
