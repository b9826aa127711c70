// The product of qspmm_few.metal for 5 to 32 rows of x, by 8 x 8 products whose factors go from
// device memory to registers: blocks are read once, and no stage waits for a barrier.
//
// Inputs, output: as there.
// Launch
//   (n_rows / STRIP 32 GROUPS, ceil(N / ROWS), V) threads in groups of (32 GROUPS, 1, 1). One group
//   owns STRIP outputs of a block-row and ROWS rows of x. Its simdgroups take pieces of the blocks
//   in turn.
// Template
//   As there, but ROWS of x 8, 16 or 32, and STRIP 32, or GROUP_SIZE or less if TRANSPOSED.
// A sum does not mind in which order k comes. So the eight k of an 8 x 8 product are those that lie
// together where they are stored, not those that are neighbours: four products take 32 k, and each
// lane loads a pack of W and vectors of x for all four.
// Sums in float32 of values in T: each simdgroup its pieces in stored order, then over simdgroups,
// then the bias.

#include "common.h"
#include "quantized.h"

typedef typename Packing<BITS>::pack Pack;

constexpr int STRIPS = B / STRIP;
constexpr int WORDS = B * BITS / 32;                  // of a stored row
constexpr int SCALES = B / GROUP_SIZE;                // of a stored row
constexpr int PIECES = TRANSPOSED ? B / 32 : SCALES;  // of a block
constexpr int TILES_N = ROWS / 8;
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
const device T* x_rows = x + ((size_t)v * N + n0) * n_cols;
threadgroup float* mine = partial + simd_group * (ROWS * STRIP);

// A lane holds elements (row8, col8) and (row8, col8 + 1) of an 8 x 8 matrix.
const int row8 = (lane / 4 & 4) + lane / 2 % 4;
const int col8 = (lane / 4 & 2) * 2 + lane % 2 * 2;

if (TRANSPOSED) {
  // x times W: of x rows are n and columns k, of W rows are k and columns o. A piece is 32 stored
  // rows of the strip. Column i of product turn is stored row 4 i + turn.
  constexpr int PANELS = STRIP / 32;
  simdgroup_float8x8 acc[PANELS][4][TILES_N];
#pragma unroll
  for (int p = 0; p < PANELS; p++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int tn = 0; tn < TILES_N; tn++) {
        acc[p][i][tn] = matrix_of<float>(0.0f, 0.0f);
      }
    }
  }
  int x_at[TILES_N];
