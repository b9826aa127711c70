// The product of qspmm_few.metal for many rows of x: each value is computed once for ROWS of them,
// in threadgroup memory, and multiplied in 8 x 8 products.
//
// Inputs, output: as there.
// Launch
//   (n_rows / SIDE 32 GROUPS, ceil(N / ROWS), V) threads in groups of (32 GROUPS, 1, 1). One group
//   owns SIDE outputs of a block-row and ROWS rows of x. Neighbours share their rows of x.
// Template
//   T, BITS, GROUP_SIZE, B, INSIDE, TRANSPOSED, BIAS as there; SIDE 32, 64 or 128, a divisor of B;
//   ROWS of x, a multiple of 32; GROUPS simdgroups, ACROSS of them side by side over the outputs.
// Sums in float32 of values in T: blocks in stored order, k ascending, then the bias.

#include "common.h"
#include "quantized.h"
#include "stage.h"

typedef typename Packing<BITS>::pack Pack;

constexpr int THREADS = 32 * GROUPS;
constexpr int STRIPS = B / SIDE;
constexpr int TILES_N =
    ROWS / (8 * (GROUPS / ACROSS));                // 8 x 8 tiles of a simdgroup over the rows,
constexpr int TILES_O = SIDE / (8 * ACROSS);       // and over the outputs
constexpr int DEPTH = sizeof(T) == 2 ? 32 : 16;    // k in a stage
constexpr int PAD = 8;                             // elements, against bank conflicts
constexpr int WORDS = B * BITS / 32;               // of a stored row
constexpr int SCALES = B / GROUP_SIZE;             // of a stored row
constexpr int W_ROWS = TRANSPOSED ? DEPTH : SIDE;  // of W in a stage, as it is stored
constexpr int W_COLS = TRANSPOSED ? SIDE : DEPTH;
constexpr int LDX = DEPTH + PAD;
constexpr int LDW = W_COLS + PAD;
constexpr int W_STEP = THREADS / (W_COLS / 8);                  // rows of W that are staged at once
constexpr int W_COUNT = W_ROWS < W_STEP ? 1 : W_ROWS / W_STEP;  // packs of a thread
threadgroup vec<T, 4> x_mem[ROWS * LDX / 4];
threadgroup vec<T, 4> w_mem[W_ROWS * LDW / 4];

const int r = threadgroup_position_in_grid.x / STRIPS;
const int o0 = threadgroup_position_in_grid.x % STRIPS * SIDE;
const int n0 = threadgroup_position_in_grid.y * ROWS;
const int v = threadgroup_position_in_grid.z;
const int thread_index = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int simd_group = simdgroup_index_in_threadgroup;
const int tile_n = simd_group / ACROSS * TILES_N * 8;
const int tile_o = simd_group % ACROSS * TILES_O * 8;
const int N = x_shape[x_ndim - 2];
const int n_cols = x_shape[x_ndim - 1];
const int n_rows = (indptr_shape[0] - 1) * B;
const int n_inside = n_cols - B + INSIDE;
const threadgroup T* x_tile = (const threadgroup T*)x_mem;
const threadgroup T* w_tile = (const threadgroup T*)w_mem;

simdgroup_float8x8 acc[TILES_N][TILES_O];
#pragma unroll
for (int tn = 0; tn < TILES_N; tn++) {
#pragma unroll
  for (int to = 0; to < TILES_O; to++) {
    acc[tn][to] = matrix_of<float>(0.0f, 0.0f);
  }
}

// Rows of x past the last one repeat it, and are never stored.
const device T* x_panel = x + ((size_t)v * N + n0) * n_cols;
// Where this thread stages W.
const bool stages_w = W_ROWS >= W_STEP || thread_index < W_ROWS * (W_COLS / 8);
const int w_row = thread_index / (W_COLS / 8);
const int w_col = thread_index % (W_COLS / 8) * 8;
threadgroup vec<T, 4>* w_to = w_mem + (w_row * LDW + w_col) / 4;

