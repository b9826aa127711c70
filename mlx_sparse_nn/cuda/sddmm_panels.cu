// The product of sddmm_tiles.cu for small blocks, many of which read the same columns of y and of
// x. The rows n come in splits: out[s] sums those of split s.
//
// Inputs
//   y, x, indptr, indices: as there; no block is stored twice
//   step     (1) int32: rows n of a split
// Output
//   out      (S, V, n_blocks, B, B) OUT
// Launch
//   (panels shares 640, S, V) threads in groups of (640, 1, 1). A panel is PANEL = 256 / B
//   neighbouring block-rows and has at most shares 32768 / B^2 blocks, panels = ceil(R / PANEL).
//   The blocks of a panel, by block-column and then by block-row, are dealt in equal shares: one
//   group owns one share, and its first 16 warps take equal parts of that. The last 4 warps copy
//   the columns of y and, once each, those of x that these blocks read, some rows n a stage.
//   Shared memory: SHARED bytes, at least 8 per block-column, and (8192 + 1048576 / B) sizeof(T).
// Template
//   T half, bfloat16 or float, which is rounded to TF32; OUT, T or float; B 16 or 32; SHARED bytes.
// Sums in float32, n ascending by STEP.

#include "barriers.h"
#include "copies.h"
#include "mma.h"
#include "stores.h"

constexpr int WARPS = 16;  // that multiply
constexpr int COPY_WARPS = 4;
constexpr int THREADS = 32 * (WARPS + COPY_WARPS);
constexpr int PANEL = 256 / B;         // block-rows
constexpr int SLOTS = 2048 / (B * B);  // blocks of a warp: 64 sums a thread
constexpr int CAP = WARPS * SLOTS;     // blocks of a group
constexpr int MAX_STAGES = 8;
constexpr int CHUNK = 16 / sizeof(T);           // elements
constexpr int CHUNKS = B / CHUNK;               // of a row of a block
constexpr int STEP = 32 / sizeof(T);            // of n in a product of a warp
constexpr int TILES = B / 16;                   // 16 x 16 tiles along a side of a block
constexpr int Y_PITCH = PANEL * B * sizeof(T);  // bytes of a row of y in a stage
static_assert(B == 16 || B == 32, "a warp holds 8 or 2 blocks");
static_assert(CAP <= THREADS, "a thread finds the place of a block");
// Chunks of row m are permuted by an exclusive or with key(m): where ldmatrix reads a chunk of
// eight rows together, or threads read eight floats of four rows, which no ldmatrix transposes.
constexpr bool BY_COLUMNS = sizeof(T) == 4;
auto key = [](int m) { return BY_COLUMNS ? m % 4 * 2 : m % 8; };
extern __shared__ __align__(128) char shared[];
__shared__ unsigned long long full[MAX_STAGES];
__shared__ unsigned long long empty[MAX_STAGES];
__shared__ int starts[PANEL + 1];
__shared__ int warp_sums[THREADS / 32];
__shared__ int block_of[CAP];  // of each block of this group: its place in out,
__shared__ int r_of[CAP];      // its block-row in the panel,
__shared__ int c_of[CAP];      // its block-column,
__shared__ int place_of[CAP];  // and the place of that in distinct
__shared__ int distinct[CAP];  // the distinct block-columns, ascending

const int R = indptr_shape[0] - 1;
const int shares = gridDim.x / ((R + PANEL - 1) / PANEL);
const int r0 = blockIdx.x / shares * PANEL;
const int share = blockIdx.x % shares;
const int panel_rows = min(PANEL, R - r0);
const int stored = indptr[r0 + panel_rows] - indptr[r0];
const int rank0 = (long long)stored * share / shares;
const int count = (int)((long long)stored * (share + 1) / shares) - rank0;
if (count == 0) {
  return;
}
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warp = thread / 32;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int n_rows = in_register(y_shape[y_ndim - 1]);
const int begin_n = blockIdx.y * step[0];
const int end_n = min(N, begin_n + step[0]);

if (thread == 0) {
  for (int stage = 0; stage < MAX_STAGES; stage++) {
    init_barrier(full + stage, 32 * COPY_WARPS);
    init_barrier(empty + stage, WARPS);
  }
}

