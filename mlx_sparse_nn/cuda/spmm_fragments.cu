// The product of spmm_tiles.cu on Hopper's tensor cores, for every block size and dtype: x goes to
// registers, where floats are rounded, and tensor cores read blocks from shared memory.
//
// Inputs, output: as there; or x, y and bias end with the matrix, x at multiples of 16 bytes. Where
// stages are split, y is partial sums (S, V, N, n_rows), with the bias in the first.
// Launch
//   (R S THREADS, shares, V) threads in groups of (THREADS, 1, 1), THREADS = 128 (WARPGROUPS +
//   1). S groups own what a group owns there, each an equal part of the stages of a block-row.
//   The last warpgroup copies, the others multiply. Shared memory: STAGES times the bytes of a
//   stage, and 1024.
// Template
//   T half, bfloat16 or float, which is rounded to TF32; OUT, T, or float where stages are split; B
//   a multiple of 8, at most 128; WIDTH B or more, a number of columns of fragments.h; INSIDE
//   columns of the last block-column, 1 to B; CROPPED 1 where x ends with the matrix, and OUTSIDE
//   outputs that y and bias lack then; WARPGROUPS that multiply, and TILES of 64 rows of x of each;
//   STAGES; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: the bias, then blocks in stored order, k ascending by 32 bytes.

#include "barriers.h"
#include "copies.h"
#include "mma.h"
#include "wgmma.h"
#include "copiers.h"
#include "stores.h"
#include "fragments.h"

constexpr int ROWS = 64 * TILES * WARPGROUPS;  // of x
constexpr int COPIERS = 128;                   // threads
constexpr int CHUNK = 16 / sizeof(T);          // elements
constexpr int DEPTH = 8 * CHUNK;               // k in a stage: rows of 128 bytes
constexpr int STEP = 2 * CHUNK;                // k in a product
constexpr int STEPS = DEPTH / STEP;
constexpr bool FLOATS = sizeof(T) == 4;
// Of W, products read rows along k. Where it is transposed they read it across, in slabs of 64
// outputs, but not floats: these are transposed once they are there.
constexpr bool ACROSS = TRANSPOSED && !FLOATS;
constexpr bool RAW = TRANSPOSED && FLOATS;
constexpr int SLAB = 64 * DEPTH;
constexpr int W_TILE = ACROSS ? (WIDTH + 63) / 64 * SLAB : WIDTH * DEPTH;
constexpr int RAW_STRIDE = B + CHUNK;
constexpr int RAW_TILE = RAW ? (DEPTH * RAW_STRIDE + 255) / 256 * 256 : 0;
constexpr int STAGE = ROWS * DEPTH + W_TILE + RAW_TILE;
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
const int all_tiles = (N + ROWS - 1) / ROWS;
const int begin_n = (size_t)all_tiles * blockIdx.y / gridDim.y * ROWS;
const int end_n = (size_t)all_tiles * (blockIdx.y + 1) / gridDim.y * ROWS;
const int begin = indptr[r];
const int end = indptr[r + 1];
const int all_stages = ((end - begin) * B + DEPTH - 1) / DEPTH;
const int first_stage = all_stages * split / splits;
const int n_stages = all_stages * (split + 1) / splits - first_stage;

if (thread < STAGES) {
  init_barrier(full + thread, COPIERS);
  init_barrier(empty + thread, 4 * WARPGROUPS);
}
__syncthreads();

