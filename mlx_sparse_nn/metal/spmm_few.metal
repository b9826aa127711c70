// The product of spmm_tiles.metal for up to 8 rows of x, which is bound by reading the stored
// values: each is read once, for all rows. B is any number from 4 on.
//
// Inputs, output: as there; y is (S, V, N, n_rows) where the blocks of a block-row are split.
// Launch
//   (ceil(B / STRIP) R 32 GROUPS, S, V) threads in groups of (32 GROUPS, 1, 1). One group owns
//   STRIP outputs of a block-row, all rows of x, and one of S parts of the block-row's blocks.
// Template
//   T float, half or bfloat; OUT T, or float where S > 1; B; INSIDE columns of the last
//   block-column, 1 to B; ROWS of x, 1, or 8 for 2 to 8; STRIP, a multiple of 8, 48 at most; GROUPS
//   simdgroups; TRANSPOSED and BIAS 0 or 1.
// A block-row is read as one row of vectors of four k, VECTORS from each block. A step takes 8 of
// them, for all outputs of the strip, and the loads of STEPS steps wait for each other in none. A
// lane holds what simdgroup products want of it: vector `slot` of w for two outputs of every 8, and
// vectors `pair` and `pair + 1` of x for row `slot`. One row of x is multiplied by the lanes
// themselves, with vector `slot`. Past the end, a lane reads the last vector again, times zeros.
// Sums in float32: each simdgroup its steps in order, as the hardware adds 8 products (one row of
// x: each lane k ascending, then over lanes), then over simdgroups, then the bias.

#include "common.h"

constexpr int VECTORS = (B + 3) / 4;
constexpr int STRIPS = (B + STRIP - 1) / STRIP;
constexpr bool WIDE = STRIP > 8;
constexpr int TILES = TRANSPOSED && WIDE ? (STRIP + 15) / 16 * 2 : STRIP / 8;
constexpr int LOADS = TRANSPOSED && !WIDE ? 4 : 2 * TILES;
constexpr bool RAGGED = B % 4 > 0;
constexpr int AT_ONCE = 8 * STEPS;
constexpr int X_LOADS = ROWS == 1 ? 1 : 2;
constexpr bool IN_STEP = B % 32 == 0;  // a step lies in one block
constexpr bool PAIRS = ROWS > 1 && B % 8 == 0;
constexpr bool WHOLE = VECTORS % AT_ONCE == 0;
threadgroup float partial[GROUPS * ROWS * STRIP];

const int r = threadgroup_position_in_grid.x / STRIPS;
const int o0 = threadgroup_position_in_grid.x % STRIPS * STRIP;
const int split = threadgroup_position_in_grid.y;
const int v = threadgroup_position_in_grid.z;
const int thread_index = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int simd_group = simdgroup_index_in_threadgroup;
const int slot = (lane / 4 & 4) + lane / 2 % 4;
const int pair = (lane / 4 & 2) * 2 + lane % 2 * 2;
const int N = x_shape[x_ndim - 2];
const int n_cols = x_shape[x_ndim - 1];
const int n_blocks = indices_shape[0];
const int n_rows = (indptr_shape[0] - 1) * B;
const int n_inside = n_cols - B + INSIDE;
const int n_outputs = B % STRIP == 0 ? STRIP : min(STRIP, B - o0);

const int begin = indptr[r];
const int n_vectors = (indptr[r + 1] - begin) * VECTORS;
const int first = min(begin, n_blocks - 1);
const int last = max(n_vectors - (IN_STEP ? 8 : 1), 0);
const int x_last = max(n_vectors - (IN_STEP ? 8 : PAIRS ? 2 : 1), 0);
const int stride = threadgroups_per_grid.y * GROUPS * AT_ONCE;
int e = (split * GROUPS + simd_group) * AT_ONCE;

