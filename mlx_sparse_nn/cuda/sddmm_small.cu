// The weight gradient of small blocks for rows of x that are not very many: a tile of the dense
// gradient, of which only those parts of 16 x 8 are multiplied in which something is stored, and
// only what is stored is written.
//
// Inputs, output: as in sddmm_tiles.cu, N not split; blocks of a block-row by ascending
// block-column.
// Launch
//   (ceil(n_rows / TILE_I) THREADS, ceil(n_cols / TILE_K), V) threads in groups of (THREADS, 1, 1),
//   THREADS = 32 WARPS_I WARPS_K. One group owns the blocks in TILE_I rows and TILE_K columns. A
//   warp multiplies TILE_I / WARPS_I by TILE_K / WARPS_K of it.
//   Shared memory: STAGES stages of DEPTH rows of y and of x, in which the tile lies at the end.
// Template
//   T float (as TF32), half or bfloat16; B even; TILE_I a multiple of B and of 16 WARPS_I; TILE_K
//   of B and of 16 WARPS_K; DEPTH rows n of a stage, a multiple of 16; STAGES.
// Sums in float32, n ascending.

#include "copies.h"
#include "mma.h"
#include "packs.h"

constexpr int THREADS = 32 * WARPS_I * WARPS_K;
constexpr int TILES_I = TILE_I / WARPS_I / 16;
constexpr int TILES_K = TILE_K / WARPS_K / 8;
constexpr int STEP = 32 / sizeof(T);   // rows n in a product of a warp
constexpr int CHUNK = 16 / sizeof(T);  // elements
constexpr int Y_CHUNKS = TILE_I / CHUNK;
constexpr int X_CHUNKS = TILE_K / CHUNK;
constexpr bool BY_COLUMNS = sizeof(T) == 4;  // no ldmatrix transposes these
constexpr int Y_STRIDE = (BY_COLUMNS ? column_stride<Y_CHUNKS>() : row_stride<Y_CHUNKS>()) * CHUNK;
constexpr int X_STRIDE = (BY_COLUMNS ? column_stride<X_CHUNKS>() : row_stride<X_CHUNKS>()) * CHUNK;
constexpr int STAGE = DEPTH * (Y_STRIDE + X_STRIDE);
constexpr int PITCH = TILE_K + 8;  // of the tile at the end
constexpr int ROWS = TILE_I / B;   // block-rows
constexpr int PACK = packed<T, B>();
extern __shared__ __align__(128) char shared[];
__shared__ int firsts[ROWS];
__shared__ int lasts[ROWS];
__shared__ unsigned stored[TILE_I / 16];  // a bit for each 8 columns of 16 rows
T* tiles = reinterpret_cast<T*>(shared);

const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warp = thread / 32;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int R = indptr_shape[0] - 1;
const int n_rows = R * B;
const int r0 = blockIdx.x * ROWS;
const int i0 = blockIdx.x * TILE_I;
const int k0 = blockIdx.y * TILE_K;

const T* y_rows = y + (size_t)v * N * n_rows + i0;
const T* x_rows = x + (size_t)v * N * n_cols + k0;
const int n_stages = (N + DEPTH - 1) / DEPTH;
const bool aligned =
    ((size_t)x | (size_t)y) % 16 == 0 && n_rows % CHUNK == 0 && n_cols % CHUNK == 0;
auto copy_part = [&](auto chunks, T* tile, const T* rows, int stage, int width, int left) {
  constexpr int CHUNKS = chunks.value;
  constexpr int STRIDE = column_stride<CHUNKS>() * CHUNK;
#pragma unroll
  for (int i = thread; i < DEPTH * CHUNKS; i += THREADS) {
    const int m = i / CHUNKS;
    const int chunk = i % CHUNKS;
    const int n = stage * DEPTH + m;
    const int count = n < N ? left - chunk * CHUNK : 0;
    const T* src = count > 0 ? rows + (size_t)n * width + chunk * CHUNK : x;
    T* dst = tile + (BY_COLUMNS ? m * STRIDE + chunk * CHUNK : swizzle<CHUNKS>(m, chunk) * CHUNK);
    if (aligned) {
      copy16<true>(dst, src, count > 0);
    } else {
      copy_first<false>(dst, src, count);
    }
  }
};
auto copy_stage = [&](int stage) {
  if (stage < n_stages) {
    T* tile = tiles + stage % STAGES * STAGE;
    copy_part(Count<Y_CHUNKS>(), tile, y_rows, stage, n_rows, n_rows - i0);
    copy_part(Count<X_CHUNKS>(), tile + DEPTH * Y_STRIDE, x_rows, stage, n_cols, n_cols - k0);
  }
  commit_copies();
};

#pragma unroll 1
for (int stage = 0; stage < STAGES - 1; stage++) {
  copy_stage(stage);
}

