// The product of spmm_csr.cu for scalars of a large graph, and few rows of x. Whatever the lengths
// of the rows, each thread asks for many places of x at once: the products of a tile of A go to
// shared memory, and are summed there row by row.
//
// Inputs
//   data, indptr, indices, perm, bias: as there, B = 1
//   x        (V, n_cols, N)
//   partial  (V, n_pieces, N) float32, what spmm_pieces.cu gave; unread where no row is long
//   tiles    (n_tiles, 6): first row, rows, first value, values; and of the last row, if it is long
//            and its values are not among these, its first piece and the end of its pieces
// Output
//   y        (V, n_rows, N)
// Launch
//   (n_tiles 256, 1, V) threads in groups of (256, 1, 1). One group owns a tile: 256 rows at most.
// Template
//   T float, half or bfloat16; N, 1 to 3; HELD values at most in a tile, a multiple of 32;
//   TRANSPOSED and BIAS 0 or 1.
// Sums in float32: a row of up to SERIAL values in stored order, others each lane its values or
// pieces, then over lanes; then the bias.

#include "gather.h"
#include "sums.h"

constexpr int SERIAL = 16;
constexpr int AT_ONCE = N == 1 ? 4 : 8;
__shared__ float products[N][HELD / 32 * 33];  // one place in 33 is empty: rows begin in many banks

const int* tile = tiles + blockIdx.x * 6;
const int begin = tile[2];
const int count = tile[3];
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int n_rows = indptr_shape[0] - 1;
const bool is_row = thread < tile[1];
const int row = tile[0] + thread;
const int row_begin = is_row ? indptr[row] - begin : 0;
const int length = is_row ? indptr[row + 1] - begin - row_begin : 0;
const T* xv = x + (size_t)v * x_shape[x_ndim - 2] * N;
const T* values = data + (size_t)v * indices_shape[0];
const bool aligned = (size_t)xv % (N * sizeof(T)) == 0;

for (int i0 = thread; i0 - thread < count; i0 += 256 * AT_ONCE) {
  int cols[AT_ONCE];
  float w[AT_ONCE];
  float xs[AT_ONCE][N];
#pragma unroll
  for (int a = 0; a < AT_ONCE; a++) {
    const int j = begin + min(i0 + 256 * a, count - 1);
    cols[a] = __ldcs(indices + j);
    w[a] = float(TRANSPOSED ? values[__ldcs(perm + j)] : __ldcs(values + j));
  }
#pragma unroll
  for (int a = 0; a < AT_ONCE; a++) {
    load_values(xs[a], xv + (size_t)cols[a] * N, aligned);
  }
#pragma unroll
  for (int a = 0; a < AT_ONCE; a++) {
    const int i = i0 + 256 * a;
    if (i < count) {
#pragma unroll
      for (int n = 0; n < N; n++) {
        products[n][i + i / 32] = w[a] * xs[a][n];
      }
    }
  }
}
__syncthreads();

float acc[N];
#pragma unroll
for (int n = 0; n < N; n++) {
  acc[n] = 0.0f;
}
if (length <= SERIAL) {
  for (int i = row_begin; i < row_begin + length; i++) {
#pragma unroll
    for (int n = 0; n < N; n++) {
      acc[n] += products[n][i + i / 32];
    }
  }
}
// The warp takes the others together, one by one.
for (unsigned left = __ballot_sync(0xffffffffu, length > SERIAL); left != 0; left &= left - 1) {
  const int owner = __ffs(left) - 1;
  const int first = __shfl_sync(0xffffffffu, row_begin, owner);
  const int stop = first + __shfl_sync(0xffffffffu, length, owner);
  float sum[N];
#pragma unroll
  for (int n = 0; n < N; n++) {
    sum[n] = 0.0f;
  }
  if (stop > count) {
    const int n_pieces = partial_shape[partial_ndim - 2];
    for (int p = tile[4] + lane; p < tile[5]; p += 32) {
#pragma unroll
      for (int n = 0; n < N; n++) {
        sum[n] += partial[((size_t)v * n_pieces + p) * N + n];
      }
    }
  } else {
#pragma unroll 4
    for (int i = first + lane; i < stop; i += 32) {
#pragma unroll
      for (int n = 0; n < N; n++) {
        sum[n] += products[n][i + i / 32];
      }
    }
  }
#pragma unroll
  for (int n = 0; n < N; n++) {
    sum[n] = sum_lanes<1, 32>(sum[n]);
    acc[n] = lane == owner ? sum[n] : acc[n];
  }
}
if (is_row) {
  const float bias_row = BIAS ? float(bias[row]) : 0.0f;
#pragma unroll
  for (int n = 0; n < N; n++) {
    y[((size_t)v * n_rows + row) * N + n] = T(acc[n] + bias_row);
  }
}
