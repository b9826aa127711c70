// The product of spmm_tiles.cu for blocks of 8. As in spmm_panels.cu, x is read once for a panel of
// outputs, and only stored blocks are multiplied. A block is one operand of a tensor-core product,
// so it goes straight from device memory to registers: a lane reads two neighbouring values.
//
// Inputs, output: as there; blocks of a block-row by ascending block-column. No TRANSPOSED. Where
// the columns are split, y is partial sums (S, V, N, n_rows), with the bias in the first.
// Launch
//   (panels S THREADS, shares, V) threads in groups of (THREADS, 1, 1), panels = ceil(R / (2
//   WARPS)), THREADS = 32 (WARPS + 4). One group owns 2 WARPS block-rows, an equal share of the
//   tiles of ROWS rows of x, which it takes one after the other, and one of the stages of columns.
//   The last 4 warps copy x. Each of the others multiplies two block-rows.
//   Shared memory: STAGES tiles of x and 1024 bytes.
// Template
//   T half or bfloat16; OUT, T, or float where the columns are split; INSIDE columns of the last
//   block-column, 1 to 8; ROWS a multiple of 32; WARPS; DEPTH columns of a stage; STAGES; BIAS 0 or
//   1.
// Sums in float32: the bias, then blocks in stored order.

#include "barriers.h"
#include "copies.h"
#include "mma.h"
#include "packs.h"
#include "reader.h"
#include "stores.h"

constexpr int B = 8;
constexpr int COPIERS = 128;  // threads
constexpr int CHUNKS = DEPTH / 8;
constexpr int TILE = ROWS * DEPTH;
constexpr int COPY_ROWS = COPIERS / CHUNKS;  // of x that are copied at once
constexpr int TILES = ROWS / 16;             // 16 x 8 tiles of a block-row over the rows of x
constexpr int AHEAD = 2;                     // blocks of a block-row that are read ahead
constexpr int NONE = 1 << 30;
extern __shared__ char shared[];
__shared__ unsigned long long full[STAGES];
__shared__ unsigned long long empty[STAGES];
T* tiles = reinterpret_cast<T*>(shared + (1024 - shared_address(shared) % 1024) % 1024);

