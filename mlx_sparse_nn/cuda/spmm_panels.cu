// The product of spmm_tiles.cu for small blocks that fill much of the matrix: x is read once for
// 256 outputs, as in a dense product, and only stored blocks are multiplied.
//
// Inputs, output: as there.
// Launch
//   (P 640, Y, V) threads in blocks of 640, P = ceil(R B / 256). One thread block owns a panel of
//   256 outputs and an equal share of the tiles of 128 rows of x, which it takes one after the
//   other. The last 4 warps copy x, 128 columns a stage where the panel has a block; each of the 16
//   others copies and multiplies by the blocks, or halves of blocks, of 16 outputs. C is at most
//   2^20. Shared memory: STAGES 32768 + 65536 + 1024 bytes.
// Template
//   T half or bfloat16; B 16 or 32; STAGES; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: the bias, then blocks in stored order, k ascending by 16.

#include "barriers.h"
#include "copies.h"
#include "mma.h"
#include "reader.h"
#include "stores.h"

constexpr int ROWS = 128;
constexpr int WIDTH = 256;    // outputs of the panel
constexpr int OWN = 16;       // outputs of a warp
constexpr int WARPS = 16;     // that multiply
constexpr int COPIERS = 128;  // threads
constexpr int DEPTH = 128;    // columns in a stage
constexpr int TILES =
    ROWS / 16;  // 16 x 8 tiles of a warp over the rows of x; two are over its outputs
constexpr int CHUNKS = DEPTH / 8;
constexpr int STAGE = ROWS * DEPTH;
constexpr int PART =
    B * OWN;  // values of a block that a warp multiplies by: B of k, or outputs, by OWN or B
constexpr int W_CHUNKS = (TRANSPOSED ? OWN : B) / 8;
constexpr int HELD = 2048 / PART;  // of them, a ring in shared memory
extern __shared__ char shared[];
__shared__ unsigned long long full[STAGES];
__shared__ unsigned long long empty[STAGES];
__shared__ unsigned used[(1 << 20) / DEPTH / 32];  // bit s: some block of the panel lies in stage s
T* tiles = reinterpret_cast<T*>(shared + (1024 - shared_address(shared) % 1024) % 1024);

const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warp = thread / 32;
const int N = held(x_shape[x_ndim - 2]);
const int C = held(x_shape[x_ndim - 1]);
const int R = held(indptr_shape[0] - 1);
const int all_tiles = (N + ROWS - 1) / ROWS;
const int begin_n = (size_t)all_tiles * blockIdx.y / gridDim.y * ROWS;
const int end_n = (size_t)all_tiles * (blockIdx.y + 1) / gridDim.y * ROWS;
const int n_words = (C + 32 * DEPTH - 1) / (32 * DEPTH);

for (int i = thread; i < n_words; i += blockDim.x) {
  used[i] = 0;
}
if (thread < STAGES) {
  init_barrier(full + thread, COPIERS);
  init_barrier(empty + thread, WARPS);
}
__syncthreads();
const int first_row = blockIdx.x * (WIDTH / B);
const int panel_end = indptr[min(R, first_row + WIDTH / B)];
for (int j = indptr[first_row] + thread; j < panel_end; j += blockDim.x) {
  const int s = indices[j] * B / DEPTH;
  if (!(used[s / 32] >> s % 32 & 1)) {
    atomicOr(used + s / 32, 1u << s % 32);
  }
}
__syncthreads();