// What is stored, while the first stages are under way: a warp looks through a block-row.
if (thread < TILE_I / 16) {
  stored[thread] = 0;
}
__syncthreads();
for (int row = warp; row < ROWS; row += THREADS / 32) {
  const int begin = indptr[min(R, r0 + row)];
  const int end = indptr[min(R, r0 + row + 1)];
  int before = 0;
  int inside = 0;
#pragma unroll 4
  for (int j = begin; j < end; j += 32) {
    const int col = j + lane < end ? indices[j + lane] * B : 1 << 30;
    const bool is_inside = col >= k0 && col < k0 + TILE_K;
    before += __popc(__ballot_sync(0xffffffffu, col < k0));
    inside += __popc(__ballot_sync(0xffffffffu, is_inside));
    if (is_inside) {
      const unsigned columns = (2u << (col - k0 + B - 1) / 8) - (1u << (col - k0) / 8);
      for (int part = row * B / 16; part <= (row * B + B - 1) / 16; part++) {
        atomicOr(stored + part, columns);
      }
    }
  }
  if (lane == 0) {
    firsts[row] = begin + before;
    lasts[row] = begin + before + inside;
  }
}
__syncthreads();

const int part0 = warp / WARPS_K * TILES_I;
const int group0 = warp % WARPS_K * TILES_K;
unsigned used[TILES_I];
unsigned any = 0;
#pragma unroll
for (int ti = 0; ti < TILES_I; ti++) {
  used[ti] = stored[part0 + ti] >> group0 & ((1u << TILES_K) - 1);
  any |= used[ti];
}

float acc[TILES_I][TILES_K][4];
#pragma unroll
for (int ti = 0; ti < TILES_I; ti++) {
#pragma unroll
  for (int tk = 0; tk < TILES_K; tk++) {
    acc[ti][tk][0] = acc[ti][tk][1] = acc[ti][tk][2] = acc[ti][tk][3] = 0.0f;
  }
}
#pragma unroll 1
for (int stage = 0; stage < n_stages; stage++) {
  wait_copies<STAGES - 2>();
  __syncthreads();
  copy_stage(stage + STAGES - 1);
  const T* y_tile = tiles + stage % STAGES * STAGE;
  const T* x_tile = y_tile + DEPTH * Y_STRIDE;
  if (any) {
#pragma unroll
    for (int m = 0; m < DEPTH; m += STEP) {
      unsigned xs[TILES_K][2];
#pragma unroll
      for (int tk = 0; tk < TILES_K; tk += 2) {
        if (any >> tk & 3) {
          if constexpr (BY_COLUMNS) {
            const T* src = x_tile + m * X_STRIDE + (group0 + tk) * 8;
            load_columns<X_STRIDE>(xs[tk], src);
            load_columns<X_STRIDE>(xs[tk + 1], src + 8);
          } else {
            unsigned pair[4];
            load_matrix4<true>(
                pair, x_tile + swizzle<X_CHUNKS>(m + lane % 16, group0 + tk + lane / 16) * CHUNK);
            xs[tk][0] = pair[0];
            xs[tk][1] = pair[1];
            xs[tk + 1][0] = pair[2];
            xs[tk + 1][1] = pair[3];
          }
          round_factors<T>(xs[tk]);
          round_factors<T>(xs[tk + 1]);
        }
      }
#pragma unroll
      for (int ti = 0; ti < TILES_I; ti++) {
        if (used[ti]) {
          unsigned a[4];
          if constexpr (BY_COLUMNS) {
            unsigned low[2];
            unsigned high[2];
            const T* src = y_tile + m * Y_STRIDE + (part0 + ti) * 16;
            load_columns<Y_STRIDE>(low, src);
            load_columns<Y_STRIDE>(high, src + 8);
            a[0] = low[0];
            a[1] = high[0];
            a[2] = low[1];
            a[3] = high[1];
          } else {
            const int row = m + lane / 16 * 8 + lane % 8;
            const int chunk = (part0 + ti) * 2 + lane / 8 % 2;
            load_matrix4<true>(a, y_tile + swizzle<Y_CHUNKS>(row, chunk) * CHUNK);
          }
          round_factors<T>(a);
#pragma unroll
          for (int tk = 0; tk < TILES_K; tk++) {
            if (used[ti] >> tk & 1) {
              multiply<T>(acc[ti][tk], a[0], a[1], a[2], a[3], xs[tk][0], xs[tk][1]);
            }
          }
        }
      }
    }
  }
}
wait_copies<0>();
__syncthreads();

#pragma unroll
for (int ti = 0; ti < TILES_I; ti++) {
#pragma unroll
  for (int tk = 0; tk < TILES_K; tk++) {
    T* place = tiles + ((part0 + ti) * 16 + lane / 4) * PITCH + (group0 + tk) * 8 + lane % 4 * 2;
    place[0] = T(acc[ti][tk][0]);
    place[1] = T(acc[ti][tk][1]);
    place[8 * PITCH] = T(acc[ti][tk][2]);
    place[8 * PITCH + 1] = T(acc[ti][tk][3]);
  }
}
__syncthreads();
T* blocks = out + (size_t)v * indices_shape[0] * (B * B);
for (int row = warp; row < ROWS; row += WARPS_I * WARPS_K) {
  const int first = firsts[row];
  const int count = (lasts[row] - first) * (B * B / PACK);
#pragma unroll 1
  for (int e = lane; e < count; e += 32) {
    const int j = first + e / (B * B / PACK);
    const int at = e % (B * B / PACK) * PACK;
    const int col = indices[j] * B % TILE_K + at % B;
    *reinterpret_cast<Pack<T, PACK>*>(blocks + (size_t)j * (B * B) + at) =
        *reinterpret_cast<const Pack<T, PACK>*>(tiles + (row * B + at / B) * PITCH + col);
  }
}
