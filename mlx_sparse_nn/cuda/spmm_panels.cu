// The product of spmm_tiles.cu for small blocks that fill much of the matrix: x is read once for
// 256 outputs, as in a dense product, and only stored blocks are multiplied.
//
// Inputs, output: as there; blocks of a block-row by ascending block-column, n_cols at most 2^20.
// Launch
//   (panels 640, shares, V) threads in groups of (640, 1, 1), panels = ceil(n_rows / 256). One
//   group owns a panel of 256 outputs and an equal share of the tiles of 128 rows of x, which it
//   takes one after the other. The last 4 warps copy x, 256 bytes of each row a stage where the
//   panel has a block. Each of the 16 others copies and multiplies the part of every block that
//   lies in its 16 outputs. Shared memory: STAGES 32768 + 65536 + 1024 bytes; of floats transposed,
//   98304 for 65536.
// Template
//   T half, bfloat16 or float, which is rounded to TF32; B 16; INSIDE columns of the last
//   block-column, 1 to B; STAGES; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: the bias, then blocks in stored order, k ascending by 32 bytes.

#include "barriers.h"
#include "copies.h"
#include "mma.h"
#include "reader.h"
#include "stores.h"

constexpr int ROWS = 128;
constexpr int WIDTH = 256;             // outputs of the panel
constexpr int OWN = 16;                // outputs of a warp
constexpr int WARPS = 16;              // that multiply
constexpr int COPIERS = 128;           // threads
constexpr int CHUNK = 16 / sizeof(T);  // elements
constexpr int STEP = 2 * CHUNK;        // k in a product
constexpr int DEPTH = 16 * CHUNK;      // columns in a stage
constexpr int TILES = ROWS / 16;       // 16 x 8 tiles of a warp over the rows of x, 2 over outputs
constexpr int CHUNKS = DEPTH / CHUNK;
constexpr int STAGE = ROWS * DEPTH;
constexpr int W_ROWS = TRANSPOSED ? B : OWN;  // of the part of a block in the outputs of a warp
constexpr int W_CHUNKS = (TRANSPOSED ? OWN : B) / CHUNK;
constexpr bool BY_COLUMNS = TRANSPOSED && sizeof(T) == 4;  // no ldmatrix transposes these
constexpr int W_STRIDE = (BY_COLUMNS ? column_stride<W_CHUNKS>() : W_CHUNKS) * CHUNK;
constexpr int PART = W_ROWS * W_STRIDE;
constexpr int RING_PARTS = 4096 / (B * OWN * (int)sizeof(T));  // that lie in a warp's ring
extern __shared__ char shared[];
__shared__ unsigned long long full[STAGES];
__shared__ unsigned long long empty[STAGES];
__shared__ unsigned used[(1 << 20) / DEPTH / 32];  // a bit a stage: has the panel a block there?
T* tiles = reinterpret_cast<T*>(shared + (1024 - shared_address(shared) % 1024) % 1024);

const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warp = thread / 32;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int R = in_register(indptr_shape[0] - 1);
const int all_tiles = (N + ROWS - 1) / ROWS;
const int begin_n = (size_t)all_tiles * blockIdx.y / gridDim.y * ROWS;
const int end_n = (size_t)all_tiles * (blockIdx.y + 1) / gridDim.y * ROWS;
const int n_words = (n_cols + 32 * DEPTH - 1) / (32 * DEPTH);

for (int i = thread; i < n_words; i += blockDim.x) {
  used[i] = 0;
}
if (thread < STAGES) {
  init_barrier(full + thread, COPIERS);
  init_barrier(empty + thread, WARPS);
}
__syncthreads();
const int r0 = blockIdx.x * (WIDTH / B);
const int panel_end = indptr[min(R, r0 + WIDTH / B)];
for (int j = indptr[r0] + thread; j < panel_end; j += blockDim.x) {
  const int stage = indices[j] * B / DEPTH;
  if (!(used[stage / 32] >> stage % 32 & 1)) {
    atomicOr(used + stage / 32, 1u << stage % 32);
  }
}
__syncthreads();