// The first vectors that a lane takes are at e + w_slot and e + x_slot, or 4 w_slot and 4 x_slot
// elements behind vector e.
const int x_slot = ROWS == 1 ? slot : pair;
const int w_ahead = IN_STEP ? 0 : slot;
const int w_k = 4 * (slot - w_ahead);
const int x_ahead = IN_STEP ? 0 : x_slot;
const device T* x_row = x + ((size_t)v * N + min(slot, N - 1)) * n_cols + 4 * (x_slot - x_ahead);
const device T* blocks = data + (size_t)v * n_blocks * (B * B);

// What a lane loads of a block: row or column of the outputs, and how far along it, for each load.
int w_at[LOADS];
#pragma unroll
for (int i = 0; i < LOADS; i++) {
  if (TRANSPOSED) {
    const int o = WIDE ? i / 4 * 16 + pair / 2 * 4 : pair / 4 * 4;
    w_at[i] = (w_k + i % 4) * B + o0 + min(o, n_outputs - 4);
  } else {
    // Past the last output, that of another lane.
    const int o = i / 2 * 8 + pair + i % 2;
    const int beyond = max(o - n_outputs + 1, 0);
    w_at[i] = (o0 + o - (beyond + 1) / 2 * 2) * B + w_k;
  }
}

simdgroup_float8x8 acc[TILES];
float sums[2 * TILES];
#pragma unroll
for (int t = 0; t < TILES; t++) {
  acc[t].thread_elements()[0] = 0.0f;
  acc[t].thread_elements()[1] = 0.0f;
  sums[2 * t] = 0.0f;
  sums[2 * t + 1] = 0.0f;
}

int x_cols[STEPS][X_LOADS];
int w_cols[STEPS];
int stored[STEPS];
#pragma unroll
for (int s = 0; s < STEPS; s++) {
  const int j = first + min(e + 8 * s + w_ahead, last) / VECTORS;
  stored[s] = TRANSPOSED ? perm[j] : j;
  w_cols[s] = INSIDE < B ? indices[j] : 0;
#pragma unroll
  for (int i = 0; i < X_LOADS; i++) {
    x_cols[s][i] = indices[first + min(e + 8 * s + x_ahead + (PAIRS ? 0 : i), x_last) / VECTORS];
  }
}
for (; e < n_vectors; e += stride) {
  vec<T, 4> w[STEPS][LOADS];
  vec<T, 4> xs[STEPS][X_LOADS];
  int w_from[STEPS];
  int w_end[STEPS];
  int x_from[STEPS][X_LOADS];
  int x_end[STEPS][X_LOADS];
  bool is_cut = false;
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    const int at = e + 8 * s + w_ahead;
    const int place = min(at, last) % VECTORS * 4;
    const int k = RAGGED ? min(place, B - 4) : place;
    const device T* block = blocks + (size_t)stored[s] * (B * B) + (TRANSPOSED ? k * B : k);
    w_from[s] = place - k;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      // Rows that the vector before has are read as it reads them.
      const int back = RAGGED && TRANSPOSED && i % 4 < w_from[s] ? (4 - w_from[s]) * B : 0;
      w[s][i] = load4<T>(block + w_at[i] - back);
    }
    w_end[s] = !WHOLE && at > last ? 0 : INSIDE < B ? n_inside - w_cols[s] * B - k - w_k : 4;
    is_cut = is_cut || w_from[s] > 0 || w_end[s] < 4;
#pragma unroll
    for (int i = 0; i < X_LOADS; i++) {
      const int x_at = e + 8 * s + x_ahead + (PAIRS ? 0 : i);
      const int x_place = min(x_at, x_last) % VECTORS * 4;
      const int x_k = RAGGED ? min(x_place, B - 4) : x_place;
      xs[s][i] = load4<T>(x_row + x_cols[s][i] * B + x_k + (PAIRS ? 4 * i : 0));
      x_from[s][i] = x_place - x_k;
      x_end[s][i] = !WHOLE && x_at > x_last ? 0 : 4;
      is_cut = is_cut || x_from[s][i] > 0 || x_end[s][i] < 4;
    }
  }
  // The indices of the next steps are on their way during these.
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    const int next = e + stride + 8 * s;
    const int j = first + min(next + w_ahead, last) / VECTORS;
    stored[s] = TRANSPOSED ? perm[j] : j;
    w_cols[s] = INSIDE < B ? indices[j] : 0;