if (warpgroup == WARPGROUPS) {
  if (GIVEN) {
    give_registers<GIVEN ? GIVEN : 24>();
  }
  // Eight threads copy 128 bytes of a row of x, or of W. Where floats lie transposed, each warp
  // copies, and then transposes, every fourth eight outputs.
  constexpr int EVERY = COPIERS / 8;
  constexpr int W_KS = TRANSPOSED ? DEPTH / 16 : 0;  // k of W that a thread copies, 16 apart
  const int t = thread % COPIERS;
  const int copy_row = t / 8;
  const int chunk = t % 8;
  const int place = swizzle<8>(copy_row, chunk) * CHUNK;
  const int w_k0 = RAW ? lane / 2 : copy_row;
  const int n_inside = CROPPED ? n_cols : n_cols - B + INSIDE;
  const T* x_mine = x + ((size_t)v * N + copy_row) * n_cols;
  const T* blocks = data + (size_t)v * indices_shape[0] * (B * B);
  // Of the next stage: the column of this thread's chunk of x, and where its W lies, or -1.
  int next_col;
  int next_stored[W_KS + 1];
  auto read_indices = [&](int i) {
    const int k = (first_stage + i) * DEPTH + chunk * CHUNK;
    const int j = begin + k / B;
    next_col = j < end ? __ldg(indices + j) * B + k % B : -1;
    if (INSIDE < B && next_col >= n_inside) {
      next_col = -1;
    }
#pragma unroll
    for (int q = 0; q < W_KS; q++) {
      const int w_k = (first_stage + i) * DEPTH + w_k0 + 16 * q;
      const int w_j = begin + w_k / B;
      next_stored[q] = w_j < end ? __ldg(perm + w_j) : -1;
      if (INSIDE < B && w_j < end && __ldg(indices + w_j) * B + w_k % B >= n_inside) {
        next_stored[q] = -1;
      }
    }
  };
  auto copy_as = [&](auto alignment) {
    constexpr bool ALIGNED = alignment.value;
    Copier<STAGES, STAGES - 2> copier{full, empty};
    // Round, or transpose, what this warp has copied of W.
    auto finish_w = [&](int buffer) {
      T* w_tile = tiles + buffer * STAGE + ROWS * DEPTH;
      if (RAW) {
        __syncwarp();
#pragma unroll
        for (int o = t / 32 * 8; o < B; o += 32) {
#pragma unroll
          for (int i = lane / 8; i < 8; i += 4) {
            transpose_chunk<RAW_STRIDE>(w_tile + swizzle<8>(o + lane % 8, i) * CHUNK,
                                        w_tile + W_TILE + i * CHUNK * RAW_STRIDE + o + lane % 8);
          }
        }
      } else if (FLOATS) {
#pragma unroll
        for (int o = 0; o < B; o += EVERY) {
          if (o + copy_row < B) {
            round_chunk(w_tile + place + o * DEPTH);
          }
        }
      }
    };
    if (n_stages > 0) {
      read_indices(0);
    }
    for (int n0 = begin_n; n0 < end_n; n0 += ROWS) {
      for (int i = 0; i < n_stages; i++) {
        const int k = (first_stage + i) * DEPTH;
        const int col = next_col;
        int stored[W_KS + 1];
#pragma unroll
        for (int q = 0; q < W_KS; q++) {
          stored[q] = next_stored[q];
        }
        T* x_tile = tiles + copier.begin() * STAGE;
        T* w_tile = x_tile + ROWS * DEPTH;
        read_indices(i + 1 < n_stages ? i + 1 : 0);
        copy_rows<ALIGNED, ROWS / EVERY, EVERY * DEPTH>(
            x_tile + place, x_mine + (size_t)n0 * n_cols + max(0, col), EVERY * (size_t)n_cols,
            col < 0 ? 0 : (N - n0 - copy_row + EVERY - 1) / EVERY);
        if (TRANSPOSED) {
#pragma unroll
          for (int q = 0; q < W_KS; q++) {
            const int w_k = w_k0 + 16 * q;
            const T* src = blocks + (size_t)max(0, stored[q]) * (B * B) + (k + w_k) % B * B;
            if (RAW) {
#pragma unroll
              for (int o = t / 32 * 8; o < B; o += 32) {
                const int o_mine = o + lane % 2 * CHUNK;
                copy16<ALIGNED>(w_tile + W_TILE + w_k * RAW_STRIDE + o_mine, src + o_mine,
                                stored[q] >= 0);
              }
            } else {
#pragma unroll
              for (int o = chunk * CHUNK; o < B; o += 64) {
                copy16<ALIGNED>(w_tile + o / 64 * SLAB + place + 16 * q * DEPTH, src + o,
                                stored[q] >= 0);
              }
            }
          }
        } else {
          const int chunk_k = k + chunk * CHUNK;
          const T* src =
              blocks + (size_t)(begin + chunk_k / B) * (B * B) + copy_row * B + chunk_k % B;
          const int count = INSIDE < B ? n_inside - col : CHUNK;  // k in the matrix
          if (INSIDE < B && col >= 0 && count < CHUNK) {
#pragma unroll 1
            for (int o = 0; o + copy_row < B; o += EVERY) {
              copy_first<ALIGNED>(w_tile + place + o * DEPTH, src + o * B, count);
            }
          } else {
#pragma unroll
            for (int o = 0; o < B; o += EVERY) {
              if (o + copy_row < B) {
                copy16<ALIGNED>(w_tile + place + o * DEPTH, col < 0 ? blocks : src + o * B,
                                col >= 0);
              }
            }
          }
        }
        copier.end(finish_w);
      }
    }
    copier.finish(finish_w);
  };
  if (((size_t)x | (size_t)data) % 16 == 0) {
    copy_as(Aligned());
  } else {
    copy_as(Unaligned());
  }
  return;
}

