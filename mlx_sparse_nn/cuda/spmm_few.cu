// The product of spmm_tiles.cu for at most 16 rows of x, which is bound by reading the stored
// values: each is read once, 16 bytes at a time, straight into the registers of a tensor-core
// product.
//
// Inputs, output: as there. No TRANSPOSED.
// Launch
//   (R B / STRIP 256, ceil(N / 16), V) threads in blocks of 256. One thread block owns STRIP =
//   min(16, B) outputs of a block-row and 16 rows of x; its warps share the k of the row in turn.
// Template
//   T half or bfloat16; B 8 to 128; BIAS 0 or 1.
// Sums in float32: each warp its own parts of the row in order, then over warps, then the bias.

#include "mma.h"

constexpr int WARPS = 8;
constexpr int STRIP = B < 16 ? B : 16;
constexpr int STRIPS = B / STRIP;
constexpr int TILES = STRIP / 8;
__shared__ float partial[WARPS][16][STRIP + 1];

const int r = blockIdx.x / STRIPS;
const int o0 = blockIdx.x % STRIPS * STRIP;
const int n0 = blockIdx.y * 16;
const int v = blockIdx.z;
const int lane = threadIdx.x % 32;
const int warp = threadIdx.x / 32;
const int N = x_shape[x_ndim - 2];
const int C = x_shape[x_ndim - 1];
const int out = (indptr_shape[0] - 1) * B;
const int g = lane / 4;      // row of x, and output, of this lane
const int t = lane % 4 * 8;  // its 8 of every 32 k: slots of a product in any order, on both sides

const int begin = indptr[r];
const int width = (indptr[r + 1] - begin) * B;
const T* x_low = x + ((size_t)v * N + n0 + g) * C;
const T* x_high = x_low + (size_t)8 * C;
const T* w_rows = data + ((size_t)v * indices_shape[0] + begin) * (B * B) + (o0 + g) * B;
const bool low = n0 + g < N;
const bool high = n0 + g + 8 < N;
const bool aligned = ((size_t)x | (size_t)data) % 16 == 0;

auto load8 = [&](const T* p, bool valid) {
  uint4 value = make_uint4(0, 0, 0, 0);
  if (valid && aligned) {
    value = *reinterpret_cast<const uint4*>(p);
  } else if (valid) {
    T* elements = reinterpret_cast<T*>(&value);
    for (int i = 0; i < 8; i++) {
      elements[i] = p[i];
    }
  }
  return value;
};

float acc[TILES][4];
#pragma unroll
for (int o = 0; o < TILES; o++) {
  acc[o][0] = acc[o][1] = acc[o][2] = acc[o][3] = 0.0f;
}
#pragma unroll 2
for (int first = warp * 32; first < width; first += WARPS * 32) {
  const int k = first + t;
  const bool stored = k < width;  // the last 32 may not be full where blocks are smaller
  const int j = stored ? k / B : 0;
  const int col = indices[begin + j] * B + k % B;
  const uint4 a = load8(x_low + col, low && stored);
  const uint4 b = load8(x_high + col, high && stored);
  uint4 w[TILES];
#pragma unroll
  for (int o = 0; o < TILES; o++) {
    w[o] = load8(w_rows + (size_t)j * (B * B) + o * 8 * B + k % B, stored);
  }
#pragma unroll
  for (int o = 0; o < TILES; o++) {
    multiply<T>(acc[o], a.x, b.x, a.y, b.y, w[o].x, w[o].y);
    multiply<T>(acc[o], a.z, b.z, a.w, b.w, w[o].z, w[o].w);
  }
}
#pragma unroll
for (int o = 0; o < TILES; o++) {
  const int col = 8 * o + lane % 4 * 2;
  partial[warp][g][col] = acc[o][0];
  partial[warp][g][col + 1] = acc[o][1];
  partial[warp][g + 8][col] = acc[o][2];
  partial[warp][g + 8][col + 1] = acc[o][3];
}
__syncthreads();
const int rows = min(16, N - n0);
for (int i = threadIdx.x; i < rows * STRIP; i += 32 * WARPS) {
  const int n = i / STRIP;
  const int o = i % STRIP;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; w++) {
    sum += partial[w][n][o];
  }
  if (BIAS) {
    sum += float(bias[r * B + o0 + o]);
  }
  y[((size_t)v * N + n0 + n) * out + r * B + o0 + o] = T(sum);
}
