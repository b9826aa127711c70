// The product of spmm_tiles.cu for blocks of which a tensor-core product takes parts of several: a
// tile of A is put together in shared memory, stored blocks among zeros, and only those products of
// 8 outputs and 16 columns are made in which something is stored.
//
// Inputs, output: as there; blocks of a block-row by ascending block-column. Where the columns are
// split, y is partial sums (S, V, N, n_rows), with the bias in the first.
// Launch
//   (panels S THREADS, ceil(N / ROWS), V) threads in groups of (THREADS, 1, 1), panels =
//   ceil(n_rows / PANEL), THREADS = 32 (WARPS_N WARPS_O + 4). One group owns ROWS rows of x, a
//   panel of outputs and an equal share of the stages of columns. The last 4 warps copy, the others
//   multiply, each ROWS / WARPS_N rows by PANEL / WARPS_O outputs.
//   Shared memory: STAGES tiles of x and of A, and 1024 bytes.
// Template
//   T half or bfloat16; OUT, T, or float where the columns are split; B even; INSIDE columns of the
//   last block-column, 1 to B; ROWS; PANEL outputs, a multiple of B and of 8 WARPS_O; WARPS_N and
//   WARPS_O; DEPTH columns of a stage, a multiple of B and of 16; STAGES; TRANSPOSED and BIAS 0
//   or 1.
// Sums in float32: the bias, then k ascending, what is not stored as zeros or left out.

#include "barriers.h"
#include "copies.h"
#include "mma.h"
#include "packs.h"
#include "pieces.h"
#include "stores.h"

constexpr int WARPS = WARPS_N * WARPS_O;  // that multiply
constexpr int COPIERS = 128;              // threads
constexpr int STEP = 32 / sizeof(T);      // columns of a product of a warp: 2 chunks
constexpr int CHUNK = 16 / sizeof(T);     // elements
constexpr int STEPS = DEPTH / STEP;
constexpr int TILES = ROWS / WARPS_N / 16;   // 16 x 8 tiles of a warp over the rows of x
constexpr int GROUPS = PANEL / WARPS_O / 8;  // and over the outputs
constexpr int X_CHUNKS = DEPTH / CHUNK;
constexpr int X_STRIDE = row_stride<X_CHUNKS>() * CHUNK;
constexpr int W_CHUNKS = (TRANSPOSED ? PANEL : DEPTH) / CHUNK;
constexpr bool BY_COLUMNS = TRANSPOSED && sizeof(T) == 4;  // no ldmatrix transposes these
constexpr int W_STRIDE = (BY_COLUMNS ? column_stride<W_CHUNKS>() : row_stride<W_CHUNKS>()) * CHUNK;
constexpr int X_TILE = ROWS * X_STRIDE;
constexpr int W_TILE = (TRANSPOSED ? DEPTH : PANEL) * W_STRIDE;
constexpr int PIECE = packed<T, B>();  // elements of a copy
constexpr int PIECES = B * B / PIECE;
constexpr int PANEL_ROWS = PANEL / B;
constexpr int POSITIONS = DEPTH / B;  // of a block in a stage
// Of the threads that copy, LANES look after a block-row of the panel: at SLOTS of its blocks at a
// time, by SUB each.
constexpr int LANES = floor_power(COPIERS / PANEL_ROWS, 32);
constexpr int SLOTS = floor_power(POSITIONS, LANES < 4 ? LANES : 4);
constexpr int SUB = LANES / SLOTS;
constexpr int SHARE = (PIECES + SUB - 1) / SUB;
constexpr int X_ROWS = floor_power(COPIERS / X_CHUNKS, ROWS);  // that are copied at once
static_assert(POSITIONS * STAGES <= 64, "the history of a block-row is 64 bits");
extern __shared__ char shared[];
__shared__ unsigned long long full[STAGES];
__shared__ unsigned long long empty[STAGES];
// By stage and step, from each warp that copies: in which groups of 8 outputs something is stored.
__shared__ unsigned stored[STAGES][STEPS][4];
T* tiles = reinterpret_cast<T*>(shared + (1024 - shared_address(shared) % 1024) % 1024);

const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warp = thread / 32;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int R = in_register(indptr_shape[0] - 1);
const int n_rows = R * B;
const int panels = (n_rows + PANEL - 1) / PANEL;
const int splits = gridDim.x / panels;
const int panel = blockIdx.x % panels;
const int split = blockIdx.x / panels;
const int n0 = blockIdx.y * ROWS;
const int all_stages = (n_cols + DEPTH - 1) / DEPTH;
const int first_stage = all_stages * split / splits;
const int end_stage = all_stages * (split + 1) / splits;

