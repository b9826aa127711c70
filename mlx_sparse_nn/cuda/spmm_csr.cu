// The product of spmm_tiles.cu for scalars (B = 1), for float32, and for block sizes without tiles.
//
// Inputs, output: as there, B any.
// Launch
//   (ceil(n_rows LANES / 256) 256, ceil(N / ROWS), V) threads in groups of (256, 1, 1). LANES
//   neighbouring threads own one scalar row and ROWS rows of x. They take its stored values in
//   turn.
// Template
//   T float, half or bfloat16; B; INSIDE columns of the last block-column, 1 to B; ROWS of x; LANES
//   1 to 256, a power of two; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: each lane its values in stored order, then over lanes, then over warps, then the
// bias.

#include "sums.h"

constexpr int WARP_LANES = LANES < 32 ? LANES : 32;
__shared__ float partial[8 * ROWS];

const int thread = threadIdx.x;
const size_t position = (size_t)blockIdx.x * 256 + thread;
const int row = position / LANES;
const int lane = position % LANES;
const int n0 = blockIdx.y * ROWS;
const int v = blockIdx.z;
const int N = x_shape[x_ndim - 2];
const int n_cols = x_shape[x_ndim - 1];
const int n_rows = (indptr_shape[0] - 1) * B;
const int n_inside = n_cols - B + INSIDE;
const int n_valid = min(ROWS, N - n0);

const T* x_rows = x + ((size_t)v * N + n0) * n_cols;
const T* blocks = data + (size_t)v * indices_shape[0] * (B * B);
float acc[ROWS];
#pragma unroll
for (int n = 0; n < ROWS; n++) {
  acc[n] = 0.0f;
}
if (row < n_rows) {
  const int o = row % B;
  const int begin = indptr[row / B];
  const int n_values = (indptr[row / B + 1] - begin) * B;
  for (int e = lane; e < n_values; e += LANES) {
    const int j = begin + e / B;
    const int k = e % B;
    const size_t place =
        TRANSPOSED ? ((size_t)perm[j] * B + k) * B + o : ((size_t)j * B + o) * B + k;
    float w = float(blocks[place]);
    const int col = indices[j] * B + k;
    if (INSIDE < B && col >= n_inside) {
      w = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
      if (n < n_valid) {
        acc[n] = fmaf(w, float(x_rows[(size_t)n * n_cols + col]), acc[n]);
      }
    }
  }
}
#pragma unroll
for (int n = 0; n < ROWS; n++) {
  acc[n] = sum_lanes<WARP_LANES>(acc[n]);
}
if (LANES > 32) {
  if (thread % 32 == 0) {
    for (int n = 0; n < ROWS; n++) {
      partial[thread / 32 * ROWS + n] = acc[n];
    }
  }
  __syncthreads();
  if (lane == 0) {
    for (int n = 0; n < ROWS; n++) {
      for (int other = 1; other < LANES / 32; other++) {
        acc[n] += partial[(thread / 32 + other) * ROWS + n];
      }
    }
  }
}
if (lane == 0 && row < n_rows) {
  const float bias_row = BIAS ? float(bias[row]) : 0.0f;
  for (int n = 0; n < n_valid; n++) {
    y[((size_t)v * N + n0 + n) * n_rows + row] = T(acc[n] + bias_row);
  }
}
