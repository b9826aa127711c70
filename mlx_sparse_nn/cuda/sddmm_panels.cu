// The product of sddmm_tiles.cu for small blocks, many of which share the columns of y and of x.
//
// Inputs
//   y, x, indptr, indices as there; step (1) int32: rows n of a split.
// Output
//   out      (S, [V,] n_blocks, B, B) OUT; out[s] sums the rows n of split s
// Launch
//   (P Q 640, S, V) threads in blocks of 640. P = ceil(block-rows / PANEL) panels of PANEL = 256 /
//   B neighbouring block-rows, none of which has more than Q 32768 / (B B) blocks. The blocks of a
//   panel, by column and then by row, are dealt to Q thread blocks in equal shares, and those of a
//   thread block to its first 16 warps. The last 4 warps copy the panel of y and the distinct
//   columns of x of these blocks, some rows n a stage. Shared memory: SHARED bytes, at least 8 per
//   block-column, and 16384 + 2097152 / B.
// Template
//   T half or bfloat16; OUT, T or float; B 16 or 32; SHARED.
// Sums in float32, n ascending by 16.

#include "barriers.h"
#include "copies.h"
#include "mma.h"
#include "stores.h"

constexpr int WARPS = 16;  // that multiply
constexpr int COPY_WARPS = 4;
constexpr int THREADS = 32 * (WARPS + COPY_WARPS);
constexpr int PANEL = 256 / B;         // block-rows
constexpr int SLOTS = 2048 / (B * B);  // blocks of a warp: 64 sums a thread
constexpr int CAP = WARPS * SLOTS;     // blocks of a thread block
constexpr int MAX_STAGES = 8;
constexpr int CHUNKS = B / 8;           // 16-byte chunks of a row of a block
constexpr int TILES = B / 16;           // 16 x 16 tiles along a side of a block
constexpr int Y_PITCH = PANEL * B * 2;  // bytes of a row of y in a stage
static_assert(B == 16 || B == 32, "a warp holds 8 or 2 blocks");
static_assert(CAP <= THREADS && sizeof(T) == 2, "a thread finds the place of a block");
extern __shared__ __align__(128) char shared[];
__shared__ unsigned long long full[MAX_STAGES];
__shared__ unsigned long long empty[MAX_STAGES];
__shared__ int starts[PANEL + 1];
__shared__ int warp_sums[THREADS / 32];
__shared__ int block_of[CAP];  // of each of this thread block's blocks: its place in out,
__shared__ int row_of[CAP];    // its row in the panel,
__shared__ int col_of[CAP];    // its column,
__shared__ int place_of[CAP];  // and the place of that in cols
__shared__ int cols[CAP];      // the distinct columns, ascending

const int n_block_rows = indptr_shape[0] - 1;
const int shares = gridDim.x / ((n_block_rows + PANEL - 1) / PANEL);
const int row0 = blockIdx.x / shares * PANEL;
const int share = blockIdx.x % shares;
const int n_rows = min(PANEL, n_block_rows - row0);
const int stored = indptr[row0 + n_rows] - indptr[row0];
const int rank0 = (long long)stored * share / shares;
const int count = (int)((long long)stored * (share + 1) / shares) - rank0;
if (count == 0) {
  return;
}
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warp = thread / 32;
const int N = held(x_shape[x_ndim - 2]);
const int C = held(x_shape[x_ndim - 1]);
const int R = held(y_shape[y_ndim - 1]);
const int first = blockIdx.y * step[0];
const int last = min(N, first + step[0]);

if (thread == 0) {
  for (int s = 0; s < MAX_STAGES; s++) {
    init_barrier(full + s, 32 * COPY_WARPS);
    init_barrier(empty + s, WARPS);
  }
}

// Find the blocks: mark the rows that each block-column has, count the blocks of the columns before
// it, and keep the blocks whose rank, by column and then by row, is in the share. The ring lies
// here later.
const int n_block_cols = C / B;
unsigned* masks = reinterpret_cast<unsigned*>(shared);
int* ranks = reinterpret_cast<int*>(shared) + n_block_cols;
for (int i = thread; i <= PANEL; i += THREADS) {
  starts[i] = indptr[row0 + min(i, n_rows)];
}
for (int c = thread; c < n_block_cols; c += THREADS) {
  masks[c] = 0;
}
__syncthreads();
auto row_in_panel = [&](int j) {
  int row = 0;
#pragma unroll
  for (int half = PANEL / 2; half > 0; half /= 2) {
    row += starts[row + half] <= j ? half : 0;
  }
  return row;
};
#pragma unroll 4
for (int j = starts[0] + thread; j < starts[PANEL]; j += THREADS) {
  atomicOr(masks + indices[j], 1u << row_in_panel(j));
}
__syncthreads();
int before = 0;
for (int c0 = 0; c0 < n_block_cols; c0 += THREADS) {
  const int c = c0 + thread;
  const int own = c < n_block_cols ? __popc(masks[c]) : 0;
  int sum = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int lower = __shfl_up_sync(0xffffffffu, sum, distance);
    sum += lane >= distance ? lower : 0;
  }
  if (lane == 31) {
    warp_sums[warp] = sum;
  }
  __syncthreads();
  if (c < n_block_cols) {
    ranks[c] = before + sum - own;
    for (int w = 0; w < warp; w++) {
      ranks[c] += warp_sums[w];
    }
  }
  for (int w = 0; w < THREADS / 32; w++) {
    before += warp_sums[w];
  }
  __syncthreads();
}
#pragma unroll 4
for (int j = starts[0] + thread; j < starts[PANEL]; j += THREADS) {
  const int c = indices[j];
  const int row = row_in_panel(j);
  const int slot = ranks[c] + __popc(masks[c] & ((1u << row) - 1)) - rank0;
  if (slot >= 0 && slot < count) {
    block_of[slot] = j;
    row_of[slot] = row;
    col_of[slot] = c;
  }
}
__syncthreads();
if (thread < count) {
  int place = 0;
  for (int s = 1; s <= thread; s++) {
    place += col_of[s] != col_of[s - 1];
  }
  place_of[thread] = place;
  if (thread == 0 || col_of[thread] != col_of[thread - 1]) {
    cols[place] = col_of[thread];
  }
}
__syncthreads();

