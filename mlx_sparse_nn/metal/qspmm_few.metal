// y[v, n, r B + o] = bias[r B + o] + sum of W_j[o, k] x[v, n, indices[j] B + k] over the blocks j
// of block-row r and k < B, for up to 4 rows of x: bound by reading the packed values. W_j is what
// packed[v, j], scales[v, j] and biases[v, j] stand for, or its transpose, j being perm[j] then.
//
// Inputs
//   packed   (V, n_blocks, B, B BITS / 32) uint32
//   scales   (V, n_blocks, B, B / GROUP_SIZE) T, biases likewise
//   indptr   (R + 1) int32, indices (n_blocks) int32
//   perm     (n_blocks) int32; not read unless TRANSPOSED
//   x        (V, N, n_cols) T
//   bias     (n_rows) T; not read unless BIAS
// Output
//   y        (V, N, n_rows) T
// Launch
//   (n_rows / STRIP 32 GROUPS, ceil(N / ROWS), V) threads in groups of (32 GROUPS, 1, 1). One group
//   owns STRIP outputs of a block-row and ROWS rows of x. Its simdgroups take pieces of the blocks
//   in turn.
// Template
//   T float, half or bfloat; BITS 2, 3, 4, 5, 6 or 8; GROUP_SIZE 32, 64 or 128; B a multiple of 32
//   and of GROUP_SIZE; INSIDE columns of the last block-column, 1 to B; STRIP 32 outputs,
//   GROUP_SIZE if TRANSPOSED, so that no scale is read twice; ROWS of x, 1 to 4; GROUPS simdgroups;
//   TRANSPOSED and BIAS 0 or 1.
// Sums in float32 of values in float32: each lane its pieces in stored order and k ascending, then
// over lanes, then over simdgroups, then the bias.

#include "common.h"
#include "quantized.h"

typedef typename Packing<BITS>::pack Pack;

constexpr int STRIPS = B / STRIP;
constexpr int WORDS = B * BITS / 32;    // of a stored row
constexpr int SCALES = B / GROUP_SIZE;  // of a stored row
constexpr int ACROSS = STRIP / 8;       // TRANSPOSED: lanes along the outputs, 8 each
constexpr int DEPTH = 128 / ACROSS;     // and stored rows of a piece, 4 a lane
constexpr int PIECES = TRANSPOSED ? B / DEPTH : SCALES;  // of a block
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
const int begin = indptr[r];
const int n_pieces = (indptr[r + 1] - begin) * PIECES;
const size_t first = (size_t)v * indices_shape[0];  // stored block of this matrix

// Rows past the last one repeat it, and are never stored.
const device T* x_rows = x + ((size_t)v * N + n0) * n_cols;
int x_at[ROWS];
#pragma unroll
for (int n = 0; n < ROWS; n++) {
  x_at[n] = min(n, N - 1 - n0) * n_cols;
}
threadgroup float* mine = partial + simd_group * (ROWS * STRIP);

if (TRANSPOSED) {
  // A piece is DEPTH stored rows of the strip. A lane has a pack of outputs in 4 of them.
  const int o = lane % ACROSS * 8;
  const int k = lane / ACROSS * 4;
  float acc[ROWS][8];
#pragma unroll
  for (int n = 0; n < ROWS; n++) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      acc[n][i] = 0.0f;
    }
  }
  for (int piece = simd_group; piece < n_pieces; piece += GROUPS) {
    const int j = begin + piece / PIECES;
    const int k0 = piece % PIECES * DEPTH + k;
    const int col = indices[j] * B + k0;
    const size_t row = (first + perm[j]) * B + k0;
    const device uint* packs = packed + row * WORDS;
    const device T* scale_at = scales + row * SCALES + o0 / GROUP_SIZE;
    const device T* bias_at = biases + row * SCALES + o0 / GROUP_SIZE;
    Pack ws[4];
    T scale[4];
    T offset[4];
    vec<T, 4> xs[ROWS];
#pragma unroll
    for (int turn = 0; turn < 4; turn++) {
      ws[turn] = load_pack<BITS>(packs + turn * WORDS, o0 + o);
      scale[turn] = scale_at[turn * SCALES];
      offset[turn] = bias_at[turn * SCALES];
    }
#pragma unroll
    for (int n = 0; n < ROWS; n++) {
      xs[n] = load4<T>(x_rows + x_at[n] + col);
    }
#pragma unroll
    for (int turn = 0; turn < 4; turn++) {
      const bool inside = INSIDE == B || col + turn < n_inside;
      const float s = inside ? float(scale[turn]) : 0.0f;
      const float b = inside ? float(offset[turn]) : 0.0f;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float w = fma(s, integer<BITS>(ws[turn], i), b);
#pragma unroll
        for (int n = 0; n < ROWS; n++) {
          acc[n][i] = fma(w, float(xs[n][turn]), acc[n][i]);
        }
      }
    }
  }
  const int at =
      o + (lane & ACROSS ? 4 : 0) + (lane & 2 * ACROSS ? 2 : 0) + (lane & 4 * ACROSS ? 1 : 0);
