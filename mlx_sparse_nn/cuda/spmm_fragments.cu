// The product of spmm_tiles.cu on Hopper's tensor cores, for every block size and dtype: blocks go
// to registers, as rows of products whose columns are rows of x, which tensor cores read from
// shared memory. So blocks may lie transposed, and need not fill their 64 rows.
//
// Inputs, output: as there.
// Launch
//   (R CLUSTER THREADS, shares, V) threads in groups of (THREADS, 1, 1), THREADS = 128 (WGS_N WGS_O
//   + 1), in clusters of CLUSTER groups, which own what a group owns there: each takes equal parts
//   of the stages of a block-row. The last warpgroup copies, the others multiply.
//   Shared memory: STAGES times the bytes of a stage, and 1024.
// Template
//   T half, bfloat16 or float, which is rounded to TF32; B a multiple of 8, at most 64 WGS_O;
//   INSIDE columns of the last block-column, 1 to B; ROWS of x in a tile, 128 or 256 for each of
//   WGS_N; CROPPED 0 or 1: x ends with the matrix, at a multiple of 16 bytes; OUTSIDE outputs of
//   the last block-row that y and bias lack; CLUSTER, with which a group takes one tile; WGS_N and
//   WGS_O warpgroups over rows of x and outputs; STAGES; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: the bias, then blocks in stored order, k ascending by 32 bytes; in a cluster the
// bias, then such sums of its groups in order.

#include "barriers.h"
#include "copies.h"
#include "mma.h"
#include "wgmma.h"
#include "copiers.h"
#include "stores.h"
#include "fragments.h"
#include "clusters.h"

constexpr int WARPGROUPS = WGS_N * WGS_O;  // that multiply
constexpr int COPIERS = 128;               // threads
constexpr int SPAN = ROWS / WGS_N;         // rows of x of a warpgroup
constexpr int CHUNK = 16 / sizeof(T);      // elements
constexpr int DEPTH = 8 * CHUNK;           // k in a stage: rows of 128 bytes
constexpr int STEP = 2 * CHUNK;            // k in a product
constexpr int STEPS = DEPTH / STEP;
constexpr int W_ROWS = TRANSPOSED ? DEPTH : (B + 15) / 16 * 16;
constexpr int W_CHUNKS = TRANSPOSED ? B / CHUNK : 8;
constexpr bool BY_COLUMNS = TRANSPOSED && sizeof(T) == 4;  // no ldmatrix transposes these
constexpr int W_STRIDE = (BY_COLUMNS ? column_stride<W_CHUNKS>() : row_stride<W_CHUNKS>()) * CHUNK;
constexpr int W_TILE = (W_ROWS * W_STRIDE + 8 * DEPTH - 1) / (8 * DEPTH) * (8 * DEPTH);
constexpr int STAGE = ROWS * DEPTH + W_TILE;
static_assert(B <= 64 * WGS_O, "a warpgroup has 64 outputs");
extern __shared__ char shared[];
__shared__ unsigned long long full[STAGES];
__shared__ unsigned long long empty[STAGES];
T* tiles = reinterpret_cast<T*>(shared + (1024 - shared_address(shared) % 1024) % 1024);

const int r = blockIdx.x / CLUSTER;
const int rank = blockIdx.x % CLUSTER;
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
const int first_stage = all_stages * rank / CLUSTER;
const int n_stages = all_stages * (rank + 1) / CLUSTER - first_stage;
// Where a chunk lies in a tile of W.
auto w_place = [](int row, int chunk) {
  return BY_COLUMNS ? row * W_STRIDE + chunk * CHUNK : swizzle<W_CHUNKS>(row, chunk) * CHUNK;
};

if (thread < STAGES) {
  init_barrier(full + thread, COPIERS);
  init_barrier(empty + thread, 4 * WARPGROUPS);
}
__syncthreads();

