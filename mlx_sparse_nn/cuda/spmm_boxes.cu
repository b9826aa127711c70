// The product of spmm_tiles.cu on Hopper's tensor cores, with the outputs of blocks as the rows of
// products and 256 rows of x as their columns: so they read the least of shared memory. Boxes of x
// and of blocks are copied by the tensor memory accelerator.
//
// Inputs, output: as there, and scratch (2 MAP for each thread block), the maps of x and of data.
// Launch
//   (R 384, shares, V) threads in groups of (384, 1, 1), which own what they own there. The last of
//   the 3 warpgroups copies. The others have 64 outputs of B = 128 each, or 256 rows of x.
//   Shared memory: STAGES (ROWS + B) 128 + 1024 bytes, ROWS = 32768 / B.
// Template
//   T half or bfloat16; B 64 or 128; STAGES; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: blocks in stored order, k ascending by 16, then the bias.

#include "barriers.h"
#include "boxes.h"
#include "copies.h"
#include "mma.h"
#include "wgmma.h"
#include "reader.h"
#include "stores.h"

constexpr int WARPGROUPS = 2;  // that multiply
constexpr int COPIERS = 128;   // threads
constexpr int COLS = 256;      // rows of x of a product
constexpr int ROWS = 32768 / B;
constexpr int DEPTH = 64;         // k in a stage: rows of 128 bytes
constexpr int PARTS = B / DEPTH;  // stages of a block
constexpr int X_TILE = ROWS * DEPTH;
constexpr int STAGE = X_TILE + B * DEPTH;
extern __shared__ char shared[];
__shared__ unsigned long long full[STAGES];
__shared__ unsigned long long empty[STAGES];
__shared__ __align__(128) int map_space[2 * MAP];
T* tiles = reinterpret_cast<T*>(shared + (1024 - shared_address(shared) % 1024) % 1024);

const int r = blockIdx.x;
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warpgroup = thread / 128;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int n_blocks = in_register(indices_shape[0]);
const int all_tiles = (N + ROWS - 1) / ROWS;
const int begin_n = (size_t)all_tiles * blockIdx.y / gridDim.y * ROWS;
const int end_n = (size_t)all_tiles * (blockIdx.y + 1) / gridDim.y * ROWS;
const int begin = indptr[r];
const int end = indptr[r + 1];
const int n_stages = (end - begin) * PARTS;
const bool aligned = ((size_t)x | (size_t)data) % 16 == 0;

if (thread < STAGES) {
  init_barrier(full + thread, aligned ? 1 : COPIERS);
  init_barrier(empty + thread, 4 * WARPGROUPS);
  show_barriers();
}
__syncthreads();

if (warpgroup == WARPGROUPS) {
  give_registers<40>();
  const int copier = thread % COPIERS;
  if (aligned && copier >= 32) {
    return;
  }
  int* maps = scratch + (((size_t)v * gridDim.y + blockIdx.y) * gridDim.x + r) * (2 * MAP);
  if (aligned) {
    make_map(maps, map_space, x, gridDim.z * N, n_cols, min(ROWS, 256));
    make_map(maps + MAP, map_space + MAP, data, gridDim.z * n_blocks * B, B, 64);
  }
  Ring ring{STAGES};
  for (int n0 = begin_n; n0 < end_n; n0 += ROWS) {
    Reader cols(indices, begin, end);
    Reader places(perm, begin, TRANSPOSED ? end : begin);
    for (int stage = 0; stage < n_stages; stage++) {
      const int j = begin + stage / PARTS;
      const int k = stage % PARTS * DEPTH;
      const int col = cols.at(j) * B + k;
      const int block = v * n_blocks + (TRANSPOSED ? places.at(j) : j);
      T* x_tile = tiles + ring.buffer * STAGE;
      T* w_tile = x_tile + X_TILE;
      unsigned long long* barrier = full + ring.buffer;
      wait_barrier(empty + ring.buffer, ring.parity ^ 1);
      if (aligned) {
        if (lane == 0) {
          arrive_before(barrier, STAGE * sizeof(T));
#pragma unroll
          for (int row = 0; row < ROWS; row += 256) {
            copy_box(x_tile + row * DEPTH, maps, v * N + n0 + row, col, barrier);
          }
#pragma unroll
          for (int o = 0; o < B; o += 64) {
            copy_box(w_tile + o * DEPTH, maps + MAP, block * B + (TRANSPOSED ? k : o),
                     TRANSPOSED ? o : k, barrier);
          }
        }
        __syncwarp();
      } else {
        for (int i = copier; i < (ROWS + B) * 8; i += COPIERS) {
          const int row = i / 8;
          const int chunk = i % 8;
          T* dst = x_tile + swizzle<8>(row, chunk) * 8;
          const int o = row - ROWS;
          const T* w_src = data + (size_t)block * (B * B) + chunk * 8 +
                           (TRANSPOSED ? (k + o % 64) * B + o / 64 * 64 : o * B + k);
          const T* x_src = x + ((size_t)v * N + n0 + row) * n_cols + col + chunk * 8;
          copy16<false>(dst, o >= 0 ? w_src : x_src, o >= 0 || n0 + row < N);
        }
        show_copies();
        arrive(barrier);
      }
      ring.advance();
    }
  }
  return;
}

take_registers<232>();
Ring ring{STAGES};
const int n_rows = (indptr_shape[0] - 1) * B;
const int warpgroup_o = B == 128 ? warpgroup * 64 : 0;
const int warpgroup_n = B == 128 ? 0 : warpgroup * COLS;
const int o = r * B + warpgroup_o + thread / 32 % 4 * 16;  // this warp's first output
float acc[COLS / 2];
for (int n0 = begin_n; n0 < end_n; n0 += ROWS) {
#pragma unroll
  for (int e = 0; e < COLS / 2; e++) {
    acc[e] = 0.0f;
  }
  int last_buffer = 0;  // of the last stage
  for (int stage = 0; stage < n_stages; stage++) {
    const T* tile = tiles + ring.buffer * STAGE;
    const unsigned long long xs = describe(tile + warpgroup_n * DEPTH, 16);
    const unsigned long long w = describe(tile + X_TILE + warpgroup_o * DEPTH, DEPTH * 128);
    wait_barrier(full + ring.buffer, ring.parity);
    begin_products();
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      Warpgroup<T, COLS, TRANSPOSED, 0>::multiply(acc, advance(w, TRANSPOSED ? k * 64 : k),
                                                  advance(xs, k));
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
  // Sums of 8 outputs lie across lanes: transposed, a lane has 8 outputs of a row of x.
  const float bias_0 = BIAS ? float(__ldg(bias + o + lane / 4)) : 0.0f;
  const float bias_1 = BIAS ? float(__ldg(bias + o + lane / 4 + 8)) : 0.0f;
#pragma unroll
  for (int tile = 0; tile < COLS / 8; tile += 2) {
    unsigned pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float* sums = acc + 4 * (tile + i / 2) + 2 * (i % 2);
      const float b = i % 2 ? bias_1 : bias_0;
      pairs[i] = transpose_tile(pack2(T(), sums[0] + b, sums[1] + b));
    }
    const uint4 outputs = gather_tile(pairs);
    const int n = n0 + warpgroup_n + 8 * (tile + lane % 4 / 2) + lane / 4;
    if (n < N) {
      T* place = y + ((size_t)v * N + n) * n_rows + o + lane % 2 * 8;
      *reinterpret_cast<uint4*>(place) = outputs;
    }
  }
}
