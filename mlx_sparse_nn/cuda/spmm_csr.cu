// The product of spmm_tiles.cu for scalars (B = 1), for float32, and for block sizes without tiles.
//
// Inputs, output: as there, B any.
// Launch
//   (ceil(R B LANES / 256) 256, ceil(N / ROWS), V) threads in blocks of 256. LANES neighbouring
//   threads own one output and ROWS rows of x; they share its stored values in turn.
// Template
//   T float, half or bfloat16; B; ROWS of x; LANES 1 to 256, a power of two; TRANSPOSED and BIAS
//   0 or 1.
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
const int C = x_shape[x_ndim - 1];
const int out = (indptr_shape[0] - 1) * B;
const int rows = min(ROWS, N - n0);

const T* x_rows = x + ((size_t)v * N + n0) * C;
const T* blocks = data + (size_t)v * indices_shape[0] * (B * B);
float acc[ROWS];
#pragma unroll
for (int n = 0; n < ROWS; n++) {
  acc[n] = 0.0f;
}
if (row < out) {
  const int o = row % B;
  const int begin = indptr[row / B];
  const int values = (indptr[row / B + 1] - begin) * B;
  for (int e = lane; e < values; e += LANES) {
    const int j = begin + e / B;
    const int k = e % B;
    const size_t place =
        TRANSPOSED ? ((size_t)perm[j] * B + k) * B + o : ((size_t)j * B + o) * B + k;
    const float w = float(blocks[place]);
    const int col = indices[j] * B + k;
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
      if (n < rows) {
        acc[n] = fmaf(w, float(x_rows[(size_t)n * C + col]), acc[n]);
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
      for (int w = 1; w < LANES / 32; w++) {
        acc[n] += partial[(thread / 32 + w) * ROWS + n];
      }
    }
  }
}
if (lane == 0 && row < out) {
  const float b = BIAS ? float(bias[row]) : 0.0f;
  for (int n = 0; n < rows; n++) {
    y[((size_t)v * N + n0 + n) * out + row] = T(acc[n] + b);
  }
}