if (warpgroup == WARPGROUPS) {
  if (SPAN == 256) {
    give_registers<72>();
  }
  // Eight threads copy a row of x, or of W; where that lies transposed, those of one k of a stage.
  constexpr int EVERY = COPIERS / 8;
  constexpr int W_EVERY = COPIERS / DEPTH;
  const int t = thread % COPIERS;
  const int copy_row = t / 8;
  const int chunk = t % 8;
  const int place = swizzle<8>(copy_row, chunk) * CHUNK;
  const int w_k = t / W_EVERY;
  const int n_inside = CROPPED ? n_cols : n_cols - B + INSIDE;
  const T* x_mine = x + ((size_t)v * N + copy_row) * n_cols;
  const T* blocks = data + (size_t)v * indices_shape[0] * (B * B);
  // Of the next stage: the column of this thread's chunk of x, or -1, and where its W lies.
  int next_col;
  int next_stored = 0;
  auto read_indices = [&](int i) {
    const int stage = first_stage + i;
    const int k = stage * DEPTH + chunk * CHUNK;
    const int j = begin + k / B;
    next_col = j < end ? __ldg(indices + j) * B + k % B : -1;
    if (INSIDE < B && next_col >= n_inside) {
      next_col = -1;
    }
    if (TRANSPOSED) {
      const int w_j = begin + (stage * DEPTH + w_k) / B;
      next_stored = w_j < end ? __ldg(perm + w_j) : -1;
      if (INSIDE < B && w_j < end &&
          __ldg(indices + w_j) * B + (stage * DEPTH + w_k) % B >= n_inside) {
        next_stored = -1;
      }
    }
  };
  auto copy_as = [&](auto alignment) {
    constexpr bool ALIGNED = alignment.value;
    Copier<STAGES, STAGES - 2> copier{full, empty};
    auto round_x = [&](int buffer) {
#pragma unroll
      for (int i = 0; i < ROWS / EVERY; i++) {
        round_chunk(tiles + buffer * STAGE + place + i * EVERY * DEPTH);
      }
    };
    if (n_stages > 0) {
      read_indices(0);
    }
    for (int n0 = begin_n; n0 < end_n; n0 += ROWS) {
      for (int i = 0; i < n_stages; i++) {
        const int stage = first_stage + i;
        const int k = stage * DEPTH + chunk * CHUNK;
        const int col = next_col;
        const int stored = next_stored;
        T* x_tile = tiles + copier.begin() * STAGE + place;
        T* w_tile = x_tile + ROWS * DEPTH;
        read_indices(i + 1 < n_stages ? i + 1 : 0);
        const int valid = (N - n0 - copy_row + EVERY - 1) / EVERY;
        copy_rows<ALIGNED, ROWS / EVERY, EVERY * DEPTH>(
            x_tile, x_mine + (size_t)n0 * n_cols + max(0, col), EVERY * (size_t)n_cols,
            col < 0 ? 0 : valid);
        if (TRANSPOSED) {
          const T* w_src =
              blocks + (size_t)max(0, stored) * (B * B) + (stage * DEPTH + w_k) % B * B;
#pragma unroll
          for (int c = t % W_EVERY; c < W_CHUNKS; c += W_EVERY) {
            copy16<ALIGNED>(w_tile - place + w_place(w_k, c), w_src + c * CHUNK, stored >= 0);
          }
        } else {
          const T* w_src = blocks + (size_t)(begin + k / B) * (B * B) + copy_row * B + k % B;
          const int valid_o = (B - copy_row + EVERY - 1) / EVERY;
          if (INSIDE < B && col >= 0 && n_inside - col < CHUNK) {
#pragma unroll 1
            for (int o = 0; o < valid_o; o++) {
              copy_first<ALIGNED>(w_tile + o * EVERY * DEPTH, w_src + o * EVERY * B,
                                  n_inside - col);
            }
          } else {
            copy_rows<ALIGNED, W_ROWS / EVERY, EVERY * DEPTH>(w_tile, col < 0 ? blocks : w_src,
                                                              EVERY * B, col < 0 ? 0 : valid_o);
          }
        }
        copier.end(round_x);
      }
    }
    copier.finish(round_x);
  };
  if (((size_t)x | (size_t)data) % 16 == 0) {
    copy_as(Aligned());
  } else {
    copy_as(Unaligned());
  }
  if (CLUSTER > 1) {
    __syncthreads();
    sync_cluster();
    sync_cluster();
  }
  return;
}