// A stage is `depth` rows of the panel of y, then as many of the columns of x, side by side. The
// chunks of a row are permuted as by `swizzle`.
const int x_chunks = (place_of[count - 1] + 1) * CHUNKS;
const int x_pitch = (x_chunks + 7) / 8 * 128;
const int row_bytes = Y_PITCH + x_pitch;
const int depth = SHARED >= 3 * 64 * row_bytes ? 64 : SHARED >= 3 * 32 * row_bytes ? 32 : 16;
Ring ring{min(MAX_STAGES, SHARED / (depth * row_bytes))};

if (warp >= WARPS) {
  give_registers<64>();
  // Each warp copies every fourth row, 32 chunks a round. Where a row has fewer left, the last one
  // is copied more than once: that costs less than a branch.
  constexpr int Y_ROUNDS = (PANEL * CHUNKS + 31) / 32;
  constexpr int X_ROUNDS = CAP * CHUNKS / 32;
  const int m0 = warp - WARPS;
  int y_chunk[Y_ROUNDS];
  int x_chunk[X_ROUNDS];
  int x_col[X_ROUNDS];
#pragma unroll
  for (int q = 0; q < Y_ROUNDS; q++) {
    y_chunk[q] = min(32 * q + lane, n_rows * CHUNKS - 1);
  }
#pragma unroll
  for (int q = 0; q < X_ROUNDS; q++) {
    x_chunk[q] = min(32 * q + lane, x_chunks - 1);
    x_col[q] = cols[x_chunk[q] / CHUNKS] * B + x_chunk[q] % CHUNKS * 8;
  }
  const T* y_mine = y + ((size_t)v * N + m0) * R + row0 * B;
  const T* x_mine = x + ((size_t)v * N + m0) * C;
  auto copy_rows_as = [&](int n0, auto alignment, auto all) {
    constexpr bool ALIGNED = alignment.value;
    constexpr bool ALL = all.value;  // rows of the stage are there
    const T* y_src = y_mine + (size_t)n0 * R;
    const T* x_src = x_mine + (size_t)n0 * C;
    char* y_dst = shared + ring.buffer * depth * row_bytes + m0 * Y_PITCH;
    char* x_dst = shared + ring.buffer * depth * row_bytes + depth * Y_PITCH + m0 * x_pitch;
#pragma unroll 1
    for (int m = m0; m < depth; m += COPY_WARPS) {
      const bool valid = ALL || n0 + m < last;
#pragma unroll
      for (int q = 0; q < Y_ROUNDS; q++) {
        T* dst = reinterpret_cast<T*>(y_dst + (y_chunk[q] ^ (m & 7)) * 16);
        copy16<ALIGNED>(dst, valid ? y_src + y_chunk[q] * 8 : y, valid);
      }
#pragma unroll
      for (int q = 0; q < X_ROUNDS; q++) {
        if (32 * q < x_chunks) {
          T* dst = reinterpret_cast<T*>(x_dst + (x_chunk[q] ^ (m & 7)) * 16);
          copy16<ALIGNED>(dst, valid ? x_src + x_col[q] : x, valid);
        }
      }
      y_src += (size_t)COPY_WARPS * R;
      x_src += (size_t)COPY_WARPS * C;
      y_dst += COPY_WARPS * Y_PITCH;
      x_dst += COPY_WARPS * x_pitch;
    }
  };
  const bool aligned = ((size_t)y | (size_t)x) % 16 == 0;
  for (int n0 = first; n0 < last; n0 += depth) {
    wait_barrier(empty + ring.buffer, ring.parity ^ 1);
    if (aligned && n0 + depth <= last) {
      copy_rows_as(n0, Aligned(), Constant<true>());
    } else if (aligned) {
      copy_rows_as(n0, Aligned(), Constant<false>());
    } else {
      copy_rows_as(n0, Unaligned(), Constant<false>());
    }
    if (aligned) {
      arrive_copied(full + ring.buffer);
    } else {
      arrive(full + ring.buffer);
    }
    ring.advance();
  }
  commit_copies();
  wait_copies<0>();
  return;
}