for (int i = thread; i < STAGES * (X_TILE + W_TILE) / CHUNK; i += 32 * WARPS + COPIERS) {
  reinterpret_cast<uint4*>(tiles)[i] = make_uint4(0, 0, 0, 0);
}
if (thread < STAGES) {
  init_barrier(full + thread, COPIERS + 4);
  init_barrier(empty + thread, WARPS);
}
__syncthreads();
Ring ring{STAGES};
// Where a chunk lies in a tile of A.
auto w_place = [](int row, int chunk) {
  return BY_COLUMNS ? row * W_STRIDE + chunk * CHUNK : swizzle<W_CHUNKS>(row, chunk) * CHUNK;
};

if (warp >= WARPS) {
  if constexpr (WARPS == 16) {
    give_registers<56>();
  }
  const int t = thread % COPIERS;
  const int row = t / LANES;  // of the panel, in blocks
  const int slot = t % LANES / SUB;
  const int r = panel * PANEL_ROWS + row;
  const bool copies_blocks = row < PANEL_ROWS && r < R;
  const int end = copies_blocks ? indptr[r + 1] : 0;
  const int n_inside = n_cols - B + INSIDE;
  // The first block from a column on.
  int next = copies_blocks ? indptr[r] : 0;
  int high = end;
  while (next < high) {
    const int middle = (next + high) / 2;
    if (indices[middle] * B < first_stage * DEPTH) {
      next = middle + 1;
    } else {
      high = middle;
    }
  }
  // Of the block in this thread's slot: its first column, and where it lies. They are read ahead.
  int col;
  int stored_at;
  auto read_ahead = [&]() {
    const int j = next + slot;
    col = j < end ? __ldg(indices + j) * B : 1 << 30;
    stored_at = TRANSPOSED && j < end ? __ldg(perm + j) : j;
  };
  read_ahead();
  // In which positions of earlier stages this thread has stored blocks, a bit each.
  unsigned long long history = 0;
  const unsigned outputs = (2u << (row * B + B - 1) / 8) - (1u << row * B / 8);
  const T* blocks = data + (size_t)v * indices_shape[0] * (B * B);
  const int x_row = t / X_CHUNKS;
  const int x_chunk = t % X_CHUNKS;
  const int x_place = swizzle<X_CHUNKS>(x_row, x_chunk) * CHUNK;
  const T* x_mine = x + ((size_t)v * N + n0 + x_row) * n_cols + x_chunk * CHUNK;
  const int x_valid = (N - n0 - x_row + X_ROWS - 1) / X_ROWS;

  // Call work(row of a block, column, place in the tile) for each piece of this thread.
  auto each_piece = [&](int from, auto work) {
#pragma unroll
    for (int p = 0; p < SHARE; p++) {
      const int i = t % SUB + p * SUB;
      const int a = i / (B / PIECE);
      const int b = i % (B / PIECE) * PIECE;
      const int tile_row = TRANSPOSED ? from + a : row * B + a;
      const int tile_col = TRANSPOSED ? row * B + b : from + b;
      if (PIECES % SUB == 0 || i < PIECES) {
        work(a, b, w_place(tile_row, tile_col / CHUNK) + tile_col % CHUNK);
      }
    }
  };
  auto copy_as = [&](auto alignment) {
    constexpr bool ALIGNED = alignment.value;
    for (int stage = first_stage; stage < end_stage; stage++) {
      const int k0 = stage * DEPTH;
      T* x_tile = tiles + ring.buffer * (X_TILE + W_TILE);
      T* w_tile = x_tile + X_TILE;
      wait_barrier(empty + ring.buffer, ring.parity ^ 1);
      if (x_row < X_ROWS) {
        copy_rows<ALIGNED, ROWS / X_ROWS, X_ROWS * X_STRIDE>(
            x_tile + x_place, x_mine + k0, X_ROWS * (size_t)n_cols,
            k0 + x_chunk * CHUNK < n_cols ? x_valid : 0);
      }
      unsigned old = history >> POSITIONS * (STAGES - 1) & ((1u << POSITIONS) - 1);
      for (; old; old &= old - 1) {
        each_piece((__ffs(old) - 1) * B, [&](int, int, int place) {
          *reinterpret_cast<Pack<unsigned short, PIECE * sizeof(T) / 2>*>(w_tile + place) = {};
        });
      }
      __syncwarp();  // others may copy to where zeros have been written
      unsigned fresh = 0;
      bool again = true;
      while (again) {
        const bool taken = col < k0 + DEPTH;
        if (taken) {
          const int from = col % DEPTH;  // within the tile, whatever the index arrays hold
          const T* block = blocks + (size_t)stored_at * (B * B);
          each_piece(from, [&](int a, int b, int place) {
            const int inside = TRANSPOSED ? (col + a < n_inside ? PIECE : 0) : n_inside - col - b;
            copy_piece<ALIGNED, PIECE>(w_tile + place, block + a * B + b,
                                       INSIDE < B ? inside : PIECE);
          });
          fresh |= 1u << from / B;
        }
        const unsigned all = __ballot_sync(0xffffffffu, taken);
        const unsigned own = all >> lane / LANES * LANES & (0xffffffffu >> (32 - LANES));
        next += __popc(own) / SUB;
        read_ahead();
        again = SLOTS < POSITIONS && __ballot_sync(0xffffffffu, __popc(own) == LANES);
      }
      history = history << POSITIONS | fresh;
#pragma unroll
      for (int step = 0; step < STEPS; step++) {
        constexpr int LAST = POSITIONS - 1;
        const int low = step * STEP / B;
        const int high = (step * STEP + STEP - 1) / B < LAST ? (step * STEP + STEP - 1) / B : LAST;
        const bool any = fresh & ((2u << high) - (1u << low));
        const unsigned used = __reduce_or_sync(0xffffffffu, any ? outputs : 0);
        if (lane == 0) {
          stored[ring.buffer][step][warp - WARPS] = used;
        }
      }
      arrive_copied(full + ring.buffer);
      __syncwarp();
      if (lane == 0) {
        arrive(full + ring.buffer);
      }
      ring.advance();
    }
  };
  if (((size_t)x | (size_t)data) % 16 == 0) {
    copy_as(Aligned());
  } else {
    copy_as(Unaligned());
  }
  commit_copies();
  wait_copies<0>();
  return;
}