// Find the blocks of this share: mark the block-rows that each block-column has, count the blocks
// before it, and keep the blocks whose rank, by block-column and then by block-row, is in the
// share. The ring of stages lies here later.
const int C = n_cols / B;
unsigned* masks = reinterpret_cast<unsigned*>(shared);
int* ranks = reinterpret_cast<int*>(shared) + C;
for (int i = thread; i <= PANEL; i += THREADS) {
  starts[i] = indptr[r0 + min(i, panel_rows)];
}
for (int c = thread; c < C; c += THREADS) {
  masks[c] = 0;
}
__syncthreads();
auto row_in_panel = [&](int j) {
  int panel_row = 0;
#pragma unroll
  for (int skip = PANEL / 2; skip > 0; skip /= 2) {
    panel_row += starts[panel_row + skip] <= j ? skip : 0;
  }
  return panel_row;
};
#pragma unroll 4
for (int j = starts[0] + thread; j < starts[PANEL]; j += THREADS) {
  atomicOr(masks + indices[j], 1u << row_in_panel(j));
}
__syncthreads();
int before = 0;
for (int c0 = 0; c0 < C; c0 += THREADS) {
  const int c = c0 + thread;
  const int own = c < C ? __popc(masks[c]) : 0;
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
  if (c < C) {
    ranks[c] = before + sum - own;
    for (int other = 0; other < warp; other++) {
      ranks[c] += warp_sums[other];
    }
  }
  for (int other = 0; other < THREADS / 32; other++) {
    before += warp_sums[other];
  }
  __syncthreads();
}
#pragma unroll 4
for (int j = starts[0] + thread; j < starts[PANEL]; j += THREADS) {
  const int c = indices[j];
  const int panel_row = row_in_panel(j);
  const int slot = ranks[c] + __popc(masks[c] & ((1u << panel_row) - 1)) - rank0;
  if (slot >= 0 && slot < count) {
    block_of[slot] = j;
    r_of[slot] = panel_row;
    c_of[slot] = c;
  }
}
__syncthreads();
if (thread < count) {
  int place = 0;
  for (int slot = 1; slot <= thread; slot++) {
    place += c_of[slot] != c_of[slot - 1];
  }
  place_of[thread] = place;
  if (thread == 0 || c_of[thread] != c_of[thread - 1]) {
    distinct[place] = c_of[thread];
  }
}
__syncthreads();

// A stage is `depth` rows n of the columns of y, then of those of x, side by side.
const int x_chunks = (place_of[count - 1] + 1) * CHUNKS;
const int x_pitch = (x_chunks + 7) / 8 * 128;
const int row_bytes = Y_PITCH + x_pitch;
int depth = 64;
while (depth > STEP && SHARED < 3 * depth * row_bytes) {
  depth /= 2;
}
Ring ring{min(MAX_STAGES, SHARED / (depth * row_bytes))};

