// The product of spmm_panels.cu for some rows of x, which is bound by what is read from L2: several
// thread blocks share the columns of a panel.
//
// Inputs, output: as in spmm_tiles.cu; blocks of a block-row by ascending block-column. y is
// partial sums (S, V, N, n_rows), with the bias in the first.
// Launch
//   (panels S 640, ceil(N / ROWS), V) threads in groups of (640, 1, 1), panels =
//   ceil(n_rows / 256). S groups own a panel of 256 outputs and ROWS rows of x, each an equal
//   share of the columns. The last 4 warps copy x. Each of the 16 others copies and multiplies the
//   part of every block that lies in its 16 outputs. Shared memory: STAGES ROWS 256 + 32 RING
//   bytes.
// Template
//   T half or bfloat16; OUT float; B 16; INSIDE columns of the last block-column, 1 to B;
//   ROWS a multiple of 16, at most 128; STAGES; RING elements of a warp's blocks
//   under way; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: the bias, then blocks in stored order, k ascending by 16.

#include "barriers.h"
#include "copies.h"
#include "mma.h"
#include "reader.h"
#include "stores.h"

constexpr int OWN = 16;             // outputs of a warp
constexpr int WIDTH = 256;          // outputs of the panel
constexpr int WARPS = WIDTH / OWN;  // that multiply
constexpr int COPIERS = 128;        // threads
constexpr int TILES = ROWS / 16;    // 16 x 8 tiles of a warp over the rows of x, 2 over outputs
constexpr int DEPTH = 128;          // columns in a stage
constexpr int CHUNKS = DEPTH / 8;
constexpr int STAGE = ROWS * DEPTH;
constexpr int PART = B * OWN;  // values of a block that lie in the outputs of a warp
constexpr int W_CHUNKS = (TRANSPOSED ? OWN : B) / 8;
constexpr int RING_PARTS = RING / PART;
constexpr bool FULL = ROWS == 128;  // sums fill the registers
extern __shared__ __align__(128) char shared[];
__shared__ unsigned long long full[STAGES];
__shared__ unsigned long long empty[STAGES];
T* tiles = reinterpret_cast<T*>(shared);

const int R = in_register(indptr_shape[0] - 1);
const int panels = (R * B + WIDTH - 1) / WIDTH;
const int splits = gridDim.x / panels;
const int out0 = blockIdx.x % panels * WIDTH;
const int split = blockIdx.x / panels;
const int n0 = blockIdx.y * ROWS;
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warp = thread / 32;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int n_valid = min(ROWS, N - n0);

const int all_stages = (n_cols + DEPTH - 1) / DEPTH;
const int first_stage = all_stages * split / splits;
const int end_stage = all_stages * (split + 1) / splits;

if (thread < STAGES) {
  init_barrier(full + thread, COPIERS);
  init_barrier(empty + thread, WARPS);
}
__syncthreads();

Ring ring{STAGES};
if (warp >= WARPS) {
  if (FULL) {
    give_registers<32>();
  }
  constexpr int EVERY = COPIERS / CHUNKS;
  const int copy_row = thread % COPIERS / CHUNKS;
  const int chunk = thread % CHUNKS;
  const int place = swizzle<CHUNKS>(copy_row, chunk) * 8;
  const T* x_mine = x + ((size_t)v * N + n0 + copy_row) * n_cols + chunk * 8;
  auto copy_as = [&](auto alignment) {
    constexpr bool ALIGNED = alignment.value;
    for (int stage = first_stage; stage < end_stage; stage++) {
      const int rows = stage * DEPTH + chunk * 8 < n_cols ? n_valid - copy_row : 0;
      T* x_tile = tiles + ring.buffer * STAGE + place;
      const T* x_src = x_mine + stage * DEPTH;
      wait_barrier(empty + ring.buffer, ring.parity ^ 1);
#pragma unroll
      for (int i = 0; i < ROWS; i += EVERY) {  // rows that are not there are not stored either
        if (i < rows) {
          copy16<ALIGNED>(x_tile + i * DEPTH, x_src + (size_t)i * n_cols, true);
        }
      }
      if (ALIGNED) {
        arrive_copied(full + ring.buffer);
      } else {
        arrive(full + ring.buffer);
      }
      ring.advance();
    }
  };
  if ((size_t)x % 16 == 0) {
    copy_as(Aligned());
  } else {
    copy_as(Unaligned());
  }
  commit_copies();
  wait_copies<0>();
  return;
}
if (FULL) {
  take_registers<112>();
}

