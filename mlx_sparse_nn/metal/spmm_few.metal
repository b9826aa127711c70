// The product of spmm_tiles.metal for few rows of x, which is bound by reading the stored values.
//
// Inputs, output: as there.
// Launch
//   (n_rows / STRIP 32 GROUPS, ceil(N / ROWS), V) threads in groups of (32 GROUPS, 1, 1), STRIP =
//   min(B, 16). One group owns STRIP outputs of a block-row and ROWS rows of x. Its simdgroups take
//   the blocks of the block-row in turn.
// Template
//   T float, half or bfloat; B 8, 16, 32, 64 or 128; INSIDE columns of the last block-column, 1 to
//   B; ROWS of x, 1 to 8; GROUPS simdgroups; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: each lane its blocks in stored order and k ascending, then over lanes, then over
// simdgroups, then the bias.

#include "common.h"

constexpr int STRIP = B < 16 ? B : 16;
constexpr int STRIPS = B / STRIP;
threadgroup float partial[GROUPS * ROWS * STRIP];

const int r = threadgroup_position_in_grid.x / STRIPS;
const int o0 = threadgroup_position_in_grid.x % STRIPS * STRIP;
const int n0 = threadgroup_position_in_grid.y * ROWS;
const int v = threadgroup_position_in_grid.z;
const int thread_index = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int simd_group = simdgroup_index_in_threadgroup;
const int N = x_shape[x_ndim - 2];
const int n_cols = x_shape[x_ndim - 1];
const int n_rows = (indptr_shape[0] - 1) * B;
const int n_inside = n_cols - B + INSIDE;
const int n_valid = min(ROWS, N - n0);

const device T* x_rows = x + ((size_t)v * N + n0) * n_cols;
const device T* blocks = data + (size_t)v * indices_shape[0] * (B * B);
threadgroup float* mine = partial + simd_group * (ROWS * STRIP);
const int begin = indptr[r];
const int end = indptr[r + 1];

if (TRANSPOSED) {
  // A lane has 4 neighbouring outputs, ACROSS lanes those of the strip. ALONG lanes go along k.
  // Where lanes are left, AT_ONCE blocks are read at once.
  constexpr int ACROSS = STRIP / 4;
  constexpr int ALONG = 32 / ACROSS < B ? 32 / ACROSS : B;
  constexpr int AT_ONCE = 32 / (ACROSS * ALONG);
  const int o = lane % ACROSS * 4;
  const int k = lane / ACROSS % ALONG;
  float4 acc[ROWS];
#pragma unroll
  for (int n = 0; n < ROWS; n++) {
    acc[n] = float4(0.0f);
  }
  for (int j = begin + simd_group * AT_ONCE + lane / (ACROSS * ALONG); j < end;
       j += GROUPS * AT_ONCE) {
    const device T* block = blocks + (size_t)perm[j] * (B * B) + o0 + o;
    const device T* x_block = x_rows + indices[j] * B;
#pragma unroll
    for (int k0 = 0; k0 < B; k0 += ALONG) {
      const bool inside = INSIDE == B || indices[j] * B + k0 + k < n_inside;
      const float4 w = inside ? float4(load4<T>(block + (k0 + k) * B)) : float4(0.0f);
#pragma unroll
      for (int n = 0; n < ROWS; n++) {
        if (n < n_valid) {
          acc[n] = fma(w, float4(float(x_block[(size_t)n * n_cols + k0 + k])), acc[n]);
        }
      }
    }
  }
#pragma unroll
  for (int n = 0; n < ROWS; n++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float sum = sum_lanes<ACROSS, 32>(acc[n][i]);
      if (lane < ACROSS) {
        mine[n * STRIP + o + i] = sum;
      }
    }
  }
} else {
  // A lane has 4 neighbouring k, ACROSS lanes those of the block. ALONG lanes go along the outputs.
  // Where lanes are left, AT_ONCE blocks are read at once.
  constexpr int ACROSS = B / 4;
  constexpr int ALONG = 32 / ACROSS < STRIP ? 32 / ACROSS : STRIP;
  constexpr int AT_ONCE = 32 / (ACROSS * ALONG);
  constexpr int PASSES = STRIP / ALONG;
  const int k = lane % ACROSS * 4;
  const int o = lane / ACROSS % ALONG;
  float acc[PASSES][ROWS];
#pragma unroll
  for (int p = 0; p < PASSES; p++) {
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
      acc[p][n] = 0.0f;
    }
  }
  for (int j = begin + simd_group * AT_ONCE + lane / (ACROSS * ALONG); j < end;
       j += GROUPS * AT_ONCE) {
    const device T* block = blocks + (size_t)j * (B * B) + (o0 + o) * B + k;
    const device T* x_block = x_rows + indices[j] * B + k;
    float4 xs[ROWS];
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
      xs[n] = n < n_valid ? float4(load4<T>(x_block + (size_t)n * n_cols)) : float4(0.0f);
    }
#pragma unroll
    for (int p = 0; p < PASSES; p++) {
      float4 w = float4(load4<T>(block + p * ALONG * B));
      if (INSIDE < B) {
        w = cut4(w, n_inside - indices[j] * B - k);
      }
#pragma unroll
      for (int n = 0; n < ROWS; n++) {
        acc[p][n] += dot(w, xs[n]);
      }
    }
  }
#pragma unroll
  for (int p = 0; p < PASSES; p++) {
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
      const float sum = sum_lanes<1, ACROSS>(sum_lanes<ACROSS * ALONG, 32>(acc[p][n]));
      if (k == 0 && lane < ACROSS * ALONG) {
        mine[n * STRIP + p * ALONG + o] = sum;
      }
    }
  }
}

threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = thread_index; i < n_valid * STRIP; i += 32 * GROUPS) {
  const int row = r * B + o0 + i % STRIP;
  float sum = partial[i];
  for (int other = 1; other < GROUPS; other++) {
    sum += partial[other * (ROWS * STRIP) + i];
  }
  if (BIAS) {
    sum += float(bias[row]);
  }
  y[((size_t)v * N + n0 + i / STRIP) * n_rows + row] = T(sum);
}
