// out[v, j, i, k] = sum of y[v, n, r B + i] x[v, n, indices[j] B + k] over the rows n, where r is
// the block-row of j. Letters as in metal/README.md.
//
// Inputs
//   y        (V, N, n_rows) T
//   x        (V, N, n_cols) T
//   indptr   (R + 1) int32, indices (n_blocks) int32
//   step     not read
// Output
//   out      (V, n_blocks, B, B) T
// Launch
//   (R shares THREADS, 1, V) threads in groups of (THREADS, 1, 1), THREADS = 32 WARPS_I WARPS_K and
//   GROUP shares at least the length of every block-row. One group owns up to GROUP neighbouring
//   blocks of one block-row, which read the same columns of y, and walks the rows n.
//   Shared memory: STAGES stages of DEPTH (Y_STRIDE + X_STRIDE) elements.
// Template
//   T half, bfloat16 or float, which is rounded to TF32; B a multiple of 8, at most 128; GROUP
//   blocks; WARPS_I and WARPS_K warps over the rows of a block and over the columns of GROUP
//   blocks; DEPTH of n in a stage; STAGES.
// Sums in float32, n ascending by STEP.

#include "copies.h"
#include "mma.h"
#include "stores.h"

constexpr int THREADS = 32 * WARPS_I * WARPS_K;
constexpr int WIDTH = B * GROUP;
constexpr int TILES_I = (B + 16 * WARPS_I - 1) / (16 * WARPS_I);  // the last may reach past B
constexpr int TILES_K = WIDTH / (8 * WARPS_K);
constexpr int STEP = 32 / sizeof(T);   // of n in a product of a warp
constexpr int CHUNK = 16 / sizeof(T);  // elements
constexpr int Y_CHUNKS = B / CHUNK;
constexpr int X_CHUNKS = WIDTH / CHUNK;
constexpr bool BY_COLUMNS = sizeof(T) == 4;  // no ldmatrix transposes these
constexpr int Y_STRIDE = (BY_COLUMNS ? column_stride<Y_CHUNKS>() : row_stride<Y_CHUNKS>()) * CHUNK;
constexpr int X_STRIDE = (BY_COLUMNS ? column_stride<X_CHUNKS>() : row_stride<X_CHUNKS>()) * CHUNK;
constexpr int STAGE = DEPTH * (Y_STRIDE + X_STRIDE);
extern __shared__ __align__(128) char shared[];
T* tiles = reinterpret_cast<T*>(shared);

const int R = indptr_shape[0] - 1;
const int r = blockIdx.x % R;
const int j0 = indptr[r] + blockIdx.x / R * GROUP;
const int count = min(GROUP, indptr[r + 1] - j0);
if (count <= 0) {
  return;
}
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warp = thread / 32;
const int warp_i = warp / WARPS_K * TILES_I * 16;
const int warp_k = warp % WARPS_K * TILES_K * 8;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int n_rows = in_register(y_shape[y_ndim - 1]);
const T* y_cols = y + (size_t)v * N * n_rows + r * B;
const T* x_rows = x + (size_t)v * N * n_cols;
const bool aligned = ((size_t)y | (size_t)x) % 16 == 0;
const int n_stages = (N + DEPTH - 1) / DEPTH;

// A thread copies the same columns of y and of x at every stage; only the rows move on.
static_assert(THREADS % X_CHUNKS == 0, "a thread keeps to one chunk");
const int x_chunk = thread % X_CHUNKS;
const bool in_group = x_chunk / Y_CHUNKS < count;
const int col = in_group ? indices[j0 + x_chunk / Y_CHUNKS] * B + x_chunk % Y_CHUNKS * CHUNK : 0;
const T* x_mine = x_rows + (size_t)(thread / X_CHUNKS) * n_cols + col;
// Where a chunk lies in a tile of y or of x.
auto y_place = [](int row, int chunk) {
  return BY_COLUMNS ? row * Y_STRIDE + chunk * CHUNK : swizzle<Y_CHUNKS>(row, chunk) * CHUNK;
};
auto x_place = [](int row, int chunk) {
  return BY_COLUMNS ? row * X_STRIDE + chunk * CHUNK : swizzle<X_CHUNKS>(row, chunk) * CHUNK;
};
auto copy_stage_as = [&](int stage, auto alignment) {
  constexpr bool ALIGNED = alignment.value;
  constexpr int UNROLL = ALIGNED ? 32 : 1;
  T* y_tile = tiles + stage % STAGES * STAGE;
  T* x_tile = y_tile + DEPTH * Y_STRIDE;
  const int n0 = stage * DEPTH;
#pragma unroll UNROLL
  for (int i = thread; i < DEPTH * Y_CHUNKS; i += THREADS) {
    const int m = i / Y_CHUNKS;
    const bool valid = n0 + m < N;
    const T* src = valid ? y_cols + (size_t)(n0 + m) * n_rows + i % Y_CHUNKS * CHUNK : y;
    copy16<ALIGNED>(y_tile + y_place(m, i % Y_CHUNKS), src, valid);
  }
#pragma unroll UNROLL
  for (int i = thread; i < DEPTH * X_CHUNKS; i += THREADS) {
    const int m = i / X_CHUNKS;
    const bool valid = in_group && n0 + m < N;
    const T* src = valid ? x_mine + (size_t)(n0 + (i - thread) / X_CHUNKS) * n_cols : x;
    copy16<ALIGNED>(x_tile + x_place(m, x_chunk), src, valid);
  }
};
auto copy_stage = [&](int stage) {
  if (aligned) {
    copy_stage_as(stage, Aligned());
  } else {
    copy_stage_as(stage, Unaligned());
  }
};