#pragma unroll
  for (int n = 0; n < ROWS; n++) {
    share_sums<8, ACROSS>(acc[n], lane);
    if (ACROSS < 16) {
      share_sums<4, 2 * ACROSS>(acc[n], lane);
    }
    if (ACROSS < 8) {
      share_sums<2, 4 * ACROSS>(acc[n], lane);
    }
#pragma unroll
    for (int i = 0; i < ACROSS / 4; i++) {
      mine[n * STRIP + at + i] = acc[n][i];
    }
  }
} else {
  // A piece is a group of columns of the strip, taken 32 at a time. A lane has a pack of them in
  // every eighth output.
  const int k = lane % 4 * 8;
  const int o = lane / 4;
  float acc[ROWS][4];
#pragma unroll
  for (int n = 0; n < ROWS; n++) {
#pragma unroll
    for (int e = 0; e < 4; e++) {
      acc[n][e] = 0.0f;
    }
  }
  for (int piece = simd_group; piece < n_pieces; piece += GROUPS) {
    const int j = begin + piece / PIECES;
    const int group = piece % PIECES;
    const int col0 = indices[j] * B + group * GROUP_SIZE;
    const size_t row = (first + j) * B + o0 + o;
    const device uint* packs = packed + row * WORDS;
    const device T* scale_at = scales + row * SCALES + group;
    const device T* bias_at = biases + row * SCALES + group;
    T scale[4];
    T offset[4];
#pragma unroll
    for (int e = 0; e < 4; e++) {
      scale[e] = scale_at[8 * e * SCALES];
      offset[e] = bias_at[8 * e * SCALES];
    }
#pragma clang loop unroll(disable)
    for (int k0 = 0; k0 < GROUP_SIZE; k0 += 32) {
      const int n_valid = INSIDE < B ? n_inside - col0 - k0 - k : 8;  // columns in the matrix
      Pack ws[4];
      vec<T, 4> xs[ROWS][2];
#pragma unroll
      for (int e = 0; e < 4; e++) {
        ws[e] = load_pack<BITS>(packs + 8 * e * WORDS, group * GROUP_SIZE + k0 + k);
      }
#pragma unroll
      for (int n = 0; n < ROWS; n++) {
        xs[n][0] = load4<T>(x_rows + x_at[n] + col0 + k0 + k);
        xs[n][1] = load4<T>(x_rows + x_at[n] + col0 + k0 + k + 4);
      }
#pragma unroll
      for (int e = 0; e < 4; e++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
          float w = fma(float(scale[e]), integer<BITS>(ws[e], i), float(offset[e]));
          w = i < n_valid ? w : 0.0f;
#pragma unroll
          for (int n = 0; n < ROWS; n++) {
            acc[n][e] = fma(w, float(xs[n][i / 4][i % 4]), acc[n][e]);
          }
        }
      }
    }
  }
  const int at = o + (lane & 1 ? 16 : 0) + (lane & 2 ? 8 : 0);
#pragma unroll
  for (int n = 0; n < ROWS; n++) {
    share_sums<4, 1>(acc[n], lane);
    share_sums<2, 2>(acc[n], lane);
    mine[n * STRIP + at] = acc[n][0];
  }
}

threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = thread_index; i < min(ROWS, N - n0) * STRIP; i += 32 * GROUPS) {
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