const int end = indptr[r + 1];
for (int j = indptr[r]; j < end; j++) {
  const int col0 = indices[j] * B;
  const size_t stored = (size_t)v * indices_shape[0] + (TRANSPOSED ? perm[j] : j);
  for (int k0 = 0; k0 < B; k0 += DEPTH) {
    // Row and column of this thread's first pack in the stored block.
    const size_t row = stored * B + (TRANSPOSED ? k0 : o0) + w_row;
    const int col = (TRANSPOSED ? o0 : k0) + w_col;
    const device uint* packs = packed + row * WORDS;
    const device T* scale_at = scales + row * SCALES + col / GROUP_SIZE;
    const device T* bias_at = biases + row * SCALES + col / GROUP_SIZE;
    vec<T, 4> xs[stage_vectors<ROWS, DEPTH, THREADS>()];
    Pack ws[W_COUNT];
    T scale[W_COUNT];
    T offset[W_COUNT];
    const device T* x_at = x_panel + col0 + k0;
    load_stage<T, ROWS, DEPTH, THREADS>(x_at, n_cols, N - 1 - n0, thread_index, xs);
    if (stages_w) {
#pragma unroll
      for (int i = 0; i < W_COUNT; i++) {
        ws[i] = load_pack<BITS>(packs + i * W_STEP * WORDS, col);
        scale[i] = scale_at[i * W_STEP * SCALES];
        offset[i] = bias_at[i * W_STEP * SCALES];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    store_stage<T, ROWS, DEPTH, LDX, THREADS>(xs, thread_index, x_mem);
    if (stages_w) {
      const int k = col0 + k0 + (TRANSPOSED ? w_row : w_col);
#pragma unroll
      for (int i = 0; i < W_COUNT; i++) {
        // How many columns of the pack lie in the matrix.
        const int n_valid = INSIDE == B                 ? 8
                            : !TRANSPOSED               ? n_inside - k
                            : k + i * W_STEP < n_inside ? 8
                                                        : 0;
        vec<T, 4> w[2];
#pragma unroll
        for (int place = 0; place < 8; place++) {
          const float value = fma(float(scale[i]), integer<BITS>(ws[i], place), float(offset[i]));
          w[place / 4][place % 4] = T(place < n_valid ? value : 0.0f);
        }
        w_to[i * (W_STEP * LDW / 4)] = w[0];
        w_to[i * (W_STEP * LDW / 4) + 1] = w[1];
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    // Not unrolled: loads of all k at once would take more registers than there are.
#pragma clang loop unroll(disable)
    for (int k = 0; k < DEPTH; k += 8) {
      simdgroup_matrix<T, 8, 8> left[TILES_N];
      simdgroup_matrix<T, 8, 8> right[TILES_O];
#pragma unroll
      for (int tn = 0; tn < TILES_N; tn++) {
        simdgroup_load(left[tn], x_tile + (tile_n + 8 * tn) * LDX + k, LDX);
      }
#pragma unroll
      for (int to = 0; to < TILES_O; to++) {
        const int o = tile_o + 8 * to;
        if (TRANSPOSED) {
          simdgroup_load(right[to], w_tile + k * LDW + o, LDW);
        } else {
          simdgroup_load(right[to], w_tile + o * LDW + k, LDW, ulong2(0, 0), true);
        }
      }
#pragma unroll
      for (int tn = 0; tn < TILES_N; tn++) {
#pragma unroll
        for (int to = 0; to < TILES_O; to++) {
          simdgroup_multiply_accumulate(acc[tn][to], left[tn], right[to], acc[tn][to]);
        }
      }
    }
  }
}

// A lane holds elements (row8, col8) and (row8, col8 + 1) of an 8 x 8 matrix.
const int row8 = (lane / 4 & 4) + lane / 2 % 4;
const int col8 = (lane / 4 & 2) * 2 + lane % 2 * 2;
#pragma unroll
for (int to = 0; to < TILES_O; to++) {
  const int row = r * B + o0 + tile_o + 8 * to + col8;
  const float bias_0 = BIAS ? float(bias[row]) : 0.0f;
  const float bias_1 = BIAS ? float(bias[row + 1]) : 0.0f;
#pragma unroll
  for (int tn = 0; tn < TILES_N; tn++) {
    const int n = n0 + tile_n + 8 * tn + row8;
    if (n < N) {
      device T* y_at = y + ((size_t)v * N + n) * n_rows + row;
      y_at[0] = T(acc[tn][to].thread_elements()[0] + bias_0);
      y_at[1] = T(acc[tn][to].thread_elements()[1] + bias_1);
    }
  }
}
