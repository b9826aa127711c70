// The weight gradient of blocks of 8 and 12 for rows of x that are not very many: parts of y and of
// x that belong to a rectangle of the matrix lie in shared memory, whence each stored block takes
// its columns.
//
// Inputs, output: as in sddmm_tiles.cu, N not split; blocks of a block-row by ascending
// block-column, n_rows and n_cols multiples of 8.
// Launch
//   (ceil(R / ROWS) 512, ceil(C / COLS), V) threads in groups of (512, 1, 1). One group owns the
//   blocks of ROWS block-rows in COLS block-columns. A warp takes SLOTS products of 16 columns of x
//   at a time: of two blocks of a block-row, B = 8, or of one, B = 12.
//   Shared memory: STAGES stages of DEPTH rows of y and of x.
// Template
//   T half or bfloat16; B 8 or 12; ROWS, at most 16, and COLS, of blocks: whole 16 bytes; SLOTS;
//   DEPTH rows n of a stage, a multiple of 16; STAGES.
// Sums in float32, n ascending.

#include "copies.h"
#include "mma.h"
#include "packs.h"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int Y_CHUNKS = ROWS * B / 8;
constexpr int X_CHUNKS = COLS * B / 8;
constexpr int Y_STRIDE = row_stride<Y_CHUNKS>() * 8;
constexpr int X_STRIDE = row_stride<X_CHUNKS>() * 8;
constexpr int STAGE = DEPTH * (Y_STRIDE + X_STRIDE);
constexpr int TAKEN = B == 8 ? 2 : 1;  // blocks in a slot
constexpr int UNITS = B == 8 ? 1 : 2;  // of 8 columns of y
extern __shared__ __align__(128) char shared[];
__shared__ int firsts[ROWS];     // block of each block-row in the rectangle,
__shared__ int counts[ROWS];     // how many there are,
__shared__ int slots[ROWS + 1];  // and its first slot
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
const int k0 = blockIdx.y * COLS * B;
const T* y_rows = y + (size_t)v * N * n_rows + r0 * B;
const T* x_rows = x + (size_t)v * N * n_cols + k0;
const int n_stages = (N + DEPTH - 1) / DEPTH;
const bool aligned = ((size_t)x | (size_t)y) % 16 == 0;

auto copy_part = [&](auto chunks, T* tile, const T* rows, int n0, int width, int n_valid) {
  constexpr int CHUNKS = chunks.value;
#pragma unroll
  for (int i = thread; i < DEPTH * CHUNKS; i += THREADS) {
    const int m = i / CHUNKS;
    const int chunk = i % CHUNKS;
    const bool valid = n0 + m < N && chunk * 8 < n_valid;
    const T* src = valid ? rows + (size_t)(n0 + m) * width + chunk * 8 : x;
    T* dst = tile + swizzle<CHUNKS>(m, chunk) * 8;
    if (aligned) {
      copy16<true>(dst, src, valid);
    } else {
      copy16<false>(dst, src, valid);
    }
  }
};
auto copy_stage = [&](int stage) {
  if (stage < n_stages) {
    T* tile = tiles + stage % STAGES * STAGE;
    const int n0 = stage * DEPTH;
    copy_part(Count<Y_CHUNKS>(), tile, y_rows, n0, n_rows, n_rows - r0 * B);
    copy_part(Count<X_CHUNKS>(), tile + DEPTH * Y_STRIDE, x_rows, n0, n_cols, n_cols - k0);
  }
  commit_copies();
};
auto begin_copies = [&]() {
#pragma unroll 1
  for (int stage = 0; stage < STAGES - 1; stage++) {
    copy_stage(stage);
  }
};
begin_copies();

// What is stored, while the first stages are under way: a warp looks through a block-row.
if (warp < ROWS) {
  const int begin = indptr[min(R, r0 + warp)];
  const int end = indptr[min(R, r0 + warp + 1)];
  int before = 0;
  int inside = 0;
#pragma unroll 4
  for (int j = begin; j < end; j += 32) {
    const int col = j + lane < end ? indices[j + lane] * B : 1 << 30;
    before += __popc(__ballot_sync(0xffffffffu, col < k0));
    inside += __popc(__ballot_sync(0xffffffffu, col >= k0 && col < k0 + COLS * B));
  }
  if (lane == 0) {
    firsts[warp] = begin + before;
    counts[warp] = inside;
  }
}
__syncthreads();
if (thread == 0) {
  slots[0] = 0;
  for (int row = 0; row < ROWS; row++) {
    slots[row + 1] = slots[row] + (counts[row] + TAKEN - 1) / TAKEN;
  }
}
__syncthreads();