float acc[TILES_I][TILES_K][4];
#pragma unroll
for (int ti = 0; ti < TILES_I; ti++) {
#pragma unroll
  for (int tk = 0; tk < TILES_K; tk++) {
    acc[ti][tk][0] = acc[ti][tk][1] = acc[ti][tk][2] = acc[ti][tk][3] = 0.0f;
  }
}
#pragma unroll 1
for (int stage = 0; stage < STAGES - 1; stage++) {
  if (stage < n_stages) {
    copy_stage(stage);
  }
  commit_copies();
}
for (int stage = 0; stage < n_stages; stage++) {
  wait_copies<STAGES - 2>();
  __syncthreads();
  if (stage + STAGES - 1 < n_stages) {
    copy_stage(stage + STAGES - 1);
  }
  commit_copies();
  const T* y_tile = tiles + stage % STAGES * STAGE;
  const T* x_tile = y_tile + DEPTH * Y_STRIDE;
#pragma unroll
  for (int m = 0; m < DEPTH; m += STEP) {
    unsigned ys[TILES_I][4];
    unsigned xs[TILES_K][2];
    if constexpr (BY_COLUMNS) {
#pragma unroll
      for (int ti = 0; ti < TILES_I; ti++) {
        // Rows i and i + 8 of the fragment alternate: two of n, then two of n + 4.
        const T* at = y_tile + m * Y_STRIDE + warp_i + 16 * ti;
        unsigned low[2];
        unsigned high[2];
        load_columns<Y_STRIDE>(low, at);
        load_columns<Y_STRIDE>(high, at + 8);
        ys[ti][0] = low[0];
        ys[ti][1] = high[0];
        ys[ti][2] = low[1];
        ys[ti][3] = high[1];
        round_factors<T>(ys[ti]);
      }
#pragma unroll
      for (int tk = 0; tk < TILES_K; tk++) {
        load_columns<X_STRIDE>(xs[tk], x_tile + m * X_STRIDE + warp_k + 8 * tk);
        round_factors<T>(xs[tk]);
      }
    } else {
#pragma unroll
      for (int ti = 0; ti < TILES_I; ti++) {
        // y lies transposed, n by i: rows of the tile are n, and 16 of i are two chunks. What
        // lies past the block is not stored.
        const int y_row = m + lane / 16 * 8 + lane % 8;
        const int chunk = (warp_i + 16 * ti) / 8 + lane / 8 % 2;
        load_matrix4<true>(ys[ti], y_tile + y_place(y_row, min(chunk, Y_CHUNKS - 1)));
      }
#pragma unroll
      for (int tk = 0; tk < TILES_K; tk += 2) {
        unsigned pair[4];
        const int chunk = (warp_k + 8 * tk) / 8 + lane / 16;
        load_matrix4<true>(pair, x_tile + x_place(m + lane % 16, chunk));
        xs[tk][0] = pair[0];
        xs[tk][1] = pair[1];
        xs[tk + 1][0] = pair[2];
        xs[tk + 1][1] = pair[3];
      }
    }
#pragma unroll
    for (int ti = 0; ti < TILES_I; ti++) {
#pragma unroll
      for (int tk = 0; tk < TILES_K; tk++) {
        multiply<T>(acc[ti][tk], ys[ti][0], ys[ti][1], ys[ti][2], ys[ti][3], xs[tk][0], xs[tk][1]);
      }
    }
  }
}

// Tiles that lie in one block are stored together, where they are as many in each.
constexpr int IN_BLOCK = TILES_K < B / 8 ? TILES_K : B / 8;
constexpr bool ALIKE = B / 8 % IN_BLOCK == 0 && TILES_K % IN_BLOCK == 0;
constexpr int TOGETHER = ALIKE && sizeof(T) == 2 && TILES_I * IN_BLOCK % 2 == 0 ? IN_BLOCK : 1;
T* blocks = out + ((size_t)v * indices_shape[0] + j0) * (B * B) + warp_i * B;
#pragma unroll
for (int tk = 0; tk < TILES_K; tk += TOGETHER) {
  const int group_col = warp_k + 8 * tk;
  T* block = blocks + (size_t)(group_col / B) * (B * B) + group_col % B;
  const int cols = group_col / B < count ? B : 0;
  auto sum = [&](int row_tile, int col_tile, int e) {
    return acc[row_tile / 2][tk + col_tile][row_tile % 2 * 2 + e];
  };
  if constexpr (TOGETHER > 1) {
    store_tiles<T, 2 * TILES_I, TOGETHER>(block, B, B - warp_i, cols, sum);
  } else {
    store_pairs<T, 2 * TILES_I, TOGETHER>(block, B, B - warp_i, cols, sum);
  }
}