const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warp = thread / 32;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int R = in_register(indptr_shape[0] - 1);
const int panels = (R + 2 * WARPS - 1) / (2 * WARPS);
const int splits = gridDim.x / panels;
const int panel = blockIdx.x % panels;
const int split = blockIdx.x / panels;
const int all_tiles = (N + ROWS - 1) / ROWS;
const int begin_n = (size_t)all_tiles * blockIdx.y / gridDim.y * ROWS;
const int end_n = (size_t)all_tiles * (blockIdx.y + 1) / gridDim.y * ROWS;
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
  if constexpr (WARPS == 16) {
    give_registers<32>();
  }
  const int copy_row = thread % COPIERS / CHUNKS;
  const int chunk = thread % CHUNKS;
  const int place = swizzle<CHUNKS>(copy_row, chunk) * 8;
  const T* x_mine = x + ((size_t)v * N + copy_row) * n_cols + chunk * 8;
  auto copy_as = [&](auto alignment) {
    constexpr bool ALIGNED = alignment.value;
    for (int n0 = begin_n; n0 < end_n; n0 += ROWS) {
      for (int stage = first_stage; stage < end_stage; stage++) {
        const T* src = x_mine + (size_t)n0 * n_cols + stage * DEPTH;
        const int valid = stage * DEPTH + chunk * 8 < n_cols
                              ? (N - n0 - copy_row + COPY_ROWS - 1) / COPY_ROWS
                              : 0;
        wait_barrier(empty + ring.buffer, ring.parity ^ 1);
        copy_rows<ALIGNED, ROWS / COPY_ROWS, COPY_ROWS * DEPTH>(
            tiles + ring.buffer * TILE + place, src, COPY_ROWS * (size_t)n_cols, valid);
        if (ALIGNED) {
          arrive_copied(full + ring.buffer);
        } else {
          arrive(full + ring.buffer);
        }
        ring.advance();
      }
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

if constexpr (WARPS == 16) {
  take_registers<112>();
}
const int n_rows = R * B;
const int n_inside = n_cols - B + INSIDE;
const int r0 = panel * 2 * WARPS + warp * 2;
const int row0 = r0 * B;
const T* blocks = data + (size_t)v * indices_shape[0] * (B * B);
const bool aligned = (size_t)data % 4 == 0;

// Two neighbours of row lane / 4 of a block, with zeros for what lies behind the matrix.
auto load_pair = [&](const T* block, int col) -> unsigned {
  const int k = lane % 4 * 2;
  const int inside = INSIDE < B ? n_inside - col - k : 2;
  if (inside <= 0) {
    return 0;
  }
  const T* p = block + lane / 4 * B + k;
  if (aligned && inside >= 2) {
    return __ldg(reinterpret_cast<const unsigned*>(p));
  }
  const unsigned short* halves = reinterpret_cast<const unsigned short*>(p);
  return inside >= 2 ? halves[0] | (unsigned)halves[1] << 16 : halves[0];
};
// The blocks of one block-row of this warp: which one is loaded next, and what is loaded.
struct Row {
  Reader cols;
  int begin;
  int end;
  int next;
  int ready[AHEAD];  // their first columns
  unsigned pairs[AHEAD];
};
auto row_of = [&](int r) {
  const int end = indptr[min(R, r + 1)];
  int begin = indptr[min(R, r)];
  int high = end;
  while (begin < high) {  // the first block from a column on
    const int middle = (begin + high) / 2;
    if (indices[middle] * B < first_stage * DEPTH) {
      begin = middle + 1;
    } else {
      high = middle;
    }
  }
  return Row{Reader(indices, begin, end), begin, end, begin};
};
Row rows[2] = {row_of(r0), row_of(r0 + 1)};
// Load the next block of a block-row behind the others, which move up.
auto load_next = [&](Row& row) {
#pragma unroll
  for (int i = 0; i < AHEAD - 1; i++) {
    row.ready[i] = row.ready[i + 1];
    row.pairs[i] = row.pairs[i + 1];
  }
  const bool there = row.next < row.end;
  const int j = row.next++;
  const int col = there ? row.cols.at(j) * B : NONE;
  row.ready[AHEAD - 1] = col;
  if (there) {
    row.pairs[AHEAD - 1] = load_pair(blocks + (size_t)j * (B * B), col);
  }
};
auto begin_row = [&](Row& row) {
  row.next = row.begin;
  row.cols = Reader(indices, row.begin, row.end);
#pragma unroll
  for (int i = 0; i < AHEAD; i++) {
    load_next(row);
  }
};

float acc[TILES][2][4];
// Multiply a block-row's blocks of a stage.
auto multiply_row = [&](Row& row, auto which, const T* x_tile, int stage_end) {
  constexpr int TO = which.value;
#pragma unroll 1
  while (row.ready[0] < stage_end) {
    const int chunk = row.ready[0] % DEPTH / 8;  // in the tile, whatever the index arrays hold
    const T* src = x_tile + swizzle<CHUNKS>(lane, chunk) * 8;
    const unsigned w = row.pairs[0];
#pragma unroll
    for (int tn = 0; tn < TILES; tn += 2) {
      unsigned xs[4];
      load_matrix4<false>(xs, src + tn * 16 * DEPTH);
      multiply_half<T>(acc[tn][TO], xs[0], xs[1], w);
      multiply_half<T>(acc[tn + 1][TO], xs[2], xs[3], w);
    }
    load_next(row);
  }
};

for (int n0 = begin_n; n0 < end_n; n0 += ROWS) {
  begin_row(rows[0]);
  begin_row(rows[1]);
#pragma unroll
  for (int to = 0; to < 2; to++) {
    const int row = row0 + 8 * to + lane % 4 * 2;
    const bool added = BIAS && split == 0 && row < n_rows;
    const float bias_0 = added ? float(__ldg(bias + row)) : 0.0f;
    const float bias_1 = added ? float(__ldg(bias + row + 1)) : 0.0f;
#pragma unroll
    for (int tn = 0; tn < TILES; tn++) {
      acc[tn][to][0] = acc[tn][to][2] = bias_0;
      acc[tn][to][1] = acc[tn][to][3] = bias_1;
    }
  }
#pragma unroll 1
  for (int stage = first_stage; stage < end_stage; stage++) {
    const T* x_tile = tiles + ring.buffer * TILE;
    wait_barrier(full + ring.buffer, ring.parity);
    multiply_row(rows[0], Count<0>(), x_tile, (stage + 1) * DEPTH);
    multiply_row(rows[1], Count<1>(), x_tile, (stage + 1) * DEPTH);
    __syncwarp();
    if (lane == 0) {
      arrive(empty + ring.buffer);
    }
    ring.advance();
  }
  OUT* y_tile = y + (((size_t)split * gridDim.z + v) * N + n0) * n_rows + row0;
  auto sum = [&](int row_tile, int to, int e) {
    return acc[row_tile / 2][to][row_tile % 2 * 2 + e];
  };
  if constexpr (sizeof(OUT) == 2) {
    store_tiles<OUT, 2 * TILES, 2>(y_tile, n_rows, N - n0, n_rows - row0, sum);
  } else {
    store_pairs<OUT, 2 * TILES, 2>(y_tile, n_rows, N - n0, n_rows - row0, sum);
  }
}