#pragma unroll
  for (int tn = 0; tn < TILES_N; tn++) {
    x_at[tn] = min(8 * tn + row8, N - 1 - n0) * n_cols + 4 * col8;
  }
  for (int piece = simd_group; piece < n_pieces; piece += GROUPS) {
    const int j = begin + piece / PIECES;
    const int k0 = piece % PIECES * 32;
    const int col = indices[j] * B + k0;
    const size_t row = (first + perm[j]) * B + k0 + 4 * row8;
    const device uint* packs = packed + row * WORDS;
    const device T* scale_at = scales + row * SCALES + o0 / GROUP_SIZE;
    const device T* bias_at = biases + row * SCALES + o0 / GROUP_SIZE;
    vec<T, 4> xs[TILES_N][2];
#pragma unroll
    for (int tn = 0; tn < TILES_N; tn++) {
      xs[tn][0] = load4<T>(x_rows + x_at[tn] + col);
      xs[tn][1] = load4<T>(x_rows + x_at[tn] + col + 4);
    }
    T scale[4];
    T offset[4];
    Pack ws[4][PANELS];
#pragma unroll
    for (int turn = 0; turn < 4; turn++) {
      scale[turn] = scale_at[turn * SCALES];
      offset[turn] = bias_at[turn * SCALES];
#pragma unroll
      for (int p = 0; p < PANELS; p++) {
        ws[turn][p] = load_pack<BITS>(packs + turn * WORDS, o0 + 32 * p + 4 * col8);
      }
    }
#pragma unroll
    for (int turn = 0; turn < 4; turn++) {
      const bool inside = INSIDE == B || col + 4 * row8 + turn < n_inside;
      const float s = inside ? float(scale[turn]) : 0.0f;
      const float b = inside ? float(offset[turn]) : 0.0f;
      simdgroup_matrix<T, 8, 8> left[TILES_N];
#pragma unroll
      for (int tn = 0; tn < TILES_N; tn++) {
        left[tn] = matrix_of<T>(xs[tn][0][turn], xs[tn][1][turn]);
      }
#pragma unroll
      for (int p = 0; p < PANELS; p++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float w_0 = fma(s, integer<BITS>(ws[turn][p], 2 * i), b);
          const float w_1 = fma(s, integer<BITS>(ws[turn][p], 2 * i + 1), b);
          const simdgroup_matrix<T, 8, 8> right = matrix_of<T>(T(w_0), T(w_1));
#pragma unroll
          for (int tn = 0; tn < TILES_N; tn++) {
            simdgroup_multiply_accumulate(acc[p][i][tn], left[tn], right, acc[p][i][tn]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int p = 0; p < PANELS; p++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
      for (int tn = 0; tn < TILES_N; tn++) {
        const int at = (8 * tn + row8) * STRIP + 32 * p + 4 * col8 + 2 * i;
        mine[at] = acc[p][i][tn].thread_elements()[0];
        mine[at + 1] = acc[p][i][tn].thread_elements()[1];
      }
    }
  }
} else {
  // W times the transpose of x: of W rows are o and columns k, of x rows are k and columns n. A
  // piece is a group of columns of the strip, taken 32 at a time. Column i of product turn is
  // column 4 i + turn of these.
  simdgroup_float8x8 acc[4][TILES_N];
#pragma unroll
  for (int to = 0; to < 4; to++) {
#pragma unroll
    for (int tn = 0; tn < TILES_N; tn++) {
      acc[to][tn] = matrix_of<float>(0.0f, 0.0f);
    }
  }
  int x_at[TILES_N][2];
#pragma unroll
  for (int tn = 0; tn < TILES_N; tn++) {
    x_at[tn][0] = min(8 * tn + col8, N - 1 - n0) * n_cols + 4 * row8;
    x_at[tn][1] = min(8 * tn + col8 + 1, N - 1 - n0) * n_cols + 4 * row8;
  }
  for (int piece = simd_group; piece < n_pieces; piece += GROUPS) {
    const int j = begin + piece / PIECES;
    const int group = piece % PIECES;
    const int col0 = indices[j] * B + group * GROUP_SIZE;
    const size_t row = (first + j) * B + o0 + row8;
    const device uint* packs = packed + row * WORDS;
    const device T* scale_at = scales + row * SCALES + group;
    const device T* bias_at = biases + row * SCALES + group;
    T scale[4];
    T offset[4];
#pragma unroll
    for (int to = 0; to < 4; to++) {
      scale[to] = scale_at[8 * to * SCALES];
      offset[to] = bias_at[8 * to * SCALES];
    }
#pragma clang loop unroll(disable)
    for (int k0 = 0; k0 < GROUP_SIZE; k0 += 32) {
      const int n_valid = INSIDE < B ? n_inside - col0 - k0 - 4 * col8 : 8;  // columns inside
      vec<T, 4> xs[TILES_N][2];
      Pack ws[4];
#pragma unroll
      for (int tn = 0; tn < TILES_N; tn++) {
        xs[tn][0] = load4<T>(x_rows + x_at[tn][0] + col0 + k0);
        xs[tn][1] = load4<T>(x_rows + x_at[tn][1] + col0 + k0);
      }
#pragma unroll
      for (int to = 0; to < 4; to++) {
        ws[to] = load_pack<BITS>(packs + 8 * to * WORDS, group * GROUP_SIZE + k0 + 4 * col8);
      }
#pragma unroll
      for (int turn = 0; turn < 4; turn++) {
        simdgroup_matrix<T, 8, 8> right[TILES_N];
#pragma unroll
        for (int tn = 0; tn < TILES_N; tn++) {
          right[tn] = matrix_of<T>(xs[tn][0][turn], xs[tn][1][turn]);
        }
#pragma unroll
        for (int to = 0; to < 4; to++) {
          const float s = float(scale[to]);
          const float b = float(offset[to]);
          const float w_0 = fma(s, integer<BITS>(ws[to], turn), b);
          const float w_1 = fma(s, integer<BITS>(ws[to], 4 + turn), b);
          const simdgroup_matrix<T, 8, 8> left =
              matrix_of<T>(T(turn < n_valid ? w_0 : 0.0f), T(4 + turn < n_valid ? w_1 : 0.0f));
#pragma unroll
          for (int tn = 0; tn < TILES_N; tn++) {
            simdgroup_multiply_accumulate(acc[to][tn], left, right[tn], acc[to][tn]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int to = 0; to < 4; to++) {
#pragma unroll
    for (int tn = 0; tn < TILES_N; tn++) {
      const int at = (8 * tn + col8) * STRIP + 8 * to + row8;
      mine[at] = acc[to][tn].thread_elements()[0];
      mine[at + STRIP] = acc[to][tn].thread_elements()[1];
    }
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
