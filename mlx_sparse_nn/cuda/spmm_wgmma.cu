// The product of spmm_tiles.cu on Hopper's tensor cores, which read their operands from shared memory.
//
// Inputs, output: as there.
// Launch
//   (R THREADS, Y, V) threads in blocks of THREADS = 128 WARPGROUPS, which own what they do there.
//   Shared memory: 1024 bytes, and STAGES ROWS 64 + BLOCKS B B elements, where BLOCKS is 2 more than
//   STAGES - 2 stages may span.
// Template
//   T half or bfloat16; B 64 or 128; WARPGROUPS; ROWS of x in a tile, a multiple of 64 WARPGROUPS;
//   STAGES; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: the bias, then blocks in stored order, k ascending by 16.

#include "copies.h"
#include "stores.h"
#include "wgmma.h"

constexpr int THREADS = 128 * WARPGROUPS;
constexpr int TILES = ROWS / (64 * WARPGROUPS);  // 64 x B tiles of a warpgroup
constexpr int DEPTH = 64;                        // k in a stage: rows of 128 bytes
constexpr int PARTS = B / DEPTH;                 // stages of a block
constexpr int AHEAD = STAGES - 2;  // stages under way: of the others, one is read and one drains
constexpr int BLOCKS = (AHEAD + PARTS - 1) / PARTS + 2;
constexpr int X_TILE = ROWS * DEPTH;
constexpr int SLAB = B * 64;  // 64 columns of a block, in rows of 128 bytes
extern __shared__ char shared[];
__shared__ T biases[B];
T* x_tiles = reinterpret_cast<T*>(shared + (1024 - (unsigned)__cvta_generic_to_shared(shared) % 1024) % 1024);
T* w_tiles = x_tiles + STAGES * X_TILE;

const int r = blockIdx.x;
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int first_row = thread / 128 * TILES * 64;
const int N = x_shape[x_ndim - 2];
const int C = x_shape[x_ndim - 1];
const int out = (indptr_shape[0] - 1) * B;
const int all_tiles = (N + ROWS - 1) / ROWS;
const int first_tile = (size_t)all_tiles * blockIdx.y / gridDim.y;
const int n_tiles = (size_t)all_tiles * (blockIdx.y + 1) / gridDim.y - first_tile;
int n0 = first_tile * ROWS;
const bool x_aligned = (size_t)x % 16 == 0;
const bool w_aligned = (size_t)data % 16 == 0;
const int begin = indptr[r];
const int end = indptr[r + 1];
const int n_stages = (end - begin) * PARTS;

// Copies run ahead, through all tiles. Eight threads copy a row of 64 elements of x; a block comes whole,
// with the first of its stages, since lines of L2 that lie side by side travel faster than every other one.
const int copy_row = thread / 8;
const T* x_mine = x + ((size_t)v * N + n0 + copy_row) * C + thread % 8 * 8;
const T* blocks = data + (size_t)v * indices_shape[0] * (B * B);
int next_tile = 0;   // of the stage to copy next: its tile, its place in the tile, its buffers,
int next_stage = 0;
int next_x = 0;
int next_w = 0;
int next_col;        // and where its block lies
int next_stored;
auto read_indices = [&]() {
  const int j = begin + next_stage / PARTS;
  next_col = j < end ? indices[j] * B : 0;
  next_stored = !TRANSPOSED ? j : j < end ? perm[j] : 0;
};
auto copy_stage = [&]() {
  if (next_tile < n_tiles && n_stages > 0) {
    T* x_tile = x_tiles + next_x * X_TILE;
    const T* x_src = x_mine + (size_t)next_tile * ROWS * C + next_col + next_stage % PARTS * DEPTH;
    const int rows = N - (first_tile + next_tile) * ROWS - copy_row;
#pragma unroll
    for (int i = 0; i < ROWS; i += THREADS / 8) {
      const T* src = i < rows ? x_src + (size_t)i * C : x;
      copy16(x_tile + swizzle<8>(copy_row + i, thread % 8) * 8, src, x_aligned, i < rows);
    }
    if (next_stage % PARTS == 0) {
      T* w_tile = w_tiles + next_w * (B * B);
      const T* w_src = blocks + (size_t)next_stored * (B * B);
#pragma unroll
      for (int i = thread; i < B * B / 8; i += THREADS) {
        const int chunk = i % (B / 8);
        T* dst = w_tile + chunk / 8 * SLAB + swizzle<8>(i / (B / 8), chunk % 8) * 8;
        copy16(dst, w_src + i * 8, w_aligned, true);
      }
      next_w = next_w + 1 == BLOCKS ? 0 : next_w + 1;
    }
    next_x = next_x + 1 == STAGES ? 0 : next_x + 1;
    if (++next_stage == n_stages) {
      next_stage = 0;
      next_tile++;
    }
    read_indices();
  }
  commit_copies();
};

read_indices();
#pragma unroll
for (int s = 0; s < AHEAD; s++) {
  copy_stage();
}
if (BIAS) {
  for (int i = thread; i < B; i += THREADS) {
    biases[i] = bias[r * B + i];
  }
  __syncthreads();
}
int used_x = 0;
int used_w = 0;
float acc[TILES][B / 2];
for (int tile = 0; tile < n_tiles; tile++, n0 += ROWS) {
#pragma unroll
  for (int j = 0; j < B / 2; j++) {
    const float first = BIAS ? float(biases[j / 4 * 8 + lane % 4 * 2 + j % 2]) : 0.0f;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      acc[i][j] = first;
    }
  }
  for (int s = 0; s < n_stages; s++) {
    wait_copies<AHEAD - 1>();
    show_copies();
    __syncthreads();  // this stage is there, and all warpgroups have done with the last but one
    const T* x_tile = x_tiles + used_x * X_TILE + first_row * DEPTH;
    const T* w_tile = w_tiles + used_w * (B * B) + s % PARTS * (TRANSPOSED ? DEPTH * 64 : SLAB);
    used_x = used_x + 1 == STAGES ? 0 : used_x + 1;
    if (s % PARTS == PARTS - 1) {
      used_w = used_w + 1 == BLOCKS ? 0 : used_w + 1;
    }
    begin_products();
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      const unsigned long long w = describe(w_tile + (TRANSPOSED ? k * 64 : k), SLAB * 2);
#pragma unroll
      for (int i = 0; i < TILES; i++) {
        const unsigned long long a = describe(x_tile + i * 64 * DEPTH + k, 16);
        Warpgroup<T, B, 0, TRANSPOSED>::multiply(acc[i], a, w);
      }
    }
    commit_products();
    copy_stage();
    wait_products<1>();
  }
  wait_products<0>();
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    const int row = n0 + first_row + 64 * i + thread / 32 % 4 * 16;
    store_tiles<T, 2, B / 8>(
        y + ((size_t)v * N + row) * out + r * B, out, N - row, B,
        [&](int half, int o, int e) { return acc[i][4 * o + 2 * half + e]; });
  }
}
