// The product of spmm_tiles.cu on Hopper's tensor cores for some rows of x, where a thread block a
// block-row would leave the GPU idle: several thread blocks share its blocks.
//
// Inputs, output: as there. Where
// the blocks are split, y is partial sums (S, V, N, n_rows), with the bias in the first.
// Launch
//   (R S THREADS, ceil(N / ROWS), V) threads in groups of (THREADS, 1, 1). S groups own
//   one block-row and ROWS rows of x, each an equal share of the blocks. The last warpgroup copies,
//   the others multiply: one for 64 rows, else two. Shared memory: STAGES (ROWS + B) 128 + 1024
//   bytes.
// Template
//   T half or bfloat16; OUT, T, or float where the blocks are split; B 16, 32, 64 or 128; INSIDE
//   columns of the last block-column, 1 to B; ROWS 64 or 128; STAGES; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: the bias, then blocks in stored order, k ascending by 16.

#include "barriers.h"
#include "copies.h"
#include "wgmma.h"
#include "copiers.h"
#include "reader.h"
#include "stores.h"

constexpr int WARPGROUPS = ROWS == 64 ? 1 : 2;     // that multiply
constexpr int COPIERS = 128;                       // threads
constexpr int TILES = ROWS / (64 * WARPGROUPS);    // 64 x B tiles of a warpgroup
constexpr int DEPTH = 64;                          // k in a stage: rows of 128 bytes
constexpr int BLOCKS = B < DEPTH ? DEPTH / B : 1;  // of a stage, side by side,
constexpr int PARTS = B > DEPTH ? B / DEPTH : 1;   // or stages of a block
constexpr int STAGE = (ROWS + B) * DEPTH;
extern __shared__ char shared[];
__shared__ unsigned long long full[STAGES];
__shared__ unsigned long long empty[STAGES];
T* tiles = reinterpret_cast<T*>(shared + (1024 - shared_address(shared) % 1024) % 1024);

const int R = in_register(indptr_shape[0] - 1);
const int splits = gridDim.x / R;
const int r = blockIdx.x % R;
const int split = blockIdx.x / R;
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warpgroup = thread / 128;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int n0 = blockIdx.y * ROWS;
const int row_begin = indptr[r];
const int row_blocks = indptr[r + 1] - row_begin;
const int begin = row_begin + (int)((long long)row_blocks * split / splits);
const int end = row_begin + (int)((long long)row_blocks * (split + 1) / splits);
const int n_stages = ((end - begin) * PARTS + BLOCKS - 1) / BLOCKS;

if (thread < STAGES) {
  init_barrier(full + thread, COPIERS);
  init_barrier(empty + thread, 4 * WARPGROUPS);
}
__syncthreads();

if (warpgroup == WARPGROUPS) {
  // Eight threads copy a row of 64 elements: of x, and of each block its rows, which are outputs,
  // or k where it is transposed. Then it lies in slabs of 64 outputs.
  constexpr int EVERY = COPIERS / 8;
  constexpr int W_ROWS = TRANSPOSED && B > DEPTH ? DEPTH : B;
  constexpr int SLABS = TRANSPOSED ? PARTS : 1;
  const int copy_row = thread % COPIERS / 8;
  const int chunk = thread % 8;
  const int own = chunk * 8 / B;  // block of the stage, and a place in its rows
  const int at = chunk * 8 % B;
  const int place = swizzle<8>(copy_row, chunk) * 8;
  const int n_valid = N - n0 - copy_row;
  const T* x_mine = x + ((size_t)v * N + n0 + copy_row) * n_cols + at;
  const T* w_mine = data + (size_t)v * indices_shape[0] * (B * B) + copy_row * B + at;
  auto copy_as = [&](auto alignment) {
    constexpr bool ALIGNED = alignment.value;
    constexpr int UNROLL = ALIGNED ? 16 : 1;
    Copier<STAGES, STAGES - 2> copier{full, empty};
    Reader cols(indices, begin, end);
    Reader places(perm, begin, TRANSPOSED ? end : begin);
    for (int stage = 0; stage < n_stages; stage++) {
      int col = 0;
      int stored = -1;  // none: zeros
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        const int j = begin + stage * BLOCKS / PARTS + b;
        if (j < end) {
          const int col_b = cols.at(j);
          const int stored_b = TRANSPOSED ? places.at(j) : j;
          col = b == own ? col_b : col;
          stored = b == own ? stored_b : stored;
        }
      }
      const int k = stage % PARTS * DEPTH;
      const bool there = stored >= 0;
      const T* x_src = x_mine + col * B + k;
      const T* w_src = w_mine + (size_t)max(0, stored) * (B * B) + (TRANSPOSED ? k * B : k);
      // How many k of the block from k on lie in the matrix.
      const int depth = !there ? 0 : INSIDE < B && (col + 1) * B == n_cols ? INSIDE - k : B;
      T* x_tile = tiles + copier.begin() * STAGE + place;
      T* w_tile = x_tile + ROWS * DEPTH;
#pragma unroll UNROLL
      for (int i = 0; i < ROWS; i += EVERY) {
        if (i < n_valid) {  // other rows are not stored either
          copy16<ALIGNED>(x_tile + i * DEPTH, x_src + (size_t)i * n_cols, there);
        }
      }
#pragma unroll UNROLL
      for (int i = 0; i < W_ROWS; i += EVERY) {
#pragma unroll
        for (int slab = 0; slab < SLABS; slab++) {
          T* dst = w_tile + (slab * W_ROWS + i) * DEPTH;
          const T* src = w_src + i * B + slab * DEPTH;
          if (TRANSPOSED) {
            copy16<ALIGNED>(dst, src, copy_row + i < depth);
          } else if (INSIDE < B) {
            copy_first<ALIGNED>(dst, src, depth - at);
          } else {
            copy16<ALIGNED>(dst, src, there);
          }
        }
      }
      copier.end();
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
const int n_rows = R * B;
const int warpgroup_n = warpgroup * TILES * 64;  // the first row of this warpgroup, in the tile
float acc[TILES][B / 2];
#pragma unroll
for (int e = 0; e < B / 2; e++) {
  const bool first = BIAS && split == 0;
  const float bias_e = first ? float(__ldg(bias + r * B + e / 4 * 8 + lane % 4 * 2 + e % 2)) : 0.0f;
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
    const T* w_k = w_tile + (TRANSPOSED && B < DEPTH ? k % B * DEPTH + k / B * B
                             : TRANSPOSED            ? k * DEPTH
                                                     : k);
    const unsigned long long w = describe(w_k, DEPTH * 128);
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
const int n = warpgroup_n + thread / 32 % 4 * 16;  // the first row of this warp, in the tile
OUT* y_tile = y + (((size_t)split * gridDim.z + v) * N + n0) * n_rows + r * B;
#pragma unroll
for (int tn = 0; tn < TILES; tn++) {
  store_sums_of_tile<OUT, B>(y_tile + (size_t)(n + 64 * tn) * n_rows, n_rows, N - n0 - n - 64 * tn,
                             B, acc[tn]);
}
