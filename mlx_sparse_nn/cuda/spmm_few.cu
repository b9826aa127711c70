// The product of spmm_tiles.cu for few rows of x, which is bound by reading the stored values: each
// is read once, 16 bytes at a time, straight into the registers of a tensor-core product.
//
// Inputs, output: as there. No TRANSPOSED.
// Launch
//   (n_rows / STRIP 256, ceil(N / 16), V) threads in groups of (256, 1, 1), STRIP = min(B, 16). One
//   group owns STRIP outputs of a block-row and 16 rows of x. Its warps take the stored values of a
//   scalar row in turn, 32 at a time.
// Template
//   T half or bfloat16; B 8, 16, 32, 64 or 128; INSIDE columns of the last block-column, 1 to B;
//   BIAS 0 or 1.
// Sums in float32: each warp its values in stored order, then over warps, then the bias.

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
const int n_cols = x_shape[x_ndim - 1];
const int n_rows = (indptr_shape[0] - 1) * B;
const int n_inside = n_cols - B + INSIDE;
const int lane_row = lane / 4;    // of x, and of the outputs
const int lane_e = lane % 4 * 8;  // 8 of every 32 values: both operands order k alike

const int begin = indptr[r];
const int n_values = (indptr[r + 1] - begin) * B;
const T* x_low = x + ((size_t)v * N + n0 + lane_row) * n_cols;
const T* x_high = x_low + (size_t)8 * n_cols;
const T* w_rows = data + ((size_t)v * indices_shape[0] + begin) * (B * B) + (o0 + lane_row) * B;
const bool low = n0 + lane_row < N;
const bool high = n0 + lane_row + 8 < N;
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

// The first `count` of 2 or 8 elements, and zeros behind them.
auto cut2 = [](unsigned pair, int count) {
  return count > 1 ? pair : count > 0 ? pair & 0xffff : 0;
};
auto cut8 = [&](uint4 value, int count) {
  return make_uint4(cut2(value.x, count), cut2(value.y, count - 2), cut2(value.z, count - 4),
                    cut2(value.w, count - 6));
};

float acc[TILES][4];
#pragma unroll
for (int to = 0; to < TILES; to++) {
  acc[to][0] = acc[to][1] = acc[to][2] = acc[to][3] = 0.0f;
}
#pragma unroll 2
for (int e0 = warp * 32; e0 < n_values; e0 += WARPS * 32) {
  const int e = e0 + lane_e;
  const bool stored = e < n_values;  // the last 32 may not be full where blocks are smaller
  const int b = stored ? e / B : 0;
  const int col = indices[begin + b] * B + e % B;
  const uint4 x0 = load8(x_low + col, low && stored);
  const uint4 x1 = load8(x_high + col, high && stored);
  uint4 w[TILES];
#pragma unroll
  for (int to = 0; to < TILES; to++) {
    w[to] = load8(w_rows + (size_t)b * (B * B) + to * 8 * B + e % B, stored);
    if (INSIDE < B) {
      w[to] = cut8(w[to], n_inside - col);
    }
  }
#pragma unroll
  for (int to = 0; to < TILES; to++) {
    multiply<T>(acc[to], x0.x, x1.x, x0.y, x1.y, w[to].x, w[to].y);
    multiply<T>(acc[to], x0.z, x1.z, x0.w, x1.w, w[to].z, w[to].w);
  }
}
#pragma unroll
for (int to = 0; to < TILES; to++) {
  const int o = 8 * to + lane % 4 * 2;
  partial[warp][lane_row][o] = acc[to][0];
  partial[warp][lane_row][o + 1] = acc[to][1];
  partial[warp][lane_row + 8][o] = acc[to][2];
  partial[warp][lane_row + 8][o + 1] = acc[to][3];
}
__syncthreads();
const int n_valid = min(16, N - n0);
for (int i = threadIdx.x; i < n_valid * STRIP; i += 32 * WARPS) {
  const int n = i / STRIP;
  const int o = i % STRIP;
  float sum = 0.0f;
#pragma unroll
  for (int other = 0; other < WARPS; other++) {
    sum += partial[other][n][o];
  }
  if (BIAS) {
    sum += float(bias[r * B + o0 + o]);
  }
  y[((size_t)v * N + n0 + n) * n_rows + r * B + o0 + o] = T(sum);
}
