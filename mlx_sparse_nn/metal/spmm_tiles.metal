// y[v, n, r B + o] = bias[r B + o] + sum of W_j[o, k] x[v, n, indices[j] B + k] over the blocks j
// of block-row r and k < B. W_j is data[v, j], or the transpose of data[v, perm[j]]. Letters as in
// README.md.
//
// Inputs
//   data     (V, n_blocks, B, B) T
//   indptr   (R + 1) int32, indices (n_blocks) int32
//   perm     (n_blocks) int32; not read unless TRANSPOSED
//   x        (V, N, n_cols) T
//   bias     (n_rows) T; not read unless BIAS
// Output
//   y        (V, N, n_rows) T
// Launch
//   (R STRIPS THREADS, ceil(N / ROWS), V) threads in groups of (THREADS, 1, 1), STRIPS =
//   ceil(B / WIDTH), THREADS = 32 SIMD_N SIMD_O SIMD_K. One group owns WIDTH outputs of a block-row
//   and ROWS rows of x. Neighbours share their rows of x.
// Template
//   T float, half or bfloat; B 4 or more; INSIDE columns of the last block-column, 1 to B;
//   TRANSPOSED and BIAS 0 or 1; ROWS and WIDTH of a tile; SIMD_N simdgroups over its rows, SIMD_O
//   over its outputs, SIMD_K that share each stage's k; DEPTH, k in a stage: at most those of a
//   block, rounded up to a multiple of 8, or of 2, 4 or 8 whole blocks.
// Where B is no multiple of 8, zeros fill the block in threadgroup memory.
// Sums in float32: each simdgroup its k of the blocks in stored order and k ascending, then over
// the simdgroups, then the bias.

#include "common.h"
#include "stage.h"

constexpr int FILLED = (B + 7) / 8 * 8;
constexpr int STRIPS = (B + WIDTH - 1) / WIDTH;
constexpr int THREADS = 32 * SIMD_N * SIMD_O * SIMD_K;
constexpr int TILES_N = ROWS / (8 * SIMD_N);   // 8 x 8 tiles of a simdgroup over the rows of x,
constexpr int TILES_O = WIDTH / (8 * SIMD_O);  // and over the outputs
constexpr int BLOCKS = DEPTH > FILLED ? DEPTH / FILLED : 1;  // in a stage
constexpr int SHARE = THREADS / BLOCKS;                      // threads that stage one of them,
constexpr int SPAN = DEPTH / BLOCKS;                         // and its k in a stage
constexpr bool WHOLE_K = B % SPAN == 0;
constexpr bool WHOLE_O = B % WIDTH == 0;
constexpr bool EVEN_K = FILLED % SPAN == 0 && BLOCKS == 1 && DEPTH % (8 * SIMD_K) == 0;
constexpr int PAD = 8;  // elements, against bank conflicts
constexpr int LDX = DEPTH + PAD;
constexpr int LDW = (TRANSPOSED ? WIDTH : DEPTH) + PAD;
constexpr int W_ROWS = TRANSPOSED ? SPAN : WIDTH;
constexpr int W_COLS = TRANSPOSED ? WIDTH : SPAN;
constexpr int SIZE = ROWS * LDX + (TRANSPOSED ? DEPTH : WIDTH) * LDW;
threadgroup vec<T, 4> stages[SIZE / 4];  // x, w

const int r = threadgroup_position_in_grid.x / STRIPS;
const int o0 = threadgroup_position_in_grid.x % STRIPS * WIDTH;
const int n0 = threadgroup_position_in_grid.y * ROWS;
const int v = threadgroup_position_in_grid.z;
const int t = BLOCKS > 1 ? thread_index_in_threadgroup % SHARE : thread_index_in_threadgroup;
const int slot = BLOCKS > 1 ? thread_index_in_threadgroup / SHARE : 0;
const int lane = thread_index_in_simdgroup;
const int simd_no = simdgroup_index_in_threadgroup % (SIMD_N * SIMD_O);
const int simd_k = simdgroup_index_in_threadgroup / (SIMD_N * SIMD_O);
const int tile_n = simd_no / SIMD_O * TILES_N * 8;
const int tile_o = simd_no % SIMD_O * TILES_O * 8;
const int N = x_shape[x_ndim - 2];
const int n_cols = x_shape[x_ndim - 1];
const int n_rows = (indptr_shape[0] - 1) * B;
const int n_inside = n_cols - B + INSIDE;

