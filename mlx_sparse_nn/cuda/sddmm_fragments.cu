// The product of sddmm_tiles.cu on Hopper's tensor cores, for every block size and dtype: y goes to
// registers, as rows of products, and tensor cores read x from shared memory. The rows n come in
// splits: out[s] sums those of split s.
//
// Inputs
//   y, x, indptr, indices: as there, or y and x end with the matrix, at multiples of 16 bytes
//   step     (1) int32: rows n of a split
// Output
//   out      (S, V, n_blocks, B, B) OUT
// Launch
//   (R shares THREADS, S, V) threads in groups of (THREADS, 1, 1), THREADS = 512, or 384 of 16
//   bits, GROUP = 256 / B and GROUP shares at least the length of every block-row. One group owns
//   up to GROUP neighbouring blocks of one block-row, and walks the rows n of its split. Two
//   warpgroups multiply, 128 columns each; the others copy. Shared memory: (STAGES + RAW) (X_TILE +
//   Y_TILE) elements, and 1024 bytes.
// Template
//   T half, bfloat16 or float, which is rounded to TF32; OUT, T or float; B a multiple of 8, at
//   most 128; STAGES; RAW stages of floats before they are transposed, else 0.
// Sums in float32, n ascending by 32 bytes.

#include "barriers.h"
#include "copies.h"
#include "mma.h"
#include "wgmma.h"
#include "copiers.h"
#include "stores.h"
#include "fragments.h"

constexpr bool FLOATS = sizeof(T) == 4;      // which products read with n along the rows
constexpr int WARPGROUPS = 2;                // that multiply
constexpr int COPIERS = FLOATS ? 256 : 128;  // threads
constexpr int COLS = 128 * WARPGROUPS;       // of x
constexpr int GROUP = COLS / B;              // blocks
constexpr int TILES = (B + 63) / 64;         // 64 x 128 tiles of a warpgroup
constexpr int CHUNK = 16 / sizeof(T);        // elements
constexpr int DEPTH = 8 * CHUNK;             // n in a stage
constexpr int STEP = 2 * CHUNK;              // n in a product
constexpr int STEPS = DEPTH / STEP;
constexpr int Y_CHUNKS = B / CHUNK;
constexpr int Y_STRIDE = (FLOATS ? column_stride<Y_CHUNKS>() : row_stride<Y_CHUNKS>()) * CHUNK;
constexpr int Y_TILE = DEPTH * Y_STRIDE;
constexpr int X_TILE = COLS * DEPTH;
constexpr int SLAB = 64 * DEPTH;  // of x, where it is not transposed: 64 columns
constexpr int Y_STAGES = STAGES + RAW;
extern __shared__ char shared[];
__shared__ unsigned long long full[STAGES];
__shared__ unsigned long long empty[STAGES];
T* x_tiles = reinterpret_cast<T*>(shared + (1024 - shared_address(shared) % 1024) % 1024);
T* raw_tiles = x_tiles + STAGES * X_TILE;
T* y_tiles = raw_tiles + RAW * X_TILE;

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
const int warpgroup = thread / 128;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int n_rows = in_register(y_shape[y_ndim - 1]);
const int begin_n = blockIdx.y * step[0];
const int end_n = min(N, begin_n + step[0]);
const int n_stages = (end_n - begin_n + DEPTH - 1) / DEPTH;
// Where a chunk lies in a tile of y.
auto y_place = [](int row, int chunk) {
  return FLOATS ? row * Y_STRIDE + chunk * CHUNK : swizzle<Y_CHUNKS>(row, chunk) * CHUNK;
};

if (thread < STAGES) {
  init_barrier(full + thread, COPIERS);
  init_barrier(empty + thread, 4 * WARPGROUPS);
}
__syncthreads();