#pragma unroll
    for (int i = 0; i < X_LOADS; i++) {
      x_cols[s][i] = indices[first + min(next + x_ahead + (PAIRS ? 0 : i), x_last) / VECTORS];
    }
  }
  simdgroup_barrier(mem_flags::mem_none);  // no load waits for a product
  if (is_cut) {
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
#pragma unroll
      for (int i = 0; i < LOADS; i++) {
        if (!TRANSPOSED) {
          w[s][i] = cut4(w[s][i], w_end[s], w_from[s]);
        } else if (i % 4 >= w_end[s] || i % 4 < w_from[s]) {
          w[s][i] = vec<T, 4>(T(0));
        }
      }
#pragma unroll
      for (int i = 0; i < X_LOADS; i++) {
        xs[s][i] = cut4(xs[s][i], x_end[s][i], x_from[s][i]);
      }
    }
  }
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      simdgroup_matrix<T, 8, 8> x_tile;
      x_tile.thread_elements()[0] = xs[s][0][k];
      x_tile.thread_elements()[1] = xs[s][X_LOADS - 1][k];
#pragma unroll
      for (int t = 0; t < TILES; t++) {
        T w0 = w[s][2 * t][k];
        T w1 = w[s][2 * t + 1][k];
        if (TRANSPOSED && WIDE) {
          w0 = w[s][t / 2 * 4 + k][t % 2 * 2];
          w1 = w[s][t / 2 * 4 + k][t % 2 * 2 + 1];
        } else if (TRANSPOSED) {
          w0 = pair & 2 ? w[s][k][2] : w[s][k][0];
          w1 = pair & 2 ? w[s][k][3] : w[s][k][1];
        }
        if (ROWS == 1) {
          sums[2 * t] = fma(float(w0), float(xs[s][0][k]), sums[2 * t]);
          sums[2 * t + 1] = fma(float(w1), float(xs[s][0][k]), sums[2 * t + 1]);
        } else {
          simdgroup_matrix<T, 8, 8> w_tile;
          w_tile.thread_elements()[0] = w0;
          w_tile.thread_elements()[1] = w1;
          simdgroup_multiply_accumulate(acc[t], x_tile, w_tile, acc[t]);
        }
      }
    }
  }
}

threadgroup float* mine = partial + (simd_group * ROWS + (ROWS == 1 ? 0 : slot)) * STRIP;
#pragma unroll
for (int t = 0; t < TILES; t++) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float sum = acc[t].thread_elements()[i];
    if (ROWS == 1) {
      sum = sum_lanes<16, 32>(sum_lanes<2, 8>(sums[2 * t + i]));
    }
    int o = 8 * t + pair + i;
    bool owned = ROWS > 1 || slot == 0;
    if (TRANSPOSED) {
      // A vector that would reach past the last output lies further back: there, another lane's.
      const int start = WIDE ? t / 2 * 16 + pair / 2 * 4 : pair / 4 * 4;
      o = min(start, n_outputs - 4) + (WIDE ? t % 2 * 2 : pair & 2) + i;
      owned = owned && o >= start;
    }
    if (owned) {
      mine[o] = sum;
    }
  }
}

threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = thread_index; i < min(ROWS, N) * STRIP; i += 32 * GROUPS) {
  const int o = i % STRIP;
  if (o < n_outputs) {
    const int row = r * B + o0 + o;
    float sum = partial[i];
    for (int other = 1; other < GROUPS; other++) {
      sum += partial[other * (ROWS * STRIP) + i];
    }
    if (BIAS && split == 0) {
      sum += float(bias[row]);
    }
    y[(((size_t)split * threadgroups_per_grid.z + v) * N + i / STRIP) * n_rows + row] = OUT(sum);
  }
}