if (TAKEN) {
  take_registers<TAKEN ? TAKEN : 24>();
}
Ring ring{STAGES};
const int n_rows = R * B - OUTSIDE;
const int n_outputs = min(B, n_rows - r * B);
const int warp_n = warpgroup * TILES * 64 + thread / 32 % 4 * 16;  // of the first tile
float acc[TILES][WIDTH / 2];
for (int n0 = begin_n; n0 < end_n; n0 += ROWS) {
#pragma unroll
  for (int e = 0; e < WIDTH / 2; e++) {
    const int o = e / 4 * 8 + lane % 4 * 2 + e % 2;
    const bool has_bias = BIAS && split == 0 && o < n_outputs;
    const float bias_o = has_bias ? float(__ldg(bias + r * B + o)) : 0.0f;
#pragma unroll
    for (int tn = 0; tn < TILES; tn++) {
      acc[tn][e] = bias_o;
    }
  }
#pragma unroll
  for (int tn = 0; tn < TILES; tn++) {
    hold_sums(acc[tn]);
  }
  for (int stage = 0; stage < n_stages; stage++) {
    const T* x_tile = tiles + ring.buffer * STAGE;
    const T* w_tile = x_tile + ROWS * DEPTH;
    wait_barrier(full + ring.buffer, ring.parity);
    unsigned xs[STEPS][TILES][4];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
#pragma unroll
      for (int tn = 0; tn < TILES; tn++) {
        const int m = warp_n + 64 * tn + lane % 16;
        load_matrix4<false>(xs[s][tn], x_tile + swizzle<8>(m, 2 * s + lane / 16) * CHUNK);
        round_factors<T>(xs[s][tn]);
      }
      begin_products();
      const unsigned long long w = ACROSS ? describe(w_tile + s * STEP * 64, SLAB * sizeof(T))
                                          : describe(w_tile + s * STEP, 16);
#pragma unroll
      for (int tn = 0; tn < TILES; tn++) {
        FragmentProduct<T, WIDTH, ACROSS>::multiply(acc[tn], xs[s][tn], w);
      }
      commit_products();
    }
    wait_products<0>();
    if (lane == 0) {
      arrive(empty + ring.buffer);
    }
    ring.advance();
  }
#pragma unroll
  for (int tn = 0; tn < TILES; tn++) {
    const int n = n0 + warp_n + 64 * tn;
    OUT* y_tile = y + (((size_t)split * gridDim.z + v) * N + n) * n_rows + r * B;
    store_sums_of_tile<OUT, WIDTH>(y_tile, n_rows, N - n, n_outputs, acc[tn]);
  }
}