const int all_slots = slots[ROWS];
T* blocks = out + (size_t)v * indices_shape[0] * (B * B);
for (int slot0 = 0; slot0 < all_slots; slot0 += WARPS * SLOTS) {
  if (slot0 > 0) {
    __syncthreads();
    begin_copies();
  }
  const int here = min(WARPS * SLOTS, all_slots - slot0);
  const int first = slot0 + here * warp / WARPS;
  const int mine = slot0 + here * (warp + 1) / WARPS - first;
  // Of each slot: its first block, how many there are, and where this lane loads of y and of x.
  int block_of[SLOTS];
  int row_of[SLOTS];
  int y_at[SLOTS];
  int x_at[SLOTS];
#pragma unroll
  for (int s = 0; s < SLOTS; s++) {
    const int slot = first + min(s, max(0, mine - 1));
    int row = 0;
    while (row < ROWS - 1 && slots[row + 1] <= slot) {
      row++;
    }
    const int place = (slot - slots[row]) * TAKEN;
    const int j = max(0, firsts[row] + min(place, counts[row] - 1));
    const bool second = B == 8 && place + 1 < counts[row];
    block_of[s] = s < mine ? j : -1;
    row_of[s] = row * 2 + second;
    // A lane gives the address of row n = lane % 8 or + 8 of 8 columns: for x, in turn of the first
    // and the second 8.
    const int row_low = lane % 8 + lane / 16 * 8;
    const int upper = lane / 8 % 2;
    const int other = second ? indices[j + 1] : indices[j];
    const int x_chunk =
        B == 8 ? (upper ? other : indices[j]) % COLS : indices[j] % COLS * B / 8 + upper;
    x_at[s] = swizzle<X_CHUNKS>(row_low, x_chunk) * 8;
    const int y_row = lane % 16;
    y_at[s] = swizzle<Y_CHUNKS>(y_row, row * B / 8 + (UNITS == 2 ? lane / 16 : 0)) * 8;
  }
  float acc[SLOTS][UNITS][4];
#pragma unroll
  for (int s = 0; s < SLOTS; s++) {
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      acc[s][u][0] = acc[s][u][1] = acc[s][u][2] = acc[s][u][3] = 0.0f;
    }
  }
#pragma unroll 1
  for (int stage = 0; stage < n_stages; stage++) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    copy_stage(stage + STAGES - 1);
    const T* y_tile = tiles + stage % STAGES * STAGE;
    const T* x_tile = y_tile + DEPTH * Y_STRIDE;
#pragma unroll
    for (int m = 0; m < DEPTH; m += 16) {
#pragma unroll
      for (int s = 0; s < SLOTS; s++) {
        if (s < mine) {
          unsigned a[4];
          load_matrix4<true>(a, x_tile + m * X_STRIDE + x_at[s]);
          if constexpr (UNITS == 1) {
            unsigned b[2];
            load_matrix2<true>(b, y_tile + m * Y_STRIDE + y_at[s]);
            multiply<T>(acc[s][0], a[0], a[1], a[2], a[3], b[0], b[1]);
          } else {
            unsigned b[4];
            load_matrix4<true>(b, y_tile + m * Y_STRIDE + y_at[s]);
            multiply<T>(acc[s][0], a[0], a[1], a[2], a[3], b[0], b[1]);
            multiply<T>(acc[s][UNITS - 1], a[0], a[1], a[2], a[3], b[2], b[3]);
          }
        }
      }
    }
  }
  // A sum is of column k = lane / 4 or + 8 and of row i = lane % 4 * 2 or + 1, of the slot's.
#pragma unroll
  for (int s = 0; s < SLOTS; s++) {
    if (s < mine) {
      const int j = block_of[s];
#pragma unroll
      for (int e = 0; e < 4 * UNITS; e++) {
        const int upper = e / 2 % 2;
        int i = e / 4 * 8 + lane % 4 * 2 + e % 2;
        int k = lane / 4;
        bool valid = B == 8 ? upper == 0 || row_of[s] % 2 : true;
        size_t place = (size_t)j + (B == 8 ? upper : 0);
        if (B == 12) {
          i -= row_of[s] / 2 * B % 8;
          k += upper * 8 - indices[j] * B % 8;
          valid = i >= 0 && i < B && k >= 0 && k < B;
        }
        if (valid) {
          blocks[place * (B * B) + i * B + k] = T(acc[s][e / 4][e % 4]);
        }
      }
    }
  }
}
wait_copies<0>();