if (SPAN == 256) {
  take_registers<216>();
}
Ring ring{STAGES};
const int n_rows = (indptr_shape[0] - 1) * B - OUTSIDE;
const int n_outputs = min(B, n_rows - r * B);
const int warpgroup_n = warpgroup / WGS_O * SPAN;
const int warp_o = warpgroup % WGS_O * 64 + thread / 32 % 4 * 16;  // rows from B on are not stored
float acc[SPAN / 2];
for (int n0 = begin_n; n0 < end_n; n0 += ROWS) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int o = warp_o + 8 * half + lane / 4;
    const float bias_o =
        BIAS && CLUSTER == 1 && o < n_outputs ? float(__ldg(bias + r * B + o)) : 0.0f;
#pragma unroll
    for (int e = 0; e < SPAN / 4; e++) {
      acc[e / 2 * 4 + 2 * half + e % 2] = bias_o;
    }
  }
  hold_sums(acc);
  for (int stage = 0; stage < n_stages; stage++) {
    const T* x_tile = tiles + ring.buffer * STAGE;
    const T* w_tile = x_tile + ROWS * DEPTH;
    wait_barrier(full + ring.buffer, ring.parity);
    unsigned ws[STEPS][4];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      if constexpr (BY_COLUMNS) {
        const T* at = w_tile + s * STEP * W_STRIDE;
        unsigned low[2];
        unsigned high[2];
        load_columns<W_STRIDE>(low, at + warp_o % B);
        load_columns<W_STRIDE>(high, at + (warp_o + 8) % B);
        ws[s][0] = low[0];
        ws[s][1] = high[0];
        ws[s][2] = low[1];
        ws[s][3] = high[1];
      } else if (TRANSPOSED) {
        const int k = s * STEP + lane / 16 * 8 + lane % 8;
        load_matrix4<true>(ws[s], w_tile + w_place(k, (warp_o / 8 + lane / 8 % 2) % W_CHUNKS));
      } else {
        load_matrix4<false>(ws[s], w_tile + w_place((warp_o + lane % 16) % B, 2 * s + lane / 16));
      }
      round_factors<T>(ws[s]);
    }
    begin_products();
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      FragmentProduct<T, SPAN, 0>::multiply(acc, ws[s],
                                            describe(x_tile + warpgroup_n * DEPTH + s * STEP, 16));
    }
    commit_products();
    wait_products<0>();
    if (lane == 0) {
      arrive(empty + ring.buffer);
    }
    ring.advance();
  }
  if constexpr (CLUSTER == 1) {
    T* y_tile = y + ((size_t)v * N + n0 + warpgroup_n) * n_rows + r * B;
    store_across<T, SPAN>(y_tile, n_rows, N - n0 - warpgroup_n, warp_o, n_outputs, acc);
  }
}
if constexpr (CLUSTER > 1) {
  // The sums of this part, in place of the stages; then each group adds up some rows.
  constexpr int STRIDE = B + 4;  // writes of a warp go to different banks
  float* sums = reinterpret_cast<float*>(shared);
  __syncthreads();
  store_across<float, SPAN>(sums + warpgroup_n * STRIDE, STRIDE, SPAN, warp_o, B, acc);
  sync_cluster();
  store_sums<T, CLUSTER, B, STRIDE, 128 * WARPGROUPS>(
      y + ((size_t)v * N + begin_n) * n_rows + r * B, n_rows, sums, BIAS ? bias + r * B : nullptr,
      min(ROWS, N - begin_n), n_outputs);
  sync_cluster();
}
