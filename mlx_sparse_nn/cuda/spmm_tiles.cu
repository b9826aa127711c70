// y[v, n, r B + o] = bias[r B + o] + sum of W_j[o, k] x[v, n, indices[j] B + k] over the blocks j
// of block-row r and k < B. W_j is data[v, j], or the transpose of data[v, perm[j]]. Letters as in
// metal/README.md.
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
//   (R THREADS, shares, V) threads in groups of (THREADS, 1, 1), THREADS = 32 WARPS_N WARPS_O. One
//   group owns one block-row and an equal share of the tiles of ROWS rows of x, which it takes one
//   after the other. Neighbours share their rows of x in L2.
//   Shared memory: STAGES stages of ROWS DEPTH + W_ROWS W_STRIDE elements.
// Template
//   T half, bfloat16 or float, which is rounded to TF32; B a multiple of 8, at most 128; INSIDE
//   columns of the last block-column, 1 to B; ROWS of x in a tile; WARPS_N and WARPS_O warps over
//   rows of x and outputs; DEPTH of k in a stage; STAGES; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: the bias, then blocks in stored order, k ascending by STEP.

#include "copies.h"
#include "mma.h"
#include "stores.h"

constexpr int THREADS = 32 * WARPS_N * WARPS_O;
constexpr int TILES_N = ROWS / (16 * WARPS_N);  // 16 x 8 tiles of a warp over the rows of x,
constexpr int TILES_O = B / (8 * WARPS_O);      // and over the outputs
constexpr int STEP = 32 / sizeof(T);            // of k in a product of a warp: 2 chunks
constexpr int CHUNK = 16 / sizeof(T);           // elements
constexpr int CHUNKS = DEPTH / CHUNK;
constexpr int W_CHUNKS = TRANSPOSED ? B / CHUNK : CHUNKS;
constexpr int W_ROWS = TRANSPOSED ? DEPTH : B;
constexpr bool BY_COLUMNS = TRANSPOSED && sizeof(T) == 4;  // no ldmatrix transposes these
constexpr int W_STRIDE = (BY_COLUMNS ? column_stride<W_CHUNKS>() : row_stride<W_CHUNKS>()) * CHUNK;
constexpr int STAGE = ROWS * DEPTH + W_ROWS * W_STRIDE;
extern __shared__ __align__(128) char shared[];
T* tiles = reinterpret_cast<T*>(shared);

const int r = blockIdx.x;
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warp = thread / 32;
const int warp_n = warp / WARPS_O * TILES_N * 16;
const int warp_o = warp % WARPS_O * TILES_O * 8;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int n_rows = (indptr_shape[0] - 1) * B;
const int n_inside = n_cols - B + INSIDE;
const int all_tiles = (N + ROWS - 1) / ROWS;
const int first_tile = (size_t)all_tiles * blockIdx.y / gridDim.y;
const int n_tiles = (size_t)all_tiles * (blockIdx.y + 1) / gridDim.y - first_tile;
int n0 = first_tile * ROWS;
const T* blocks = data + (size_t)v * indices_shape[0] * (B * B);
const bool aligned = ((size_t)x | (size_t)data) % 16 == 0;
const int begin = indptr[r];
const int end = indptr[r + 1];
const int n_stages = ((end - begin) * B + DEPTH - 1) / DEPTH;

