// The product of spmm_tiles.cu on Hopper's tensor cores, which read shared memory themselves.
//
// Inputs, output: as there.
// Launch
//   (R 384, shares, V) threads in groups of (384, 1, 1), which own what they own there. The last of
//   the 3 warpgroups copies, the others multiply.
//   Shared memory: STAGES (ROWS + B) 128 + 1024 bytes.
// Template
//   T half or bfloat16; B 64 or 128; INSIDE columns of the last block-column, 1 to B; ROWS of x in
//   a tile, 128 or 256; STAGES; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: the bias, then blocks in stored order, k ascending by 16.

#include "barriers.h"
#include "copies.h"
#include "wgmma.h"
#include "copiers.h"
#include "reader.h"
#include "stores.h"

constexpr int WARPGROUPS = 2;                    // that multiply
constexpr int COPIERS = 128;                     // threads
constexpr int TILES = ROWS / (64 * WARPGROUPS);  // 64 x B tiles of a warpgroup
constexpr int DEPTH = 64;                        // k in a stage: rows of 128 bytes
constexpr int PARTS = B / DEPTH;                 // stages of a block
constexpr int STAGE = (ROWS + B) * DEPTH;
extern __shared__ char shared[];
__shared__ unsigned long long full[STAGES];
__shared__ unsigned long long empty[STAGES];
T* tiles = reinterpret_cast<T*>(shared + (1024 - shared_address(shared) % 1024) % 1024);

const int r = blockIdx.x;
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warpgroup = thread / 128;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int all_tiles = (N + ROWS - 1) / ROWS;
const int begin_n = (size_t)all_tiles * blockIdx.y / gridDim.y * ROWS;
const int end_n = (size_t)all_tiles * (blockIdx.y + 1) / gridDim.y * ROWS;
const int begin = indptr[r];
const int n_stages = (indptr[r + 1] - begin) * PARTS;

if (thread < STAGES) {
  init_barrier(full + thread, COPIERS);
  init_barrier(empty + thread, 4 * WARPGROUPS);
}
__syncthreads();

if (warpgroup == WARPGROUPS) {
  // Eight threads copy a row of 64 elements. A transposed block lies in slabs of 64 outputs.
  constexpr int EVERY = COPIERS / 8;
  const int copy_row = thread % COPIERS / 8;
  const int chunk = thread % 8;
  const int place = swizzle<8>(copy_row, chunk) * 8;
  const T* x_mine = x + ((size_t)v * N + copy_row) * n_cols + chunk * 8;
  const T* blocks = data + (size_t)v * indices_shape[0] * (B * B) + chunk * 8;
  auto copy_as = [&](auto alignment) {
    constexpr bool ALIGNED = alignment.value;
    Copier<STAGES, STAGES - 2> copier{full, empty};
    for (int n0 = begin_n; n0 < end_n; n0 += ROWS) {
      Reader cols(indices, begin, indptr[r + 1]);
      Reader places(perm, begin, TRANSPOSED ? indptr[r + 1] : begin);
      for (int stage = 0; stage < n_stages; stage++) {
        const int j = begin + stage / PARTS;
        const int k = stage % PARTS * DEPTH;
        const T* x_src = x_mine + (size_t)n0 * n_cols + cols.at(j) * B + k;
        const T* w_src = blocks + (size_t)(TRANSPOSED ? places.at(j) : j) * (B * B) + copy_row * B;
        T* x_tile = tiles + copier.begin() * STAGE + place;
        T* w_tile = x_tile + ROWS * DEPTH;
        const int valid = (N - n0 - copy_row + EVERY - 1) / EVERY;
        // How many k of the stage lie in the matrix.
        const int depth = INSIDE < B ? n_cols - B + INSIDE - cols.at(j) * B - k : DEPTH;
        copy_rows<ALIGNED, ROWS / EVERY, EVERY * DEPTH>(x_tile, x_src, EVERY * (size_t)n_cols,
                                                        valid);
        if (TRANSPOSED) {
          const int valid_k = INSIDE < B ? (depth - copy_row + EVERY - 1) / EVERY : DEPTH;
#pragma unroll
          for (int o = 0; o < B; o += 64) {  // a slab
            copy_rows<ALIGNED, DEPTH / EVERY, EVERY * 64>(w_tile + o * DEPTH, w_src + k * B + o,
                                                          EVERY * B, valid_k);
          }
        } else if (INSIDE < B && depth < chunk * 8 + 8) {
#pragma unroll 1
          for (int o = 0; o < B; o += EVERY) {
            copy_first<ALIGNED>(w_tile + o * DEPTH, w_src + k + o * B, depth - chunk * 8);
          }
        } else {
          copy_rows<ALIGNED, B / EVERY, EVERY * DEPTH>(w_tile, w_src + k, EVERY * B, B);
        }
        copier.end();
      }
    }
    copier.finish();
  };
  if (((size_t)x | (size_t)data) % 16 == 0) {
    copy_as(Aligned());
  } else {
    copy_as(Unaligned());
  }
  return;
}

Ring ring{STAGES};
const int n_rows = (indptr_shape[0] - 1) * B;
const int warpgroup_n = warpgroup * TILES * 64;  // the first row of this warpgroup, in a tile
float acc[TILES][B / 2];
for (int n0 = begin_n; n0 < end_n; n0 += ROWS) {
#pragma unroll
  for (int e = 0; e < B / 2; e++) {
    const float bias_e =
        BIAS ? float(__ldg(bias + r * B + e / 4 * 8 + lane % 4 * 2 + e % 2)) : 0.0f;
#pragma unroll
    for (int tn = 0; tn < TILES; tn++) {
      acc[tn][e] = bias_e;
    }
  }
  int last_buffer = 0;  // of the last stage
  for (int stage = 0; stage < n_stages; stage++) {
    const T* x_tile = tiles + ring.buffer * STAGE + warpgroup_n * DEPTH;
    const T* w_tile = tiles + ring.buffer * STAGE + ROWS * DEPTH;
    wait_barrier(full + ring.buffer, ring.parity);
    begin_products();
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      const unsigned long long w = describe(w_tile + (TRANSPOSED ? k * 64 : k), DEPTH * 128);
#pragma unroll
      for (int tn = 0; tn < TILES; tn++) {
        const unsigned long long a = describe(x_tile + tn * 64 * DEPTH + k, 16);
        Warpgroup<T, B, 0, TRANSPOSED>::multiply(acc[tn], a, w);
      }
    }
    commit_products();
    wait_products<1>();
    if (stage > 0 && lane == 0) {
      arrive(empty + last_buffer);
    }
    last_buffer = ring.buffer;
    ring.advance();
  }
  wait_products<0>();
  if (n_stages > 0 && lane == 0) {
    arrive(empty + last_buffer);
  }
#pragma unroll
  for (int tn = 0; tn < TILES; tn++) {
    const int n = n0 + warpgroup_n + 64 * tn + thread / 32 % 4 * 16;
    store_tiles<T, 2, B / 8>(
        y + ((size_t)v * N + n) * n_rows + r * B, n_rows, N - n, B,
        [&](int row_tile, int to, int e) { return acc[tn][4 * to + 2 * row_tile + e]; });
  }
}
