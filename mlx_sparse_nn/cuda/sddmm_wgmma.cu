// The product of sddmm_tiles.cu on Hopper's tensor cores, which read shared memory themselves.
//
// Inputs, output: as there.
// Launch
//   (R shares 384, 1, V) threads in groups of (384, 1, 1), GROUP = 256 / B and GROUP shares at
//   least the length of every block-row. One group owns up to GROUP neighbouring blocks of one
//   block-row, which read the same columns of y, and walks the rows n. The last of its 3 warpgroups
//   copies, the others multiply 128 columns each.
//   Shared memory: STAGES (1 + GROUP) B 128 + 1024 bytes.
// Template
//   T half or bfloat16; B 64 or 128; STAGES.
// Sums in float32, n ascending by 16.

#include "barriers.h"
#include "copies.h"
#include "wgmma.h"
#include "copiers.h"
#include "stores.h"

constexpr int GROUP = 256 / B;   // blocks: a warpgroup has 128 columns
constexpr int WARPGROUPS = 2;    // that multiply
constexpr int SLABS = 256 / 64;  // of x: 64 columns, side by side in rows of 128 bytes
constexpr int TILES = B / 64;    // 64 x 128 tiles of a warpgroup, and slabs of y
constexpr int DEPTH = 64;        // n in a stage
constexpr int SLAB = 64 * DEPTH;
constexpr int STAGE = (TILES + SLABS) * SLAB;
extern __shared__ char shared[];
__shared__ unsigned long long full[STAGES];
__shared__ unsigned long long empty[STAGES];
T* tiles = reinterpret_cast<T*>(shared + (1024 - shared_address(shared) % 1024) % 1024);

const int R = indptr_shape[0] - 1;
const int r = blockIdx.x % R;
const int j0 = indptr[r] + blockIdx.x / R * GROUP;
const int count = min(GROUP, indptr[r + 1] - j0);
if (count <= 0) {
  return;
}
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int warpgroup = thread / 128;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int n_rows = in_register(y_shape[y_ndim - 1]);

if (thread < STAGES) {
  init_barrier(full + thread, 128);
  init_barrier(empty + thread, 4 * WARPGROUPS);
}
__syncthreads();

if (warpgroup == WARPGROUPS) {
  // Eight threads copy a row of a slab, of the same columns at every stage.
  const int copy_row = thread % 128 / 8;
  const int chunk = thread % 8;
  const int place = swizzle<8>(copy_row, chunk) * 8;
  const T* y_mine = y + ((size_t)v * N + copy_row) * n_rows + r * B + chunk * 8;
  const T* x_mine = x + ((size_t)v * N + copy_row) * n_cols + chunk * 8;
  int cols[SLABS];
#pragma unroll
  for (int q = 0; q < SLABS; q++) {
    cols[q] = q * 64 / B < count ? indices[j0 + q * 64 / B] * B + q * 64 % B : -1;
  }
  auto copy_as = [&](auto alignment) {
    constexpr bool ALIGNED = alignment.value;
    Copier<STAGES, STAGES - 2> copier{full, empty};
    for (int n0 = 0; n0 < N; n0 += DEPTH) {
      T* y_tile = tiles + copier.begin() * STAGE + place;
      T* x_tile = y_tile + TILES * SLAB;
      const T* y_src = y_mine + (size_t)n0 * n_rows;
      const T* x_src = x_mine + (size_t)n0 * n_cols;
      const int valid = (N - n0 - copy_row + 15) / 16;
#pragma unroll
      for (int q = 0; q < TILES; q++) {
        copy_rows<ALIGNED, DEPTH / 16, 16 * 64>(y_tile + q * SLAB, y_src + q * 64,
                                                16 * (size_t)n_rows, valid);
      }
#pragma unroll
      for (int q = 0; q < SLABS; q++) {
        if (cols[q] >= 0) {
          copy_rows<ALIGNED, DEPTH / 16, 16 * 64>(x_tile + q * SLAB, x_src + cols[q],
                                                  16 * (size_t)n_cols, valid);
        }
      }
      copier.end();
    }
    copier.finish();
  };
  if (((size_t)y | (size_t)x) % 16 == 0) {
    copy_as(Aligned());
  } else {
    copy_as(Unaligned());
  }
  return;
}

float acc[TILES][64];
#pragma unroll
for (int ti = 0; ti < TILES; ti++) {
#pragma unroll
  for (int e = 0; e < 64; e++) {
    acc[ti][e] = 0.0f;
  }
  hold_sums(acc[ti]);
}
Ring ring{STAGES};
int last_buffer = 0;  // of the last stage
for (int n0 = 0; n0 < N; n0 += DEPTH) {
  const T* y_tile = tiles + ring.buffer * STAGE;
  const T* x_tile = y_tile + (TILES + warpgroup * 2) * SLAB;
  wait_barrier(full + ring.buffer, ring.parity);
  begin_products();
#pragma unroll
  for (int m = 0; m < DEPTH; m += 16) {
#pragma unroll
    for (int ti = 0; ti < TILES; ti++) {
      const unsigned long long a = describe(y_tile + ti * SLAB + m * 64, SLAB * 2);
      Warpgroup<T, 128, 1, 1>::multiply(acc[ti], a, describe(x_tile + m * 64, SLAB * 2));
    }
  }
  commit_products();
  wait_products<1>();
  if (n0 > 0 && thread % 32 == 0) {
    arrive(empty + last_buffer);
  }
  last_buffer = ring.buffer;
  ring.advance();
}
wait_products<0>();

T* blocks = out + ((size_t)v * indices_shape[0] + j0) * (B * B);
#pragma unroll
for (int ti = 0; ti < TILES; ti++) {
  const int i = 64 * ti + thread / 32 % 4 * 16;
#pragma unroll
  for (int k = 0; k < 128; k += 64) {
    const int group_col = warpgroup * 128 + k;
    store_tiles<T, 2, 8>(blocks + (size_t)(group_col / B) * (B * B) + i * B + group_col % B, B, 16,
                         group_col / B < count ? 64 : 0, [&](int row_tile, int col_tile, int e) {
                           return acc[ti][k / 2 + 4 * col_tile + 2 * row_tile + e];
                         });
  }
}
