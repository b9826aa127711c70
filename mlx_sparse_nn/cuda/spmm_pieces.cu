// The first launch of spmm_gathered.cu and spmm_columns.cu where some row is long: sums over pieces
// of long rows.
//
// Inputs
//   data, indices, perm, x: as there
//   tiles    (n_pieces, 2): first value of each, values
// Output
//   y        (V, n_pieces, N) float32
// Launch
//   (n_pieces 256, ceil(N / (GROUP VEC CHUNKS)), V) threads in groups of (256, 1, 1). One group
//   owns a piece. GROUP neighbouring threads take a value together: VEC columns each, CHUNKS times.
// Template
//   T float, half or bfloat16; GROUP and VEC powers of two, VEC a divisor of N and GROUP at most
//   32; CHUNKS; PIECE values at most in a piece; TRANSPOSED 0 or 1.
// Sums in float32: each thread its values in stored order, then over the threads of a warp, then
// over warps.

#include "gather.h"
#include "sums.h"

constexpr int AT_ONCE = 8 / CHUNKS;
constexpr int GROUPS = 256 / GROUP;
constexpr int COLS = GROUP * VEC * CHUNKS;
__shared__ int cols[PIECE];
__shared__ float values[PIECE];
__shared__ float sums[8][COLS];

const int begin = tiles[2 * blockIdx.x];
const int count = tiles[2 * blockIdx.x + 1];
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int N = x_shape[x_ndim - 1];
const int n0 = blockIdx.y * COLS + thread % GROUP * VEC;
const T* xv = x + (size_t)v * x_shape[x_ndim - 2] * N;
const T* stored = data + (size_t)v * indices_shape[0];
const bool aligned = (size_t)xv % (VEC * sizeof(T)) == 0;

#pragma unroll 4
for (int i = thread; i < count; i += 256) {
  cols[i] = indices[begin + i];
  values[i] = float(stored[TRANSPOSED ? perm[begin + i] : begin + i]);
}
__syncthreads();

float acc[CHUNKS][VEC] = {};
for (int i0 = thread / GROUP; i0 < count; i0 += GROUPS * AT_ONCE) {
  float xs[AT_ONCE][CHUNKS][VEC];
#pragma unroll
  for (int a = 0; a < AT_ONCE; a++) {
    const T* x_row = xv + (size_t)cols[min(i0 + GROUPS * a, count - 1)] * N;
#pragma unroll
    for (int h = 0; h < CHUNKS; h++) {
      load_values(xs[a][h], x_row + min(n0 + h * GROUP * VEC, N - VEC), aligned);
    }
  }
#pragma unroll
  for (int a = 0; a < AT_ONCE; a++) {
    if (i0 + GROUPS * a < count) {
      const float w = values[i0 + GROUPS * a];
#pragma unroll
      for (int h = 0; h < CHUNKS; h++) {
#pragma unroll
        for (int e = 0; e < VEC; e++) {
          acc[h][e] = fmaf(w, xs[a][h][e], acc[h][e]);
        }
      }
    }
  }
}
#pragma unroll
for (int h = 0; h < CHUNKS; h++) {
#pragma unroll
  for (int e = 0; e < VEC; e++) {
    acc[h][e] = sum_lanes<GROUP, 32>(acc[h][e]);
    if (thread % 32 < GROUP) {
      sums[thread / 32][(h * GROUP + thread % GROUP) * VEC + e] = acc[h][e];
    }
  }
}
__syncthreads();
for (int col = thread; col < COLS && blockIdx.y * COLS + col < N; col += 256) {
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < 8; warp++) {
    sum += sums[warp][col];
  }
  y[((size_t)v * gridDim.x + blockIdx.x) * N + blockIdx.y * COLS + col] = sum;
}
