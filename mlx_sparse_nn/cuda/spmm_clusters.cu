// The product of spmm_tiles.cu for some rows of x, which is bound by what is read from L2: x is
// read once for WIDTH outputs, and the thread blocks of a cluster share the columns.
//
// Inputs, output: as there; blocks of a block-row by ascending block-column, at most 4096 of them.
// Launch
//   (panels CLUSTER THREADS, ceil(N / ROWS), V) threads in groups of (THREADS, 1, 1), panels =
//   ceil(n_rows / WIDTH), THREADS = 2 WIDTH + 128, in clusters of CLUSTER groups. A cluster owns a
//   panel of WIDTH outputs and ROWS rows of x; each of its groups takes an equal share of those
//   block-columns in which the panel has blocks. The last 4 warps copy their x. Each of the others
//   copies and multiplies the part of every block that lies in its 16 outputs.
//   Shared memory: STAGES ROWS DEPTH 2 + WIDTH / 16 RING 2 bytes, DEPTH = max(128, B).
// Template
//   T half or bfloat16; B 16, 32, 64 or 128; INSIDE columns of the last block-column, 1 to B; ROWS
//   a multiple of 16; WIDTH a multiple of 16; CLUSTER; STAGES; RING elements of a warp's blocks
//   under way; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: each share of the columns its blocks in stored order, k ascending by 16; then
// the bias, and the shares in order.

#include "barriers.h"
#include "copies.h"
#include "mma.h"
#include "reader.h"
#include "stores.h"
#include "clusters.h"

constexpr int OWN = 16;             // outputs of a warp
constexpr int WARPS = WIDTH / OWN;  // that multiply
constexpr int COPIERS = 128;        // threads
constexpr int TILES = ROWS / 16;    // 16 x 8 tiles of a warp over the rows of x, 2 over outputs
constexpr int SLOTS = 128 / B;      // block-columns in a stage
constexpr int DEPTH = SLOTS * B;
constexpr int CHUNKS = DEPTH / 8;
constexpr int STAGE = ROWS * DEPTH;
constexpr int PART_K = B < 32 ? B : 32;  // a warp copies its outputs of a block in parts
constexpr int PARTS = B / PART_K;
constexpr int PART = PART_K * OWN;
constexpr int W_CHUNKS = (TRANSPOSED ? OWN : PART_K) / 8;
constexpr int RING_PARTS = RING / PART;
constexpr int MAX_COLS = 4096;                      // block-columns
constexpr int SUM_STRIDE = WIDTH + 8;               // from a row of sums to the next
constexpr bool FULL = WIDTH == 256 && ROWS == 128;  // sums fill the registers
extern __shared__ __align__(128) char shared[];
__shared__ unsigned long long full[STAGES];
__shared__ unsigned long long empty[STAGES];
__shared__ unsigned used[MAX_COLS / 32];    // a bit a block-column: has the panel a block there?
__shared__ unsigned short share[MAX_COLS];  // the used block-columns of this thread block
T* tiles = reinterpret_cast<T*>(shared);

const int rank = blockIdx.x % CLUSTER;
const int out0 = blockIdx.x / CLUSTER * WIDTH;
const int n0 = blockIdx.y * ROWS;
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warp = thread / 32;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int R = in_register(indptr_shape[0] - 1);
const int n_words = (n_cols / B + 31) / 32;
const int n_valid = min(ROWS, N - n0);