if (warpgroup >= WARPGROUPS) {
  give_registers<FLOATS ? 56 : 72>();
  const int t = thread - 128 * WARPGROUPS;
  const bool aligned = ((size_t)y | (size_t)x) % 16 == 0;
  // The column of x of a chunk of the group, or -1 where the group has no such block.
  auto col_of = [&](int group_col) {
    return group_col / B < count ? indices[j0 + group_col / B] * B + group_col % B : -1;
  };
  constexpr int Y_EVERY = COPIERS / DEPTH;  // threads that copy a row of y
  const int y_row = t / Y_EVERY;
  const T* y_mine = y + ((size_t)v * N + begin_n + y_row) * n_rows + r * B;
  auto copy_y = [&](int stage, auto alignment) {
    T* y_tile = y_tiles + stage % Y_STAGES * Y_TILE;
    const int there = begin_n + stage * DEPTH + y_row < end_n ? n_rows - r * B : 0;
    const T* src = y_mine + (size_t)stage * DEPTH * n_rows;
#pragma unroll
    for (int c = t % Y_EVERY; c < Y_CHUNKS; c += Y_EVERY) {
      const bool valid = c * CHUNK < there;
      copy16<alignment.value>(y_tile + y_place(y_row, c), valid ? src + c * CHUNK : y, valid);
    }
  };
  if constexpr (FLOATS) {
    // Each warp copies 32 columns, and then transposes them: chunks of four n, rounded.
    const int copy_row = lane / 8;
    const int first = t / 32 * 32;
    const int mine = first + lane % 8 * CHUNK;
    const int col = col_of(mine);
    const T* x_mine = x + ((size_t)v * N + begin_n + copy_row) * n_cols + max(0, col);
    auto copy_stage = [&](int stage, auto alignment) {
      if (stage < n_stages) {
        copy_y(stage, alignment);
        if (col >= 0) {
          const int left = end_n - begin_n - stage * DEPTH - copy_row;
          copy_rows<alignment.value, DEPTH / 4, 4 * COLS>(
              raw_tiles + stage % RAW * X_TILE + copy_row * COLS + mine,
              x_mine + (size_t)stage * DEPTH * n_cols, 4 * (size_t)n_cols,
              col < n_cols ? (left + 3) / 4 : 0);
        }
      }
      commit_copies();
    };
    auto copy_as = [&](auto alignment) {
      Ring ring{STAGES};
#pragma unroll 1
      for (int stage = 0; stage < RAW; stage++) {
        copy_stage(stage, alignment);
      }
#pragma unroll 1
      for (int stage = 0; stage < n_stages; stage++) {
        wait_copies<RAW - 1>();
        __syncwarp();
        wait_barrier(empty + ring.buffer, ring.parity ^ 1);
        const T* raw = raw_tiles + stage % RAW * X_TILE + first + lane;
        T* x_tile = x_tiles + ring.buffer * X_TILE;
#pragma unroll
        for (int i = 0; i < 8; i++) {
          transpose_chunk<COLS>(x_tile + swizzle<8>(first + lane, i) * CHUNK,
                                raw + i * CHUNK * COLS);
        }
        __syncwarp();
        show_copies();
        arrive(full + ring.buffer);
        ring.advance();
        copy_stage(stage + RAW, alignment);
      }
      wait_copies<0>();
    };
    if (aligned) {
      copy_as(Aligned());
    } else {
      copy_as(Unaligned());
    }
  } else {
    // Eight threads copy a row of a slab, of the same columns at every stage.
    const int copy_row = t / 8;
    const int place = swizzle<8>(copy_row, t % 8) * CHUNK;
    int cols[COLS / 64];
#pragma unroll
    for (int q = 0; q < COLS / 64; q++) {
      cols[q] = col_of(q * 64 + t % 8 * CHUNK);
    }
    const T* x_mine = x + ((size_t)v * N + begin_n + copy_row) * n_cols;
    auto copy_as = [&](auto alignment) {
      Copier<STAGES, STAGES - 2> copier{full, empty};
      for (int stage = 0; stage < n_stages; stage++) {
        T* x_tile = x_tiles + copier.begin() * X_TILE + place;
        const T* x_src = x_mine + (size_t)stage * DEPTH * n_cols;
        const int valid = (end_n - begin_n - stage * DEPTH - copy_row + 15) / 16;
        copy_y(stage, alignment);
#pragma unroll
        for (int q = 0; q < COLS / 64; q++) {
          if (cols[q] >= 0) {
            copy_rows<alignment.value, DEPTH / 16, 16 * 64>(x_tile + q * SLAB, x_src + cols[q],
                                                            16 * (size_t)n_cols,
                                                            cols[q] < n_cols ? valid : 0);
          }
        }
        copier.end();
      }
      copier.finish();
    };
    if (aligned) {
      copy_as(Aligned());
    } else {
      copy_as(Unaligned());
    }
  }
  return;
}

take_registers<FLOATS ? 200 : 216>();
const int warp_i = thread / 32 % 4 * 16;  // rows from B on are not stored
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
for (int stage = 0; stage < n_stages; stage++) {
  const T* y_tile = y_tiles + stage % Y_STAGES * Y_TILE;
  const T* x_tile = x_tiles + ring.buffer * X_TILE + warpgroup * 128 * DEPTH;
  wait_barrier(full + ring.buffer, ring.parity);
  unsigned ys[TILES][STEPS][4];
#pragma unroll
  for (int ti = 0; ti < TILES; ti++) {
    const int i0 = warp_i + 64 * ti;
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      if constexpr (FLOATS) {
        const T* at = y_tile + s * STEP * Y_STRIDE;
        unsigned low[2];
        unsigned high[2];
        load_columns<Y_STRIDE>(low, at + i0 % B);
        load_columns<Y_STRIDE>(high, at + (i0 + 8) % B);
        ys[ti][s][0] = low[0];
        ys[ti][s][1] = high[0];
        ys[ti][s][2] = low[1];
        ys[ti][s][3] = high[1];
      } else {
        const int m = s * STEP + lane / 16 * 8 + lane % 8;
        load_matrix4<true>(ys[ti][s], y_tile + y_place(m, (i0 / 8 + lane / 8 % 2) % Y_CHUNKS));
      }
      round_factors<T>(ys[ti][s]);
    }
  }
  begin_products();
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    const unsigned long long b = FLOATS ? describe(x_tile + s * STEP, 16)
                                        : describe(x_tile + s * STEP * 64, SLAB * sizeof(T));
#pragma unroll
    for (int ti = 0; ti < TILES; ti++) {
      FragmentProduct<T, 128, !FLOATS>::multiply(acc[ti], ys[ti][s], b);
    }
  }
  commit_products();
  wait_products<0>();
  if (lane == 0) {
    arrive(empty + ring.buffer);
  }
  ring.advance();
}

const size_t first = ((size_t)blockIdx.y * gridDim.z + v) * indices_shape[0] + j0;
#pragma unroll
for (int ti = 0; ti < TILES; ti++) {
#pragma unroll
  for (int e = 0; e < 64; e += 2) {
    const int i = 64 * ti + warp_i + e / 2 % 2 * 8 + lane / 4;
    const int tile_col = warpgroup * 128 + e / 4 * 8;
    if (i < B && tile_col / B < count) {
      store_pair<OUT>(out + (first + tile_col / B) * (B * B) + i * B + tile_col % B + lane % 4 * 2,
                      acc[ti][e], acc[ti][e + 1]);
    }
  }
}