// Copies run ahead, through all tiles. A thread copies the same chunk of k of every row, so it
// needs one block index a stage, which is read a stage ahead. A stage spans several blocks, or lies
// in one. Where it spans two of W transposed, and a thread copies of both, it needs two.
constexpr bool TWO_BLOCKS = TRANSPOSED && W_ROWS * W_CHUNKS > THREADS&& B % DEPTH != 0;
static_assert(THREADS % CHUNKS == 0, "a thread keeps to one chunk");
static_assert(!TWO_BLOCKS || B >= DEPTH, "a stage spans no third block");
const int x_row = thread / CHUNKS;
const int x_k = thread % CHUNKS * CHUNK;
const int w_k = TWO_BLOCKS ? 0 : TRANSPOSED ? thread / W_CHUNKS % DEPTH : x_k;
const T* x_mine = x + ((size_t)v * N + n0 + x_row) * n_cols;
const T* w_mine = blocks + (TRANSPOSED ? 0 : thread / CHUNKS * B);
// Of the stage to copy next: its tile, its place in the tile, its buffer, where its blocks lie, and
// how many k of this thread's block of W lie in the matrix.
int next_tile = 0;
int next_stage = 0;
int next_buffer = 0;
int next_col;
int next_stored[TWO_BLOCKS + 1];
int next_inside[TWO_BLOCKS + 1];
auto read_indices = [&]() {
  const int k = next_stage * DEPTH;
  const int j = begin + (k + x_k) / B;
  next_col = j < end ? indices[j] * B + (k + x_k) % B : -1;
#pragma unroll
  for (int i = 0; i <= TWO_BLOCKS; i++) {
    const int w_j = begin + (k + w_k) / B + i;
    next_stored[i] = w_j >= end ? -1 : TRANSPOSED ? perm[w_j] : w_j;
    if (INSIDE < B) {
      next_inside[i] = w_j < end ? n_inside - indices[w_j] * B : 0;
    }
  }
};
// Where a chunk lies in a tile of W.
auto w_place = [](int row, int chunk) {
  return BY_COLUMNS ? row * W_STRIDE + chunk * CHUNK : swizzle<W_CHUNKS>(row, chunk) * CHUNK;
};
auto copy_stage_as = [&](auto alignment) {
  constexpr bool ALIGNED = alignment.value;
  constexpr int UNROLL = ALIGNED ? 32 : 1;
  if (next_tile < n_tiles && n_stages > 0) {
    T* x_tile = tiles + next_buffer * STAGE;
    T* w_tile = x_tile + ROWS * DEPTH;
    const T* x_src = x_mine + (size_t)next_tile * ROWS * n_cols + next_col;
    const int n_valid = next_col < 0 ? 0 : N - (first_tile + next_tile) * ROWS - x_row;
#pragma unroll UNROLL
    for (int i = 0; i < ROWS; i += THREADS / CHUNKS) {
      const T* src = i < n_valid ? x_src + (size_t)i * n_cols : x;
      copy16<ALIGNED>(x_tile + swizzle<CHUNKS>(x_row + i, thread % CHUNKS) * CHUNK, src,
                      i < n_valid);
    }
    const int k = next_stage * DEPTH;
#pragma unroll UNROLL
    for (int i = thread; i < W_ROWS * W_CHUNKS; i += THREADS) {
      const int w_row = i / W_CHUNKS;
      const bool second = TWO_BLOCKS && k % B + w_row >= B;
      const int stored = second ? next_stored[TWO_BLOCKS] : next_stored[0];
      const int inside = second ? next_inside[TWO_BLOCKS] : next_inside[0];
      const T* block = w_mine + (size_t)max(0, stored) * (B * B);
      const int w_k0 = (k + (TRANSPOSED ? w_row : x_k)) % B;
      const T* src = TRANSPOSED ? block + w_k0 * B + i % W_CHUNKS * CHUNK
                                : block + (i - thread) / W_CHUNKS * B + w_k0;
      T* dst = w_tile + w_place(w_row, i % W_CHUNKS);
      if (INSIDE == B) {
        copy16<ALIGNED>(dst, src, stored >= 0);
      } else if (TRANSPOSED) {
        copy16<ALIGNED>(dst, src, w_k0 < inside);
      } else {
        copy_first<ALIGNED>(dst, src, inside - w_k0);
      }
    }
    next_buffer = next_buffer + 1 == STAGES ? 0 : next_buffer + 1;
    if (++next_stage == n_stages) {
      next_stage = 0;
      next_tile++;
    }
    read_indices();
  }
  commit_copies();
};
auto copy_stage = [&]() {
  if (aligned) {
    copy_stage_as(Aligned());
  } else {
    copy_stage_as(Unaligned());
  }
};