const int n_rows = R * B;
const int row0 = out0 + warp * OWN;
const int r = row0 / B;
const int o0 = row0 % B;
// The first block of the row in this share of the columns, and the first behind it. The lanes of a
// warp search for both together.
const int row_begin = indptr[min(R, r)];
const int row_end = indptr[min(R, r + 1)];
int low[2] = {row_begin, row_begin};
int high[2] = {row_end, row_end};
while (low[0] < high[0] || low[1] < high[1]) {
#pragma unroll
  for (int side = 0; side < 2; side++) {
    const int limit = (side ? end_stage : first_stage) * DEPTH / B;
    const int step = (high[side] - low[side] + 31) / 32;
    const int ahead = low[side] + (lane + 1) * step - 1;
    const bool less = step > 0 && ahead < high[side] && indices[ahead] < limit;
    low[side] += __popc(__ballot_sync(0xffffffffu, less)) * step;
    high[side] = min(high[side], low[side] + step - 1);
  }
}
const int begin = low[0];
const int end = low[1];
const bool aligned = (size_t)data % 16 == 0;
const T* blocks = data + (size_t)v * indices_shape[0] * (B * B) + (TRANSPOSED ? o0 : o0 * B);
T* parts = tiles + STAGES * STAGE + warp * RING;
// Only the last block of a block-row can reach past the matrix.
const bool at_edge = INSIDE < B && begin < end && (indices[end - 1] + 1) * B == n_cols;
int copied = 0;
int next = begin;  // block to copy
Reader places(perm, begin, TRANSPOSED ? end : begin);
auto copy_part = [&]() {
  if (next < end) {
    const int stored = TRANSPOSED ? places.at(next) : next;
    const T* block = blocks + (size_t)stored * (B * B);
    const int inside = at_edge && next == end - 1 ? INSIDE : B;  // k in the matrix
    T* part = parts + copied % RING_PARTS * PART;
#pragma unroll
    for (int i = 0; i < PART / 8; i += 32) {
      const int part_row = (i + lane) / W_CHUNKS;
      const int chunk = (i + lane) % W_CHUNKS;
      T* dst = part + swizzle<W_CHUNKS>(part_row, chunk) * 8;
      const int left = TRANSPOSED ? (part_row < inside ? 8 : 0) : inside - chunk * 8;
      const int count = INSIDE < B ? left : 8;
      if (aligned) {
        copy_first<true>(dst, block + part_row * B + chunk * 8, count);
      } else {
        copy_first<false>(dst, block + part_row * B + chunk * 8, count);
      }
    }
    copied++;
    next++;
  }
  commit_copies();
};

#pragma unroll 1
for (int i = 0; i < RING_PARTS; i++) {
  copy_part();
}
int read = 0;
Reader cols(indices, begin, end);
int j = begin;
int col = j < end ? cols.at(j) * B : 1 << 30;
float acc[TILES][2][4];
#pragma unroll
for (int to = 0; to < 2; to++) {
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const int o = row0 + 8 * to + lane % 4 * 2 + e % 2;
    const float bias_o = BIAS && split == 0 && o < n_rows ? float(bias[o]) : 0.0f;
#pragma unroll
    for (int tn = 0; tn < TILES; tn++) {
      acc[tn][to][e] = bias_o;
    }
  }
}
for (int stage = first_stage; stage < end_stage; stage++) {
  const T* x_tile = tiles + ring.buffer * STAGE;
  wait_barrier(full + ring.buffer, ring.parity);
#pragma unroll 1
  while (col < (stage + 1) * DEPTH) {
    wait_copies<RING_PARTS - 1>();
    __syncwarp();
    const T* part = parts + read % RING_PARTS * PART;
    read++;
#pragma unroll
    for (int tk = 0; tk < B / 16; tk++) {
      unsigned w[4];
      if (TRANSPOSED) {
        load_matrix4<true>(w, part + swizzle<W_CHUNKS>(16 * tk + lane % 16, lane / 16) * 8);
      } else {
        const int o = lane / 16 * 8 + lane % 8;
        load_matrix4<false>(w, part + swizzle<W_CHUNKS>(o, 2 * tk + lane / 8 % 2) * 8);
      }
      const int chunk = col % DEPTH / 8 + 2 * tk + lane / 16;
      const T* src = x_tile + swizzle<CHUNKS>(lane % 16, chunk) * 8;
#pragma unroll
      for (int tn = 0; tn < TILES; tn++) {
        unsigned xs[4];
        load_matrix4<false>(xs, src + tn * 16 * DEPTH);
        multiply<T>(acc[tn][0], xs[0], xs[1], xs[2], xs[3], w[0], w[1]);
        multiply<T>(acc[tn][1], xs[0], xs[1], xs[2], xs[3], w[2], w[3]);
      }
    }
    __syncwarp();
    copy_part();
    col = ++j < end ? cols.at(j) * B : 1 << 30;
  }
  __syncwarp();
  if (lane == 0) {
    arrive(empty + ring.buffer);
  }
  ring.advance();
}
wait_copies<0>();
OUT* y_tile = y + (((size_t)split * gridDim.z + v) * N + n0) * n_rows + row0;
#pragma unroll
for (int tn = 0; tn < TILES; tn++) {
  store_pairs<OUT, 2, 2>(
      y_tile + (size_t)(16 * tn) * n_rows, n_rows, n_valid - 16 * tn, n_rows - row0,
      [&](int row_tile, int to, int e) { return acc[tn][to][2 * row_tile + e]; });
}
