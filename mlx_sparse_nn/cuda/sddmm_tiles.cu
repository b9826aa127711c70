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
//   Shared memory: STAGES DEPTH B (1 + GROUP) elements.
// Template
//   T half or bfloat16; B 16, 32, 64 or 128; GROUP blocks; WARPS_I and WARPS_K warps over the rows
//   of a block and over the columns of GROUP blocks; DEPTH of n in a stage; STAGES.
// Sums in float32, n ascending by 16.

#include "copies.h"
#include "mma.h"
#include "stores.h"

constexpr int THREADS = 32 * WARPS_I * WARPS_K;
constexpr int WIDTH = B * GROUP;
constexpr int TILES_I = B / (16 * WARPS_I);
constexpr int TILES_K = WIDTH / (8 * WARPS_K);
constexpr int STAGE = DEPTH * (B + WIDTH);
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
constexpr int Y_CHUNKS = B / 8;
constexpr int X_CHUNKS = WIDTH / 8;
static_assert(THREADS % X_CHUNKS == 0, "a thread keeps to one chunk");
const int x_chunk = thread % X_CHUNKS;
const bool in_group = x_chunk / Y_CHUNKS < count;
const int col = in_group ? indices[j0 + x_chunk / Y_CHUNKS] * B + x_chunk % Y_CHUNKS * 8 : 0;
const T* y_mine = y_cols + (size_t)(thread / Y_CHUNKS) * n_rows + thread % Y_CHUNKS * 8;
const T* x_mine = x_rows + (size_t)(thread / X_CHUNKS) * n_cols + col;
auto copy_stage_as = [&](int stage, auto alignment) {
  constexpr bool ALIGNED = alignment.value;
  constexpr int UNROLL = ALIGNED ? 32 : 1;
  T* y_tile = tiles + stage % STAGES * STAGE;
  T* x_tile = y_tile + DEPTH * B;
  const int n0 = stage * DEPTH;
#pragma unroll UNROLL
  for (int i = thread; i < DEPTH * Y_CHUNKS; i += THREADS) {
    const int m = i / Y_CHUNKS;
    const bool valid = n0 + m < N;
    const T* src = valid ? y_mine + (size_t)(n0 + (i - thread) / Y_CHUNKS) * n_rows : y;
    copy16<ALIGNED>(y_tile + swizzle<Y_CHUNKS>(m, i % Y_CHUNKS) * 8, src, valid);
  }
#pragma unroll UNROLL
  for (int i = thread; i < DEPTH * X_CHUNKS; i += THREADS) {
    const int m = i / X_CHUNKS;
    const bool valid = in_group && n0 + m < N;
    const T* src = valid ? x_mine + (size_t)(n0 + (i - thread) / X_CHUNKS) * n_cols : x;
    copy16<ALIGNED>(x_tile + swizzle<X_CHUNKS>(m, x_chunk) * 8, src, valid);
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
  const T* x_tile = y_tile + DEPTH * B;
#pragma unroll
  for (int m = 0; m < DEPTH; m += 16) {
    unsigned ys[TILES_I][4];
    unsigned xs[TILES_K][2];
#pragma unroll
    for (int ti = 0; ti < TILES_I; ti++) {
      // y lies transposed, n by i: rows of the tile are n, and 16 of i are two chunks.
      const int y_row = m + lane / 16 * 8 + lane % 8;
      const int chunk = (warp_i + 16 * ti) / 8 + lane / 8 % 2;
      load_matrix4<true>(ys[ti], y_tile + swizzle<B / 8>(y_row, chunk) * 8);
    }
#pragma unroll
    for (int tk = 0; tk < TILES_K; tk += 2) {
      unsigned pair[4];
      const int chunk = (warp_k + 8 * tk) / 8 + lane / 16;
      load_matrix4<true>(pair, x_tile + swizzle<WIDTH / 8>(m + lane % 16, chunk) * 8);
      xs[tk][0] = pair[0];
      xs[tk][1] = pair[1];
      xs[tk + 1][0] = pair[2];
      xs[tk + 1][1] = pair[3];
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

// Tiles that lie in one block are stored together.
constexpr int TOGETHER = TILES_K < B / 8 ? TILES_K : B / 8;
T* blocks = out + ((size_t)v * indices_shape[0] + j0) * (B * B) + warp_i * B;
#pragma unroll
for (int tk = 0; tk < TILES_K; tk += TOGETHER) {
  const int group_col = warp_k + 8 * tk;
  store_tiles<T, 2 * TILES_I, TOGETHER>(
      blocks + (size_t)(group_col / B) * (B * B) + group_col % B, B, B,
      group_col / B < count ? B : 0, [&](int row_tile, int col_tile, int e) {
        return acc[row_tile / 2][tk + col_tile][row_tile % 2 * 2 + e];
      });
}
