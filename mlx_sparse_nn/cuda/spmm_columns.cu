// The product of spmm_csr.cu for scalars of a large graph, and several rows of x. The columns and
// values of a tile of A go to shared memory, whatever the lengths of the rows: then a row waits
// for x alone.
//
// Inputs, output: as in spmm_gathered.cu.
// Launch
//   (n_tiles 256, ceil(N / (GROUP VEC CHUNKS)), V) threads in groups of (256, 1, 1). One group owns
//   a tile. GROUP neighbouring threads take its rows in turn: VEC columns of x each, CHUNKS times.
// Template
//   T float, half or bfloat16; GROUP and VEC powers of two, VEC a divisor of N and GROUP at most
//   32; CHUNKS 1, 2 or 4; HELD values at most in a tile; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: each row its values in stored order, or its pieces; then the bias.

#include "gather.h"

constexpr int AT_ONCE = 8 / CHUNKS;
constexpr int GROUPS = 256 / GROUP;
__shared__ int cols[HELD];
__shared__ float values[HELD];
__shared__ int begins[257];  // of the rows, among these values

const int* tile = tiles + blockIdx.x * 6;
const int row0 = tile[0];
const int rows = tile[1];
const int begin = tile[2];
const int count = tile[3];
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int n_rows = indptr_shape[0] - 1;
const int N = x_shape[x_ndim - 1];
const int n0 = blockIdx.y * (GROUP * VEC * CHUNKS) + thread % GROUP * VEC;
const T* xv = x + (size_t)v * x_shape[x_ndim - 2] * N;
const T* stored = data + (size_t)v * indices_shape[0];
const bool aligned = (size_t)xv % (VEC * sizeof(T)) == 0;

for (int k = thread; k <= rows; k += 256) {
  begins[k] = indptr[row0 + k] - begin;
}
#pragma unroll 4
for (int i = thread; i < count; i += 256) {
  cols[i] = __ldcs(indices + begin + i);
  values[i] = float(TRANSPOSED ? stored[__ldcs(perm + begin + i)] : __ldcs(stored + begin + i));
}
__syncthreads();

for (int k = thread / GROUP; k < rows; k += GROUPS) {
  const int stop = begins[k + 1];
  float acc[CHUNKS][VEC] = {};
  if (stop > count) {
    const int n_pieces = partial_shape[partial_ndim - 2];
#pragma unroll 8
    for (int p = tile[4]; p < tile[5]; p++) {
      const auto* sums = partial + ((size_t)v * n_pieces + p) * N;
#pragma unroll
      for (int h = 0; h < CHUNKS; h++) {
#pragma unroll
        for (int e = 0; e < VEC; e++) {
          acc[h][e] += float(sums[min(n0 + h * GROUP * VEC, N - VEC) + e]);
        }
      }
    }
  } else {
    for (int i = begins[k]; i < stop; i += AT_ONCE) {
      float xs[AT_ONCE][CHUNKS][VEC];
#pragma unroll
      for (int a = 0; a < AT_ONCE; a++) {
        const T* x_row = xv + (size_t)cols[min(i + a, stop - 1)] * N;
#pragma unroll
        for (int h = 0; h < CHUNKS; h++) {
          load_values(xs[a][h], x_row + min(n0 + h * GROUP * VEC, N - VEC), aligned);
        }
      }
#pragma unroll
      for (int a = 0; a < AT_ONCE; a++) {
        if (i + a < stop) {
          const float w = values[i + a];
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
  }
  const float bias_row = BIAS ? float(bias[row0 + k]) : 0.0f;
#pragma unroll
  for (int h = 0; h < CHUNKS; h++) {
    const int n = n0 + h * GROUP * VEC;
    Pack<T, VEC> pack;
#pragma unroll
    for (int e = 0; e < VEC; e++) {
      pack.at[e] = T(acc[h][e] + bias_row);
    }
    if (n < N) {
      *reinterpret_cast<Pack<T, VEC>*>(y + ((size_t)v * n_rows + row0 + k) * N + n) = pack;
    }
  }
}
