// The product of sddmm_tiles.cu on Hopper's tensor cores, which read their operands from shared memory.
//
// Inputs, output: as there.
// Launch
//   (R L 128 WARPGROUPS, 1, V) threads in blocks of 128 WARPGROUPS, where GROUP L is at least the length
//   of every block-row. One thread block owns up to GROUP neighbouring blocks of one block-row, which
//   share the panel of y, and walks the rows n.
//   Shared memory: STAGES (1 + GROUP) B 128 + 1024 bytes.
// Template
//   T half or bfloat16; B 64 or 128; WARPGROUPS, of 128 columns each; GROUP blocks, 128 WARPGROUPS / B;
//   STAGES.
// Sums in float32, n ascending by 16.

#include "copies.h"
#include "stores.h"
#include "wgmma.h"

constexpr int THREADS = 128 * WARPGROUPS;
constexpr int WIDTH = B * GROUP;
constexpr int TILES = B / 64;       // 64 x 128 tiles of a warpgroup
constexpr int DEPTH = 64;           // n in a stage
constexpr int SLAB = 64 * DEPTH;    // 64 columns, side by side in rows of 128 bytes
constexpr int STAGE = (TILES + WIDTH / 64) * SLAB;
constexpr int AHEAD = STAGES - 2;  // stages under way: of the others, one is read and one drains
static_assert(WIDTH == 128 * WARPGROUPS, "a warpgroup has 128 columns");
extern __shared__ char shared[];
T* tiles = reinterpret_cast<T*>(shared + (1024 - (unsigned)__cvta_generic_to_shared(shared) % 1024) % 1024);

const int n_block_rows = indptr_shape[0] - 1;
const int row = blockIdx.x % n_block_rows;
const int j0 = indptr[row] + blockIdx.x / n_block_rows * GROUP;
const int count = min(GROUP, indptr[row + 1] - j0);
if (count <= 0) {
  return;
}
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int group = thread / 128;
const int N = held(x_shape[x_ndim - 2]);
const int C = held(x_shape[x_ndim - 1]);
const int R = held(y_shape[y_ndim - 1]);
const bool aligned = ((size_t)y | (size_t)x) % 16 == 0;
const int n_stages = (N + DEPTH - 1) / DEPTH;

// Eight threads copy a row of a slab, of the same columns at every stage.
const int copy_row = thread / 8;
const T* y_mine = y + ((size_t)v * N + copy_row) * R + row * B + thread % 8 * 8;
const T* x_mine = x + ((size_t)v * N + copy_row) * C + thread % 8 * 8;
int cols[WIDTH / 64];
#pragma unroll
for (int q = 0; q < WIDTH / 64; q++) {
  cols[q] = q * 64 / B < count ? indices[j0 + q * 64 / B] * B + q * 64 % B : -1;
}
auto copy_stage_as = [&](int s, auto alignment) {
  constexpr bool ALIGNED = alignment.value;
  constexpr int UNROLL = ALIGNED ? 32 : 1;
  T* y_tile = tiles + s % STAGES * STAGE;
  T* x_tile = y_tile + TILES * SLAB;
#pragma unroll UNROLL
  for (int i = 0; i < DEPTH; i += THREADS / 8) {
    const int n = s * DEPTH + i;
    const bool valid = n + copy_row < N;
    const int at = swizzle<8>(copy_row + i, thread % 8) * 8;
#pragma unroll
    for (int q = 0; q < TILES; q++) {
      copy16<ALIGNED>(y_tile + q * SLAB + at, valid ? y_mine + (size_t)n * R + q * 64 : y, valid);
    }
#pragma unroll
    for (int q = 0; q < WIDTH / 64; q++) {
      if (cols[q] >= 0) {
        copy16<ALIGNED>(x_tile + q * SLAB + at, valid ? x_mine + (size_t)n * C + cols[q] : x, valid);
      }
    }
  }
};
auto copy_stage = [&](int s) {
  if (aligned) {
    copy_stage_as(s, Aligned());
  } else {
    copy_stage_as(s, Unaligned());
  }
};

float acc[TILES][64];
#pragma unroll
for (int i = 0; i < TILES; i++) {
#pragma unroll
  for (int j = 0; j < 64; j++) {
    acc[i][j] = 0.0f;
  }
}
#pragma unroll 1
for (int s = 0; s < AHEAD; s++) {
  if (s < n_stages) {
    copy_stage(s);
  }
  commit_copies();
}
for (int s = 0; s < n_stages; s++) {
  wait_copies<AHEAD - 1>();
  show_copies();
  __syncthreads();  // stage s is there, and all warpgroups have done with stage s - 2
  const T* y_tile = tiles + s % STAGES * STAGE;
  const T* x_tile = y_tile + (TILES + group * 2) * SLAB;
  begin_products();
#pragma unroll
  for (int n = 0; n < DEPTH; n += 16) {
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      const unsigned long long a = describe(y_tile + i * SLAB + n * 64, SLAB * 2);
      Warpgroup<T, 128, 1, 1>::multiply(acc[i], a, describe(x_tile + n * 64, SLAB * 2));
    }
  }
  commit_products();
  if (s + AHEAD < n_stages) {
    copy_stage(s + AHEAD);
  }
  commit_copies();
  wait_products<1>();
}
wait_products<0>();

T* blocks = out + ((size_t)v * indices_shape[0] + j0) * (B * B);
#pragma unroll
for (int i = 0; i < TILES; i++) {
  const int place = 64 * i + thread / 32 % 4 * 16;
#pragma unroll
  for (int k = 0; k < 128; k += 64) {
    const int col = group * 128 + k;
    store_tiles<T, 2, 8>(
        blocks + (size_t)(col / B) * (B * B) + place * B + col % B, B, 16, col / B < count ? 64 : 0,
        [&](int half, int o, int e) { return acc[i][k / 2 + 4 * o + 2 * half + e]; });
  }
}