take_registers<104>();
// A warp's blocks are neighbours by column and then by row: it loads x again where the column
// changes.
const int slot0 = count * warp / WARPS;
const int mine = count * (warp + 1) / WARPS - slot0;
const int y_row = lane / 16 * 8 + lane % 8;  // y lies transposed, as in sddmm_tiles.cu
const int x_row = lane % 16;
unsigned at[SLOTS];  // bytes into a row of y, and of x, of what this lane addresses
#pragma unroll
for (int s = 0; s < SLOTS; s++) {
  const int slot = slot0 + (s < mine ? s : 0);
  const int y_chunk = row_of[slot] * CHUNKS + lane / 8 % 2;
  const int x_chunk = place_of[slot] * CHUNKS + lane / 16;
  at[s] = (y_chunk ^ (y_row & 7)) * 16 | (x_chunk ^ (x_row & 7)) * 16 << 16;
}
const bool changes =
    lane < mine && (lane == 0 || place_of[slot0 + lane] != place_of[slot0 + lane - 1]);
const unsigned fresh = __ballot_sync(0xffffffffu, changes);

constexpr int UNIT = 2;  // blocks whose fragments of y are loaded together
float acc[SLOTS][TILES][2 * TILES][4];
#pragma unroll
for (int s = 0; s < SLOTS; s++) {
#pragma unroll
  for (int i = 0; i < TILES; i++) {
#pragma unroll
    for (int k = 0; k < 2 * TILES; k++) {
      acc[s][i][k][0] = acc[s][i][k][1] = acc[s][i][k][2] = acc[s][i][k][3] = 0.0f;
    }
  }
}
unsigned xs[TILES][4] = {};
#pragma unroll 1
for (int n0 = first; n0 < last; n0 += depth) {
  const char* y_tile = shared + ring.buffer * depth * row_bytes + y_row * Y_PITCH;
  const char* x_tile = shared + ring.buffer * depth * row_bytes + depth * Y_PITCH + x_row * x_pitch;
  wait_barrier(full + ring.buffer, ring.parity);
#pragma unroll 1
  for (int m = 0; m < depth; m += 16) {
#pragma unroll
    for (int u = 0; u < SLOTS; u += UNIT) {
      if (u < mine) {
        unsigned ys[UNIT][TILES][4];
#pragma unroll
        for (int b = 0; b < UNIT; b++) {
#pragma unroll
          for (int i = 0; i < TILES; i++) {
            load_matrix4<true>(
                ys[b][i], reinterpret_cast<const T*>(y_tile + ((at[u + b] & 0xffff) ^ 32 * i)));
          }
        }
        __syncwarp();  // keeps the compiler from loading y only when it is needed
#pragma unroll
        for (int b = 0; b < UNIT; b++) {
          if (fresh >> (u + b) & 1) {
#pragma unroll
            for (int k = 0; k < TILES; k++) {
              load_matrix4<true>(xs[k],
                                 reinterpret_cast<const T*>(x_tile + (at[u + b] >> 16 ^ 32 * k)));
            }
          }
#pragma unroll
          for (int i = 0; i < TILES; i++) {
            const unsigned (&a)[4] = ys[b][i];
#pragma unroll
            for (int k = 0; k < TILES; k++) {
              multiply<T>(acc[u + b][i][2 * k], a[0], a[1], a[2], a[3], xs[k][0], xs[k][1]);
              multiply<T>(acc[u + b][i][2 * k + 1], a[0], a[1], a[2], a[3], xs[k][2], xs[k][3]);
            }
          }
        }
      }
    }
    y_tile += 16 * Y_PITCH;
    x_tile += 16 * x_pitch;
  }
  __syncwarp();
  if (lane == 0) {
    arrive(empty + ring.buffer);
  }
  ring.advance();
}

const size_t base = ((size_t)blockIdx.y * gridDim.z + v) * indices_shape[0];
#pragma unroll
for (int s = 0; s < SLOTS; s++) {
  if (s < mine) {
    const size_t place = (base + block_of[slot0 + s]) * (B * B);
    if constexpr (sizeof(OUT) == sizeof(T)) {
      store_tiles<T, 2 * TILES, 2 * TILES>(
          reinterpret_cast<T*>(out) + place, B, B, B,
          [&](int half, int k, int e) { return acc[s][half / 2][k][half % 2 * 2 + e]; });
    } else {
#pragma unroll
      for (int half = 0; half < 2 * TILES; half++) {
#pragma unroll
        for (int k = 0; k < 2 * TILES; k++) {
          const float* sums = acc[s][half / 2][k] + half % 2 * 2;
          const int at = (half * 8 + lane / 4) * B + k * 8 + lane % 4 * 2;
          *reinterpret_cast<float2*>(reinterpret_cast<float*>(out) + place + at) =
              make_float2(sums[0], sums[1]);
        }
      }
    }
  }
}