Ring ring{STAGES};
// Call work(stage) for each stage that has a block, in order.
auto each_stage = [&](auto work) {
  for (int word = 0; word < n_words; word++) {
    for (unsigned left = used[word]; left; left &= left - 1) {
      work(32 * word + __ffs(left) - 1);
      ring.advance();
    }
  }
};

if (warp >= WARPS) {
  give_registers<32>();
  constexpr int EVERY = COPIERS / CHUNKS;
  const int copy_row = thread % COPIERS / CHUNKS;
  const int chunk = thread % CHUNKS;
  const int place = swizzle<CHUNKS>(copy_row, chunk) * CHUNK;
  const T* x_mine = x + ((size_t)v * N + copy_row) * n_cols + chunk * CHUNK;
  auto copy_as = [&](auto alignment) {
    constexpr bool ALIGNED = alignment.value;
    for (int n0 = begin_n; n0 < end_n; n0 += ROWS) {
      each_stage([&](int stage) {
        T* x_tile = tiles + ring.buffer * STAGE + place;
        const T* x_src = x_mine + (size_t)n0 * n_cols + stage * DEPTH;
        const int valid =
            stage * DEPTH + chunk * CHUNK < n_cols ? (N - n0 - copy_row + EVERY - 1) / EVERY : 0;
        wait_barrier(empty + ring.buffer, ring.parity ^ 1);
        copy_rows<ALIGNED, ROWS / EVERY, EVERY * DEPTH>(x_tile, x_src, EVERY * (size_t)n_cols,
                                                        valid);
        if (ALIGNED) {
          arrive_copied(full + ring.buffer);
        } else {
          arrive(full + ring.buffer);
        }
      });
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

take_registers<112>();
// This warp's parts of blocks are copied RING_PARTS ahead, through all tiles.
const int n_rows = R * B;
const int row0 = r0 * B + warp * OWN;
const int r = row0 / B;
const int o0 = row0 % B;
const int begin = indptr[min(R, r)];
const int end = indptr[min(R, r + 1)];
const bool aligned = (size_t)data % 16 == 0;
const T* blocks = data + (size_t)v * indices_shape[0] * (B * B) + (TRANSPOSED ? o0 : o0 * B);
T* parts = tiles + STAGES * STAGE + warp * (RING_PARTS * PART);
// Only the last block of a block-row can reach past the matrix.
const bool at_edge = INSIDE < B && begin < end && (indices[end - 1] + 1) * B == n_cols;
// Where a chunk lies in a part.
auto w_place = [](int row, int chunk) {
  return BY_COLUMNS ? row * W_STRIDE + chunk * CHUNK : swizzle<W_CHUNKS>(row, chunk) * CHUNK;
};
int copied = 0;
int next = begin;  // block to copy, and in how many tiles more
int rounds = begin < end ? (end_n - begin_n) / ROWS : 0;
Reader places(TRANSPOSED ? perm : indices, begin, end);
auto copy_part = [&]() {
  if (rounds > 0) {
    const T* block = blocks + (size_t)(TRANSPOSED ? places.at(next) : next) * (B * B);
    const int inside = at_edge && next == end - 1 ? INSIDE : B;  // k in the matrix
    T* part = parts + copied % RING_PARTS * PART;
#pragma unroll
    for (int i = 0; i < W_ROWS * W_CHUNKS; i += 32) {
      const int part_row = (i + lane) / W_CHUNKS;
      const int chunk = (i + lane) % W_CHUNKS;
      T* dst = part + w_place(part_row, chunk);
      const int left = TRANSPOSED ? (part_row < inside ? CHUNK : 0) : inside - chunk * CHUNK;
      const int count = INSIDE < B ? left : CHUNK;
      if (aligned) {
        copy_first<true>(dst, block + part_row * B + chunk * CHUNK, count);
      } else {
        copy_first<false>(dst, block + part_row * B + chunk * CHUNK, count);
      }
    }
    copied++;
    if (++next == end) {
      next = begin;
      rounds--;
      if (TRANSPOSED) {
        places = Reader(perm, begin, end);
      }
    }
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
for (int n0 = begin_n; n0 < end_n; n0 += ROWS) {
#pragma unroll
  for (int to = 0; to < 2; to++) {
    const int row = row0 + 8 * to + lane % 4 * 2;
    const float bias_0 = BIAS && row < n_rows ? float(__ldg(bias + row)) : 0.0f;
    const float bias_1 = BIAS && row < n_rows ? float(__ldg(bias + row + 1)) : 0.0f;
#pragma unroll
    for (int tn = 0; tn < TILES; tn++) {
      acc[tn][to][0] = acc[tn][to][2] = bias_0;
      acc[tn][to][1] = acc[tn][to][3] = bias_1;
    }
  }
  each_stage([&](int stage) {
    const T* x_tile = tiles + ring.buffer * STAGE;
    wait_barrier(full + ring.buffer, ring.parity);
#pragma unroll 1
    while (col < (stage + 1) * DEPTH) {
      wait_copies<RING_PARTS - 1>();
      __syncwarp();
      const T* part = parts + read % RING_PARTS * PART;
      read++;
      const int chunk = col % DEPTH / CHUNK + lane / 16;
      col = ++j < end ? cols.at(j) * B : 1 << 30;
#pragma unroll
      for (int tk = 0; tk < B / STEP; tk++) {
        unsigned w[4];
        if constexpr (BY_COLUMNS) {
          unsigned low[2];
          unsigned high[2];
          load_columns<W_STRIDE>(low, part + tk * STEP * W_STRIDE);
          load_columns<W_STRIDE>(high, part + tk * STEP * W_STRIDE + 8);
          w[0] = low[0];
          w[1] = low[1];
          w[2] = high[0];
          w[3] = high[1];
        } else if (TRANSPOSED) {
          load_matrix4<true>(w, part + w_place(STEP * tk + lane % 16, lane / 16));
        } else {
          const int o = lane / 16 * 8 + lane % 8;
          load_matrix4<false>(w, part + w_place(o, 2 * tk + lane / 8 % 2));
        }
        round_factors<T>(w);
        const T* src = x_tile + swizzle<CHUNKS>(lane % 16, chunk + 2 * tk) * CHUNK;
#pragma unroll
        for (int tn = 0; tn < TILES; tn++) {
          unsigned xs[4];
          load_matrix4<false>(xs, src + tn * 16 * DEPTH);
          round_factors<T>(xs);
          multiply<T>(acc[tn][0], xs[0], xs[1], xs[2], xs[3], w[0], w[1]);
          multiply<T>(acc[tn][1], xs[0], xs[1], xs[2], xs[3], w[2], w[3]);
        }
      }
      __syncwarp();
      copy_part();
    }
    __syncwarp();
    if (lane == 0) {
      arrive(empty + ring.buffer);
    }
  });
  cols = Reader(indices, begin, end);
  j = begin;
  col = j < end ? cols.at(j) * B : 1 << 30;
  T* y_tile = y + ((size_t)v * N + n0) * n_rows + row0;
  auto sum = [&](int row_tile, int to, int e) {
    return acc[row_tile / 2][to][row_tile % 2 * 2 + e];
  };
  if constexpr (sizeof(T) == 2) {
    store_tiles<T, 2 * TILES, 2>(y_tile, n_rows, N - n0, n_rows - row0, sum);
  } else {
    store_pairs<T, 2 * TILES, 2>(y_tile, n_rows, N - n0, n_rows - row0, sum);
  }
}
wait_copies<0>();