if (warp >= WARPS) {
  give_registers<64>();
  // Each warp copies every fourth row, 32 chunks a round. Where fewer are left, the last chunk is
  // copied more than once: that costs less than a branch.
  constexpr int Y_ROUNDS = (PANEL * CHUNKS + 31) / 32;
  constexpr int X_ROUNDS = CAP * CHUNKS / 32;
  const int m0 = warp - WARPS;
  int y_chunk[Y_ROUNDS];
  int x_chunk[X_ROUNDS];
  int x_col[X_ROUNDS];
#pragma unroll
  for (int q = 0; q < Y_ROUNDS; q++) {
    y_chunk[q] = min(32 * q + lane, panel_rows * CHUNKS - 1);
  }
#pragma unroll
  for (int q = 0; q < X_ROUNDS; q++) {
    x_chunk[q] = min(32 * q + lane, x_chunks - 1);
    x_col[q] = distinct[x_chunk[q] / CHUNKS] * B + x_chunk[q] % CHUNKS * CHUNK;
  }
  const T* y_mine = y + ((size_t)v * N + m0) * n_rows + r0 * B;
  const T* x_mine = x + ((size_t)v * N + m0) * n_cols;
  auto copy_rows_as = [&](int n0, auto alignment, auto all) {
    constexpr bool ALIGNED = alignment.value;
    constexpr bool ALL = all.value;  // rows of the stage are there
    const T* y_src = y_mine + (size_t)n0 * n_rows;
    const T* x_src = x_mine + (size_t)n0 * n_cols;
    char* y_dst = shared + ring.buffer * depth * row_bytes + m0 * Y_PITCH;
    char* x_dst = shared + ring.buffer * depth * row_bytes + depth * Y_PITCH + m0 * x_pitch;
#pragma unroll 1
    for (int m = m0; m < depth; m += COPY_WARPS) {
      const bool valid = ALL || n0 + m < end_n;
#pragma unroll
      for (int q = 0; q < Y_ROUNDS; q++) {
        T* dst = reinterpret_cast<T*>(y_dst + (y_chunk[q] ^ key(m)) * 16);
        copy16<ALIGNED>(dst, valid ? y_src + y_chunk[q] * CHUNK : y, valid);
      }
#pragma unroll
      for (int q = 0; q < X_ROUNDS; q++) {
        if (32 * q < x_chunks) {
          T* dst = reinterpret_cast<T*>(x_dst + (x_chunk[q] ^ key(m)) * 16);
          copy16<ALIGNED>(dst, valid ? x_src + x_col[q] : x, valid);
        }
      }
      y_src += (size_t)COPY_WARPS * n_rows;
      x_src += (size_t)COPY_WARPS * n_cols;
      y_dst += COPY_WARPS * Y_PITCH;
      x_dst += COPY_WARPS * x_pitch;
    }
  };
  const bool aligned = ((size_t)y | (size_t)x) % 16 == 0;
  for (int n0 = begin_n; n0 < end_n; n0 += depth) {
    wait_barrier(empty + ring.buffer, ring.parity ^ 1);
    if (aligned && n0 + depth <= end_n) {
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
// A warp's blocks are neighbours by block-column and then by block-row: it loads x again where the
// block-column changes.
const int slot0 = count * warp / WARPS;
const int mine = count * (warp + 1) / WARPS - slot0;
// y lies transposed, as in sddmm_tiles.cu.
const int y_row = BY_COLUMNS ? lane % 4 : lane / 16 * 8 + lane % 8;
const int x_row = BY_COLUMNS ? lane % 4 : lane % 16;
unsigned at[SLOTS];  // bytes into a row of y, and of x, of what this lane addresses
#pragma unroll
for (int b = 0; b < SLOTS; b++) {
  const int slot = slot0 + (b < mine ? b : 0);
  const int y_chunk = r_of[slot] * CHUNKS + (BY_COLUMNS ? lane / 16 : lane / 8 % 2);
  const int x_chunk = place_of[slot] * CHUNKS + lane / 16;
  at[b] = (y_chunk ^ key(y_row)) * 16 | (x_chunk ^ key(x_row)) * 16 << 16;
  if (BY_COLUMNS) {
    at[b] += lane / 4 % 4 * 0x40004;
  }
}
const bool changes =
    lane < mine && (lane == 0 || place_of[slot0 + lane] != place_of[slot0 + lane - 1]);
const unsigned fresh = __ballot_sync(0xffffffffu, changes);

constexpr int UNIT = 2;  // blocks whose fragments of y are loaded together
float acc[SLOTS][TILES][2 * TILES][4];
#pragma unroll
for (int b = 0; b < SLOTS; b++) {
#pragma unroll
  for (int ti = 0; ti < TILES; ti++) {
#pragma unroll
    for (int tk = 0; tk < 2 * TILES; tk++) {
      acc[b][ti][tk][0] = acc[b][ti][tk][1] = acc[b][ti][tk][2] = acc[b][ti][tk][3] = 0.0f;
    }
  }
}
// Fragments of 16 columns of y and of x, of tile t of a block.
auto load_y = [&](unsigned (&f)[4], const char* tile, int place, int t) {
  if constexpr (BY_COLUMNS) {
    load_words(f[0], f[2], tile + (place ^ 64 * t), 4 * Y_PITCH);
    load_words(f[1], f[3], tile + (place ^ 64 * t ^ 32), 4 * Y_PITCH);
    round_factors<T>(f);
  } else {
    load_matrix4<true>(f, reinterpret_cast<const T*>(tile + (place ^ 32 * t)));
  }
};
auto load_x = [&](unsigned (&f)[4], const char* tile, int place, int t) {
  if constexpr (BY_COLUMNS) {
    load_words(f[0], f[1], tile + (place ^ 64 * t), 4 * x_pitch);
    load_words(f[2], f[3], tile + (place ^ 64 * t ^ 32), 4 * x_pitch);
    round_factors<T>(f);
  } else {
    load_matrix4<true>(f, reinterpret_cast<const T*>(tile + (place ^ 32 * t)));
  }
};
unsigned xs[TILES][4] = {};
#pragma unroll 1
for (int n0 = begin_n; n0 < end_n; n0 += depth) {
  const char* y_tile = shared + ring.buffer * depth * row_bytes + y_row * Y_PITCH;
  const char* x_tile = shared + ring.buffer * depth * row_bytes + depth * Y_PITCH + x_row * x_pitch;
  wait_barrier(full + ring.buffer, ring.parity);
#pragma unroll 1
  for (int m = 0; m < depth; m += STEP) {
#pragma unroll
    for (int u = 0; u < SLOTS; u += UNIT) {
      if (u < mine) {
        unsigned ys[UNIT][TILES][4];
#pragma unroll
        for (int b = 0; b < UNIT; b++) {
#pragma unroll
          for (int ti = 0; ti < TILES; ti++) {
            load_y(ys[b][ti], y_tile, at[u + b] & 0xffff, ti);
          }
        }
        __syncwarp();  // keeps the compiler from loading y only when it is needed
#pragma unroll
        for (int b = 0; b < UNIT; b++) {
          if (fresh >> (u + b) & 1) {
#pragma unroll
            for (int tk = 0; tk < TILES; tk++) {
              load_x(xs[tk], x_tile, at[u + b] >> 16, tk);
            }
          }
#pragma unroll
          for (int ti = 0; ti < TILES; ti++) {
            const unsigned (&a)[4] = ys[b][ti];
#pragma unroll
            for (int tk = 0; tk < TILES; tk++) {
              multiply<T>(acc[u + b][ti][2 * tk], a[0], a[1], a[2], a[3], xs[tk][0], xs[tk][1]);
              multiply<T>(acc[u + b][ti][2 * tk + 1], a[0], a[1], a[2], a[3], xs[tk][2], xs[tk][3]);
            }
          }
        }
      }
    }
    y_tile += STEP * Y_PITCH;
    x_tile += STEP * x_pitch;
  }
  __syncwarp();
  if (lane == 0) {
    arrive(empty + ring.buffer);
  }
  ring.advance();
}

const size_t base = ((size_t)blockIdx.y * gridDim.z + v) * indices_shape[0];
#pragma unroll
for (int b = 0; b < SLOTS; b++) {
  if (b < mine) {
    const size_t place = (base + block_of[slot0 + b]) * (B * B);
    if constexpr (sizeof(OUT) == 2) {
      store_tiles<T, 2 * TILES, 2 * TILES>(reinterpret_cast<T*>(out) + place, B, B, B,
                                           [&](int row_tile, int tk, int e) {
                                             return acc[b][row_tile / 2][tk][row_tile % 2 * 2 + e];
                                           });
    } else {
#pragma unroll
      for (int row_tile = 0; row_tile < 2 * TILES; row_tile++) {
#pragma unroll
        for (int tk = 0; tk < 2 * TILES; tk++) {
          const float* sums = acc[b][row_tile / 2][tk] + row_tile % 2 * 2;
          const int offset = (row_tile * 8 + lane / 4) * B + tk * 8 + lane % 4 * 2;
          *reinterpret_cast<float2*>(reinterpret_cast<float*>(out) + place + offset) =
              make_float2(sums[0], sums[1]);
        }
      }
    }
  }
}