if constexpr (WARPS == 16) {
  take_registers<104>();
}
const int m0 = warp / WARPS_O * (ROWS / WARPS_N);
const int group0 = warp % WARPS_O * GROUPS;
const int row0 = panel * PANEL + group0 * 8;
float acc[TILES][GROUPS][4];
#pragma unroll
for (int to = 0; to < GROUPS; to++) {
  const int row = row0 + 8 * to + lane % 4 * 2;
  const bool added = BIAS && split == 0 && row < n_rows;
  const float bias_0 = added ? float(bias[row]) : 0.0f;
  const float bias_1 = added ? float(bias[row + 1]) : 0.0f;
#pragma unroll
  for (int tn = 0; tn < TILES; tn++) {
    acc[tn][to][0] = acc[tn][to][2] = bias_0;
    acc[tn][to][1] = acc[tn][to][3] = bias_1;
  }
}
#pragma unroll 1
for (int stage = first_stage; stage < end_stage; stage++) {
  const T* x_tile = tiles + ring.buffer * (X_TILE + W_TILE);
  const T* w_tile = x_tile + X_TILE;
  wait_barrier(full + ring.buffer, ring.parity);
  // A lane's word of what is stored; those of the copying warps together.
  unsigned word = lane < STEPS * 4 ? stored[ring.buffer][lane / 4][lane % 4] : 0;
  word |= __shfl_xor_sync(0xffffffffu, word, 1);
  word |= __shfl_xor_sync(0xffffffffu, word, 2);
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const unsigned used = __shfl_sync(0xffffffffu, word, step * 4) >> group0;
    if (used & ((1u << GROUPS) - 1)) {
      unsigned xs[TILES][4];
      const T* x_src =
          x_tile + m0 * X_STRIDE + swizzle<X_CHUNKS>(lane % 16, step * 2 + lane / 16) * CHUNK;
#pragma unroll
      for (int tn = 0; tn < TILES; tn++) {
        load_matrix4<false>(xs[tn], x_src + tn * 16 * X_STRIDE);
        round_factors<T>(xs[tn]);
      }
#pragma unroll
      for (int to = 0; to < GROUPS; to++) {
        if (used >> to & 1) {
          unsigned w[2];
          const int group = group0 + to;
          if constexpr (BY_COLUMNS) {
            load_columns<W_STRIDE>(w, w_tile + step * STEP * W_STRIDE + group * 8);
          } else if (TRANSPOSED) {
            load_matrix2<true>(w, w_tile + w_place(step * STEP + lane % 16, group));
          } else {
            load_matrix2<false>(w, w_tile + w_place(group * 8 + lane % 8, step * 2 + lane / 8 % 2));
          }
          round_factors<T>(w);
#pragma unroll
          for (int tn = 0; tn < TILES; tn++) {
            multiply<T>(acc[tn][to], xs[tn][0], xs[tn][1], xs[tn][2], xs[tn][3], w[0], w[1]);
          }
        }
      }
    }
  }
  __syncwarp();
  if (lane == 0) {
    arrive(empty + ring.buffer);
  }
  ring.advance();
}
const size_t first = (((size_t)split * gridDim.z + v) * N + n0 + m0) * n_rows + row0;
auto sum = [&](int row_tile, int to, int e) { return acc[row_tile / 2][to][row_tile % 2 * 2 + e]; };
if constexpr (sizeof(OUT) == 2) {
  if (n_rows % 8 == 0) {
    store_tiles<OUT, 2 * TILES, GROUPS>(y + first, n_rows, N - n0 - m0, n_rows - row0, sum);
    return;
  }
}
store_pairs<OUT, 2 * TILES, GROUPS>(y + first, n_rows, N - n0 - m0, n_rows - row0, sum);