simdgroup_float8x8 acc[TILES_N][TILES_O];
#pragma unroll
for (int tn = 0; tn < TILES_N; tn++) {
#pragma unroll
  for (int to = 0; to < TILES_O; to++) {
    acc[tn][to] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  }
}

const device T* x_panel = x + ((size_t)v * N + n0) * n_cols;
const device T* blocks = data + (size_t)v * indices_shape[0] * (B * B);
const int last = min(ROWS, N - n0) - 1;  // rows behind it repeat it, and are never stored
threadgroup vec<T, 4>* x_to = stages + slot * (SPAN / 4);
threadgroup vec<T, 4>* w_to = stages + (ROWS * LDX + slot * (TRANSPOSED ? SPAN * LDW : SPAN)) / 4;
const threadgroup T* x_tile = (const threadgroup T*)stages + tile_n * LDX + 8 * simd_k;
const threadgroup T* w_tile = (const threadgroup T*)stages + ROWS * LDX +
                              (TRANSPOSED ? 8 * simd_k * LDW + tile_o : tile_o * LDW + 8 * simd_k);

const int end = indptr[r + 1];
int j = min(indptr[r] + slot, max(end - 1, 0));
int column = indices[j];
int stored = TRANSPOSED ? perm[j] : j;
for (int first = indptr[r]; first < end; first += BLOCKS) {
  const device T* x_block = x_panel + column * B;
  const device T* block = blocks + (size_t)stored * (B * B);
  const int inside = INSIDE < B ? min(B, n_inside - column * B) : B;
  // The next block's place, asked for before it is needed.
  j = min(first + BLOCKS + slot, end - 1);
  column = indices[j];
  stored = TRANSPOSED ? perm[j] : j;
  for (int k0 = 0; k0 < FILLED; k0 += SPAN) {
    vec<T, 4> xs[stage_vectors<ROWS, SPAN, SHARE>()];
    vec<T, 4> ws[stage_vectors<W_ROWS, W_COLS, SHARE>()];
    const int w_row = TRANSPOSED ? k0 : o0;
    const int w_col = TRANSPOSED ? o0 : k0;
    if (WHOLE_K) {
      load_stage<T, ROWS, SPAN, SHARE>(x_block + k0, n_cols, last, t, xs);
    } else {
      load_part<T, ROWS, SPAN, SHARE>(x_block, n_cols, last, k0, B, t, xs);
    }
    if (WHOLE_K && WHOLE_O) {
      load_stage<T, W_ROWS, W_COLS, SHARE>(block + w_row * B + w_col, B, t, ws);
    } else {
      load_part<T, W_ROWS, W_COLS, SHARE>(block + w_row * B, B, min(W_ROWS, B - w_row) - 1, w_col,
                                          B, t, ws);
    }
    if (B % 4 > 0) {
      align_part<T, ROWS, SPAN, SHARE>(k0, B, t, xs);
      align_part<T, W_ROWS, W_COLS, SHARE>(w_col, B, t, ws);
    }
    if (TRANSPOSED && (FILLED > B || INSIDE < B)) {
      cut_rows<T, W_ROWS, W_COLS, SHARE>(inside - k0, t, ws);
    }
    if (!TRANSPOSED && INSIDE < B) {
      cut_cols<T, W_ROWS, W_COLS, SHARE>(inside - k0, t, ws);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    store_stage<T, ROWS, SPAN, LDX, SHARE>(xs, t, x_to);
    store_stage<T, W_ROWS, W_COLS, LDW, SHARE>(ws, t, w_to);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int depth = BLOCKS > 1 ? min(BLOCKS, end - first) * SPAN : min(DEPTH, FILLED - k0);
#pragma unroll
    for (int k = 0; k < DEPTH; k += 8 * SIMD_K) {
      if (EVEN_K || k + 8 * simd_k < depth) {
        simdgroup_matrix<T, 8, 8> x_tiles[TILES_N];
        simdgroup_matrix<T, 8, 8> w_tiles[TILES_O];
#pragma unroll
        for (int tn = 0; tn < TILES_N; tn++) {
          simdgroup_load(x_tiles[tn], x_tile + 8 * tn * LDX + k, LDX);
        }
#pragma unroll
        for (int to = 0; to < TILES_O; to++) {
          if (TRANSPOSED) {
            simdgroup_load(w_tiles[to], w_tile + k * LDW + 8 * to, LDW);
          } else {
            simdgroup_load(w_tiles[to], w_tile + 8 * to * LDW + k, LDW, ulong2(0, 0), true);
          }
        }
#pragma unroll
        for (int tn = 0; tn < TILES_N; tn++) {
#pragma unroll
          for (int to = 0; to < TILES_O; to++) {
            simdgroup_multiply_accumulate(acc[tn][to], x_tiles[tn], w_tiles[to], acc[tn][to]);
          }
        }
      }
    }
  }
}

if (SIMD_K > 1) {
  // The first of the simdgroups that share k adds up what the others have, so many rows of 8 x 8
  // tiles at once as fit where the stages were.
  constexpr int SIMDS = SIMD_N * SIMD_O;
  constexpr int ROW = SIMDS * TILES_O * 32;  // pairs
  constexpr int OTHERS = SIMD_K > 1 ? SIMD_K - 1 : 1;
  constexpr int AT_ONCE = SIZE * sizeof(T) / (OTHERS * ROW * 8);
  threadgroup vec<float, 2>* sums = (threadgroup vec<float, 2>*)stages + simd_no * 32 + lane;
#pragma unroll
  for (int first = 0; first < TILES_N; first += AT_ONCE) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int i = 0; i < AT_ONCE * TILES_O; i++) {
      const int tn = first + i / TILES_O;
      if (simd_k > 0 && tn < TILES_N) {
        const vec<float, 2> sum = acc[tn][i % TILES_O].thread_elements();
        sums[(simd_k - 1) * (AT_ONCE * ROW) + i * (SIMDS * 32)] = sum;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (int i = 0; i < AT_ONCE * TILES_O; i++) {
      const int tn = first + i / TILES_O;
      if (simd_k == 0 && tn < TILES_N) {
#pragma unroll
        for (int other = 0; other < OTHERS; other++) {
          const vec<float, 2> sum = sums[other * (AT_ONCE * ROW) + i * (SIMDS * 32)];
          acc[tn][i % TILES_O].thread_elements()[0] += sum[0];
          acc[tn][i % TILES_O].thread_elements()[1] += sum[1];
        }
      }
    }
  }
}

// Each lane has two neighbours of a row of an 8 x 8 tile.
const int m = tile_n + ((lane / 4) & 4) + lane / 2 % 4;
const int o = o0 + tile_o + ((lane / 4) & 2) * 2 + lane % 2 * 2;
device T* y_at = y + ((size_t)v * N + n0 + m) * n_rows + r * B + o;
#pragma unroll
for (int to = 0; to < TILES_O; to++) {
#pragma unroll
  for (int e = 0; e < 2; e++) {
    if (simd_k == 0 && (WHOLE_O || o + 8 * to + e < B)) {
      const float bias_o = BIAS ? float(bias[r * B + o + 8 * to + e]) : 0.0f;
#pragma unroll
      for (int tn = 0; tn < TILES_N; tn++) {
        if (m + 8 * tn <= last) {
          y_at[(size_t)(8 * tn) * n_rows + 8 * to + e] =
              T(acc[tn][to].thread_elements()[e] + bias_o);
        }
      }
    }
  }
}
