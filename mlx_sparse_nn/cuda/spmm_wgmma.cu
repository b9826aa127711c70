// The product of spmm_tiles.cu on Hopper's tensor cores, which read their operands from shared memory.
//
// Inputs, output: as there.
// Launch
//   (R THREADS, Y, V) threads in blocks of THREADS = 128 WARPGROUPS, which own what they do there.
//   Shared memory: STAGES (ROWS + B) 128 + 1024 bytes.
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
constexpr int STAGE = (ROWS + B) * DEPTH;
extern __shared__ char shared[];
__shared__ T biases[B];
T* tiles = reinterpret_cast<T*>(shared + (1024 - (unsigned)__cvta_generic_to_shared(shared) % 1024) % 1024);

const int r = blockIdx.x;
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int first_row = thread / 128 * TILES * 64;
const int N = held(x_shape[x_ndim - 2]);
const int C = held(x_shape[x_ndim - 1]);
const int out = (indptr_shape[0] - 1) * B;
const int all_tiles = (N + ROWS - 1) / ROWS;
const int first_tile = (size_t)all_tiles * blockIdx.y / gridDim.y;
const int n_tiles = (size_t)all_tiles * (blockIdx.y + 1) / gridDim.y - first_tile;
int n0 = first_tile * ROWS;
const bool aligned = ((size_t)x | (size_t)data) % 16 == 0;
const int begin = indptr[r];
const int end = indptr[r + 1];
const int n_stages = (end - begin) * PARTS;

// Copies run ahead, through all tiles. Eight threads copy a row of 64 elements; a block that is transposed
// lies in slabs of 64 outputs.
const int copy_row = thread / 8;
const T* x_mine = x + ((size_t)v * N + n0 + copy_row) * C + thread % 8 * 8;
const T* blocks = data + (size_t)v * indices_shape[0] * (B * B);
int next_tile = 0;   // of the stage to copy next: its tile, its place in the tile, its buffer,
int next_stage = 0;
int next_buffer = 0;
int next_col;        // and where its block lies
int next_stored;
auto read_indices = [&]() {
  const int j = begin + next_stage / PARTS;
  next_col = j < end ? indices[j] * B : 0;
  next_stored = !TRANSPOSED ? j : j < end ? perm[j] : 0;
};
auto copy_stage_as = [&](auto alignment) {
  constexpr bool ALIGNED = alignment.value;
  constexpr int UNROLL = ALIGNED ? 32 : 1;
  if (next_tile < n_tiles && n_stages > 0) {
    T* x_tile = tiles + next_buffer * STAGE;
    T* w_tile = x_tile + ROWS * DEPTH;
    const int k = next_stage % PARTS * DEPTH;
    const T* x_src = x_mine + (size_t)next_tile * ROWS * C + next_col + k;
    const int rows = N - (first_tile + next_tile) * ROWS - copy_row;
#pragma unroll UNROLL
    for (int i = 0; i < ROWS; i += THREADS / 8) {
      const T* src = i < rows ? x_src + (size_t)i * C : x;
      copy16<ALIGNED>(x_tile + swizzle<8>(copy_row + i, thread % 8) * 8, src, i < rows);
    }
    const T* w_src = blocks + (size_t)next_stored * (B * B) + thread % 8 * 8;
#pragma unroll UNROLL
    for (int i = 0; i < B; i += THREADS / 8) {
      const int row = copy_row + i;  // an output, or in slab row / DEPTH a k
      const T* src = TRANSPOSED ? w_src + (k + row % DEPTH) * B + row / DEPTH * 64 : w_src + row * B + k;
      copy16<ALIGNED>(w_tile + swizzle<8>(row, thread % 8) * 8, src, true);
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
for (int s = 0; s < AHEAD; s++) {
  copy_stage();
}
if (BIAS) {
  for (int i = thread; i < B; i += THREADS) {
    biases[i] = bias[r * B + i];
  }
  __syncthreads();
}
int used = 0;
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
    const T* x_tile = tiles + used * STAGE + first_row * DEPTH;
    const T* w_tile = tiles + used * STAGE + ROWS * DEPTH;
    used = used + 1 == STAGES ? 0 : used + 1;
    begin_products();
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      const unsigned long long w = describe(w_tile + (TRANSPOSED ? k * 64 : k), DEPTH * 128);
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