read_indices();
#pragma unroll 1
for (int stage = 0; stage < STAGES - 1; stage++) {
  copy_stage();
}
int used = 0;
float acc[TILES_N][TILES_O][4];
for (int tile = 0; tile < n_tiles; tile++, n0 += ROWS) {
#pragma unroll
  for (int tn = 0; tn < TILES_N; tn++) {
#pragma unroll
    for (int to = 0; to < TILES_O; to++) {
      const int row = r * B + warp_o + 8 * to + lane % 4 * 2;
      acc[tn][to][0] = acc[tn][to][2] = BIAS ? float(__ldg(bias + row)) : 0.0f;
      acc[tn][to][1] = acc[tn][to][3] = BIAS ? float(__ldg(bias + row + 1)) : 0.0f;
    }
  }
  for (int stage = 0; stage < n_stages; stage++) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    copy_stage();
    const T* x_tile = tiles + used * STAGE;
    const T* w_tile = x_tile + ROWS * DEPTH;
    used = used + 1 == STAGES ? 0 : used + 1;
#pragma unroll
    for (int k = 0; k < DEPTH; k += STEP) {
      const int k_chunk = k / CHUNK;
      unsigned xs[TILES_N][4];
      unsigned ws[TILES_O][2];
#pragma unroll
      for (int tn = 0; tn < TILES_N; tn++) {
        const int m = warp_n + 16 * tn + lane % 16;
        load_matrix4<false>(xs[tn], x_tile + swizzle<CHUNKS>(m, k_chunk + lane / 16) * CHUNK);
        round_factors<T>(xs[tn]);
      }
      if constexpr (BY_COLUMNS) {
#pragma unroll
        for (int to = 0; to < TILES_O; to++) {
          load_columns<W_STRIDE>(ws[to], w_tile + k * W_STRIDE + warp_o + 8 * to);
          round_factors<T>(ws[to]);
        }
      } else {
        // By twos, and the last one alone where they are odd.
#pragma unroll
        for (int to = 0; to < TILES_O - 1; to += 2) {
          unsigned pair[4];
          const int o0 = warp_o + 8 * to;
          if (TRANSPOSED) {
            load_matrix4<true>(pair, w_tile + w_place(k + lane % 16, o0 / 8 + lane / 16));
          } else {
            const int o = o0 + lane / 16 * 8 + lane % 8;
            load_matrix4<false>(pair, w_tile + w_place(o, k_chunk + lane / 8 % 2));
          }
          round_factors<T>(pair);
          ws[to][0] = pair[0];
          ws[to][1] = pair[1];
          ws[to + 1][0] = pair[2];
          ws[to + 1][1] = pair[3];
        }
        if constexpr (TILES_O % 2 == 1) {
          const int o0 = warp_o + 8 * (TILES_O - 1);
          if (TRANSPOSED) {
            load_matrix2<true>(ws[TILES_O - 1], w_tile + w_place(k + lane % 16, o0 / 8));
          } else {
            const int o = o0 + lane % 8;
            load_matrix2<false>(ws[TILES_O - 1], w_tile + w_place(o, k_chunk + lane / 8 % 2));
          }
          round_factors<T>(ws[TILES_O - 1]);
        }
      }
#pragma unroll
      for (int tn = 0; tn < TILES_N; tn++) {
#pragma unroll
        for (int to = 0; to < TILES_O; to++) {
          multiply<T>(acc[tn][to], xs[tn][0], xs[tn][1], xs[tn][2], xs[tn][3], ws[to][0],
                      ws[to][1]);
        }
      }
    }
  }
  const int n = n0 + warp_n;
  const int row = r * B + warp_o;
  T* y_tile = y + ((size_t)v * N + n) * n_rows + row;
  auto sum = [&](int row_tile, int to, int e) {
    return acc[row_tile / 2][to][row_tile % 2 * 2 + e];
  };
  if constexpr (sizeof(T) == 2 && 2 * TILES_N * TILES_O % 4 == 0) {
    store_tiles<T, 2 * TILES_N, TILES_O>(y_tile, n_rows, N - n, 8 * TILES_O, sum);
  } else {
    store_pairs<T, 2 * TILES_N, TILES_O>(y_tile, n_rows, N - n, 8 * TILES_O, sum);
  }
}