const int panel_begin = indptr[out0 / B];
const int panel_end = indptr[min(R, (out0 + WIDTH - 1) / B + 1)];
for (int i = thread; i < n_words; i += blockDim.x) {
  used[i] = 0;
}
if (thread < STAGES) {
  init_barrier(full + thread, COPIERS);
  init_barrier(empty + thread, WARPS);
}
__syncthreads();
for (int j = panel_begin + thread; j < panel_end; j += blockDim.x) {
  const int col = indices[j];
  atomicOr(used + col / 32, 1u << col % 32);
}
__syncthreads();
int before = 0;
int n_used = 0;
for (int i = 0; i < n_words; i++) {
  const int count = __popc(used[i]);
  before += i < thread ? count : 0;
  n_used += count;
}
const int first = n_used * rank / CLUSTER;
const int n_mine = n_used * (rank + 1) / CLUSTER - first;
const int n_stages = (n_mine + SLOTS - 1) / SLOTS;
if (thread < n_words) {
  for (unsigned left = used[thread]; left; left &= left - 1, before++) {
    if (before >= first && before < first + n_mine) {
      share[before - first] = 32 * thread + __ffs(left) - 1;
    }
  }
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
  const T* x_mine = x + ((size_t)v * N + n0 + copy_row) * n_cols + chunk % (B / 8) * 8;
  auto copy_as = [&](auto alignment) {
    constexpr bool ALIGNED = alignment.value;
    for (int stage = 0; stage < n_stages; stage++) {
      const int slot = stage * SLOTS + chunk / (B / 8);
      const int rows = slot < n_mine ? n_valid - copy_row : 0;
      T* x_tile = tiles + ring.buffer * STAGE + place;
      const T* x_src = x_mine + (slot < n_mine ? share[slot] * B : 0);
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
  if (CLUSTER > 1) {
    __syncthreads();
    sync_cluster();
    sync_cluster();
  }
  return;
}
if (FULL) {
  take_registers<112>();
}

// The first of indices[low] to indices[high - 1], which ascend, that is `col` or more. The lanes of
// a warp search together.
auto search_column = [&](int low, int high, int col) {
  while (low < high) {
    const int step = (high - low + 31) / 32;
    const int ahead = low + (lane + 1) * step - 1;
    const bool less = ahead < high && indices[ahead] < col;
    low += __popc(__ballot_sync(0xffffffffu, less)) * step;
    high = min(high, low + step - 1);
  }
  return low;
};
const int n_rows = R * B;
const int row0 = out0 + warp * OWN;
const int r = row0 / B;
const int o0 = row0 % B;
int begin = indptr[min(R, r)];
int end = n_mine > 0 ? indptr[min(R, r + 1)] : begin;
if (begin < end) {
  const int row_end = end;
  end = search_column(begin, row_end, share[n_mine - 1] + 1);
  begin = search_column(begin, row_end, share[0]);
}
const bool aligned = (size_t)data % 16 == 0;
const T* blocks = data + (size_t)v * indices_shape[0] * (B * B) + (TRANSPOSED ? o0 : o0 * B);
T* parts = tiles + STAGES * STAGE + warp * RING;
// Only the last block of a block-row can reach past the matrix.
const bool at_edge = INSIDE < B && begin < end && (indices[end - 1] + 1) * B == n_cols;
int copied = 0;
int next = begin;  // block to copy, and its part
int next_part = 0;
Reader places(perm, begin, TRANSPOSED ? end : begin);
auto copy_part = [&]() {
  if (next < end) {
    const int k = next_part * PART_K;
    const int stored = TRANSPOSED ? places.at(next) : next;
    const T* block = blocks + (size_t)stored * (B * B) + (TRANSPOSED ? k * B : k);
    const int inside = (at_edge && next == end - 1 ? INSIDE : B) - k;  // k in the matrix
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
    if (++next_part == PARTS) {
      next_part = 0;
      next++;
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
int col = j < end ? cols.at(j) : -1;
float acc[TILES][2][4];
#pragma unroll
for (int tn = 0; tn < TILES; tn++) {
#pragma unroll
  for (int e = 0; e < 4; e++) {
    acc[tn][0][e] = acc[tn][1][e] = 0.0f;
  }
}
for (int stage = 0; stage < n_stages; stage++) {
  const T* x_tile = tiles + ring.buffer * STAGE;
  wait_barrier(full + ring.buffer, ring.parity);
#pragma unroll 1
  for (int slot = 0; slot < SLOTS; slot++) {
    const int i = stage * SLOTS + slot;
    if (i >= n_mine || share[i] != col) {
      continue;
    }
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      wait_copies<RING_PARTS - 1>();
      __syncwarp();
      const T* part = parts + read % RING_PARTS * PART;
      read++;
#pragma unroll
      for (int tk = 0; tk < PART_K / 16; tk++) {
        unsigned w[4];
        if (TRANSPOSED) {
          load_matrix4<true>(w, part + swizzle<W_CHUNKS>(16 * tk + lane % 16, lane / 16) * 8);
        } else {
          const int o = lane / 16 * 8 + lane % 8;
          load_matrix4<false>(w, part + swizzle<W_CHUNKS>(o, 2 * tk + lane / 8 % 2) * 8);
        }
        const int chunk = (slot * B + p * PART_K) / 8 + 2 * tk + lane / 16;
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
    }
    col = ++j < end ? cols.at(j) : -1;
  }
  __syncwarp();
  if (lane == 0) {
    arrive(empty + ring.buffer);
  }
  ring.advance();
}
wait_copies<0>();
if (CLUSTER == 1) {
  store_tiles<T, 2 * TILES, 2>(
      y + ((size_t)v * N + n0) * n_rows + row0, n_rows, N - n0, n_rows - row0,
      [&](int row_tile, int to, int e) {
        const float bias_e =
            BIAS ? float(__ldg(bias + min(n_rows - 2, row0 + 8 * to + lane % 4 * 2) + e)) : 0.0f;
        return bias_e + acc[row_tile / 2][to][row_tile % 2 * 2 + e];
      });
} else {
  // The sums of this share, in place of the stages; then each thread block adds up some rows.
  float* sums = reinterpret_cast<float*>(shared);
  __syncthreads();
#pragma unroll
  for (int tn = 0; tn < TILES; tn++) {
#pragma unroll
    for (int to = 0; to < 2; to++) {
      float* place = sums + (16 * tn + lane / 4) * SUM_STRIDE + warp * OWN + 8 * to + lane % 4 * 2;
      *reinterpret_cast<float2*>(place) = make_float2(acc[tn][to][0], acc[tn][to][1]);
      *reinterpret_cast<float2*>(place + 8 * SUM_STRIDE) =
          make_float2(acc[tn][to][2], acc[tn][to][3]);
    }
  }
  sync_cluster();
  store_sums<T, CLUSTER, WIDTH, SUM_STRIDE, 32 * WARPS>(y + ((size_t)v * N + n0) * n_rows + out0,
                                                        n_rows, sums, BIAS ? bias + out0 : nullptr,
                                                        n_valid, n_rows - out0);
  sync_cluster();
}