Ring ring{STAGES};
// Call work(s) for each stage of a tile that has a block, in order.
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
  const int place = swizzle<CHUNKS>(copy_row, chunk) * 8;
  const T* x_mine = x + ((size_t)v * N + copy_row) * C + chunk * 8;
  auto copy_as = [&](auto alignment) {
    constexpr bool ALIGNED = alignment.value;
    for (int n0 = begin_n; n0 < end_n; n0 += ROWS) {
      each_stage([&](int s) {
        T* x_tile = tiles + ring.buffer * STAGE + place;
        const T* x_src = x_mine + (size_t)n0 * C + s * DEPTH;
        const int valid = s * DEPTH + chunk * 8 < C ? (N - n0 - copy_row + EVERY - 1) / EVERY : 0;
        wait_barrier(empty + ring.buffer, ring.parity ^ 1);
        copy_rows<ALIGNED, ROWS / EVERY, EVERY * DEPTH>(x_tile, x_src, EVERY * (size_t)C, valid);
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
// This warp's parts of blocks are copied HELD ahead, through all tiles.
const int out = R * B;
const int first_out = first_row * B + warp * OWN;
const int r = first_out / B;
const int o0 = first_out % B;
const int begin = indptr[min(R, r)];
const int end = indptr[min(R, r + 1)];
const bool aligned = (size_t)data % 16 == 0;
const T* blocks = data + (size_t)v * indices_shape[0] * (B * B) + (TRANSPOSED ? o0 : o0 * B);
T* parts = tiles + STAGES * STAGE + warp * (HELD * PART);
int copied = 0;
int next = begin;  // block to copy, and in how many tiles more
int rounds = begin < end ? (end_n - begin_n) / ROWS : 0;
Reader places(TRANSPOSED ? perm : indices, begin, end);
auto copy_part = [&]() {
  if (rounds > 0) {
    const T* block = blocks + (size_t)(TRANSPOSED ? places.at(next) : next) * (B * B);
    T* part = parts + copied % HELD * PART;
#pragma unroll
    for (int i = 0; i < PART / 8; i += 32) {
      const int row = (i + lane) / W_CHUNKS;
      const int col = (i + lane) % W_CHUNKS;
      T* dst = part + swizzle<W_CHUNKS>(row, col) * 8;
      if (aligned) {
        copy16<true>(dst, block + row * B + col * 8, true);
      } else {
        copy16<false>(dst, block + row * B + col * 8, true);
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
for (int i = 0; i < HELD; i++) {
  copy_part();
}
int read = 0;
Reader cols(indices, begin, end);
int j = begin;
int col = j < end ? cols.at(j) * B : 1 << 30;
float acc[TILES][2][4];
for (int n0 = begin_n; n0 < end_n; n0 += ROWS) {
#pragma unroll
  for (int o = 0; o < 2; o++) {
    const int at = first_out + 8 * o + lane % 4 * 2;
    const float low = BIAS && at < out ? float(__ldg(bias + at)) : 0.0f;
    const float high = BIAS && at < out ? float(__ldg(bias + at + 1)) : 0.0f;
#pragma unroll
    for (int i = 0; i < TILES; i++) {
      acc[i][o][0] = acc[i][o][2] = low;
      acc[i][o][1] = acc[i][o][3] = high;
    }
  }
  each_stage([&](int s) {
    const T* x_tile = tiles + ring.buffer * STAGE;
    wait_barrier(full + ring.buffer, ring.parity);
#pragma unroll 1
    while (col < (s + 1) * DEPTH) {
      wait_copies<HELD - 1>();
      __syncwarp();
      const T* part = parts + read % HELD * PART;
      read++;
      const int chunk = col % DEPTH / 8 + lane / 16;
      col = ++j < end ? cols.at(j) * B : 1 << 30;
#pragma unroll
      for (int k = 0; k < B / 16; k++) {
        unsigned w[4];
        if (TRANSPOSED) {
          load_matrix4<true>(w, part + swizzle<W_CHUNKS>(16 * k + lane % 16, lane / 16) * 8);
        } else {
          const int row = lane / 16 * 8 + lane % 8;
          load_matrix4<false>(w, part + swizzle<W_CHUNKS>(row, 2 * k + lane / 8 % 2) * 8);
        }
        const T* src = x_tile + swizzle<CHUNKS>(lane % 16, chunk + 2 * k) * 8;
#pragma unroll
        for (int i = 0; i < TILES; i++) {
          unsigned xs[4];
          load_matrix4<false>(xs, src + i * 16 * DEPTH);
          multiply<T>(acc[i][0], xs[0], xs[1], xs[2], xs[3], w[0], w[1]);
          multiply<T>(acc[i][1], xs[0], xs[1], xs[2], xs[3], w[2], w[3]);
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
  store_tiles<T, 2 * TILES, 2>(
      y + ((size_t)v * N + n0) * out + first_out, out, N - n0, out - first_out,
      [&](int half, int o, int e) { return acc[half / 2][o][half % 2 * 2 + e]; });
}
wait_copies<0>();
