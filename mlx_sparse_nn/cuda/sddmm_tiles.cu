// out[v, j, i, k] = sum of y[v, n, row(j) B + i] x[v, n, indices[j] B + k] over the rows n.
//
// Inputs
//   y        ([V,] N, R B) T
//   x        ([V,] N, C) T
//   indptr   (R + 1) int32, indices (n_blocks) int32
// Output
//   out      ([V,] n_blocks, B, B) T
// Launch
//   (R L THREADS, 1, V) threads in blocks of THREADS = 32 WARPS_I WARPS_K, where GROUP L is at
//   least the length of every block-row. One thread block owns up to GROUP neighbouring blocks of
//   one block-row, which share the panel of y, and walks the rows n. Shared memory: STAGES DEPTH B
//   (1 + GROUP) elements.
// Template
//   T half or bfloat16; B 16, 32, 64 or 128; GROUP blocks; WARPS_I and WARPS_K warps over the rows
//   of a block and over the columns of the group; DEPTH of n in a stage; STAGES.
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

const int n_block_rows = indptr_shape[0] - 1;
const int row = blockIdx.x % n_block_rows;
const int j0 = indptr[row] + blockIdx.x / n_block_rows * GROUP;
const int count = min(GROUP, indptr[row + 1] - j0);
if (count <= 0) {
  return;
}
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warp = thread / 32;
const int warp_i = warp / WARPS_K * TILES_I * 16;
const int warp_k = warp % WARPS_K * TILES_K * 8;
const int N = held(x_shape[x_ndim - 2]);
const int C = held(x_shape[x_ndim - 1]);
const int R = held(y_shape[y_ndim - 1]);
const T* y_cols = y + (size_t)v * N * R + row * B;
const T* x_rows = x + (size_t)v * N * C;
const bool aligned = ((size_t)y | (size_t)x) % 16 == 0;
const int n_stages = (N + DEPTH - 1) / DEPTH;

// A thread copies the same columns of y and of x at every stage; only the rows move on.
constexpr int Y_CHUNKS = B / 8;
constexpr int X_CHUNKS = WIDTH / 8;
static_assert(THREADS % X_CHUNKS == 0, "a thread keeps to one chunk");
const int x_chunk = thread % X_CHUNKS;
const bool in_group = x_chunk / Y_CHUNKS < count;
const int col = in_group ? indices[j0 + x_chunk / Y_CHUNKS] * B + x_chunk % Y_CHUNKS * 8 : 0;
const T* y_mine = y_cols + (size_t)(thread / Y_CHUNKS) * R + thread % Y_CHUNKS * 8;
const T* x_mine = x_rows + (size_t)(thread / X_CHUNKS) * C + col;
auto copy_stage_as = [&](int s, auto alignment) {
  constexpr bool ALIGNED = alignment.value;
  constexpr int UNROLL = ALIGNED ? 32 : 1;
  T* y_tile = tiles + s % STAGES * STAGE;
  T* x_tile = y_tile + DEPTH * B;
  const int n = s * DEPTH;
#pragma unroll UNROLL
  for (int i = thread; i < DEPTH * Y_CHUNKS; i += THREADS) {
    const int m = i / Y_CHUNKS;
    const bool valid = n + m < N;
    const T* src = valid ? y_mine + (size_t)(n + (i - thread) / Y_CHUNKS) * R : y;
    copy16<ALIGNED>(y_tile + swizzle<Y_CHUNKS>(m, i % Y_CHUNKS) * 8, src, valid);
  }
#pragma unroll UNROLL
  for (int i = thread; i < DEPTH * X_CHUNKS; i += THREADS) {
    const int m = i / X_CHUNKS;
    const bool valid = in_group && n + m < N;
    const T* src = valid ? x_mine + (size_t)(n + (i - thread) / X_CHUNKS) * C : x;
    copy16<ALIGNED>(x_tile + swizzle<X_CHUNKS>(m, x_chunk) * 8, src, valid);
  }
};
auto copy_stage = [&](int s) {
  if (aligned) {
    copy_stage_as(s, Aligned());
  } else {
    copy_stage_as(s, Unaligned());
  }
};

float acc[TILES_I][TILES_K][4];
#pragma unroll
for (int i = 0; i < TILES_I; i++) {
#pragma unroll
  for (int k = 0; k < TILES_K; k++) {
    acc[i][k][0] = acc[i][k][1] = acc[i][k][2] = acc[i][k][3] = 0.0f;
  }
}
#pragma unroll 1
for (int s = 0; s < STAGES - 1; s++) {
  if (s < n_stages) {
    copy_stage(s);
  }
  commit_copies();
}
for (int s = 0; s < n_stages; s++) {
  wait_copies<STAGES - 2>();
  __syncthreads();
  if (s + STAGES - 1 < n_stages) {
    copy_stage(s + STAGES - 1);
  }
  commit_copies();
  const T* y_tile = tiles + s % STAGES * STAGE;
  const T* x_tile = y_tile + DEPTH * B;
#pragma unroll
  for (int m = 0; m < DEPTH; m += 16) {
    unsigned ys[TILES_I][4];
    unsigned xs[TILES_K][2];
#pragma unroll
    for (int i = 0; i < TILES_I; i++) {
      // y lies transposed, n by i: rows of the tile are n, and the two halves of i are chunks.
      const int n = m + lane / 16 * 8 + lane % 8;
      const int chunk = (warp_i + 16 * i) / 8 + lane / 8 % 2;
      load_matrix4<true>(ys[i], y_tile + swizzle<B / 8>(n, chunk) * 8);
    }
#pragma unroll
    for (int k = 0; k < TILES_K; k += 2) {
      unsigned pair[4];
      const int chunk = (warp_k + 8 * k) / 8 + lane / 16;
      load_matrix4<true>(pair, x_tile + swizzle<WIDTH / 8>(m + lane % 16, chunk) * 8);
      xs[k][0] = pair[0];
      xs[k][1] = pair[1];
      xs[k + 1][0] = pair[2];
      xs[k + 1][1] = pair[3];
    }
#pragma unroll
    for (int i = 0; i < TILES_I; i++) {
#pragma unroll
      for (int k = 0; k < TILES_K; k++) {
        multiply<T>(acc[i][k], ys[i][0], ys[i][1], ys[i][2], ys[i][3], xs[k][0], xs[k][1]);
      }
    }
  }
}

// Columns that lie in one block are stored together.
constexpr int TOGETHER = TILES_K < B / 8 ? TILES_K : B / 8;
T* blocks = out + ((size_t)v * indices_shape[0] + j0) * (B * B) + warp_i * B;
#pragma unroll
for (int k = 0; k < TILES_K; k += TOGETHER) {
  const int col = warp_k + 8 * k;
  store_tiles<T, 2 * TILES_I, TOGETHER>(
      blocks + (size_t)(col / B) * (B * B) + col % B, B, B, col / B < count ? B : 0,
      [&](int half, int t, int e) { return acc[half / 2][k + t][half % 2 * 2 + e]; });
}
