// The product of spmm_tiles.metal for up to 8 rows of x, which is bound by reading the stored
// values: each is read once, for all rows. B is any number from 4 on.
//
// One launch, or two where some block-row is long: has more than PIECE blocks. As in
// spmm_csr.metal, the first one, OF_PIECES, sums what each piece of PIECE stored blocks holds of
// long block-rows, and the second adds up these sums.
//
// Inputs
//   data, indptr, indices, perm, x, bias: as there
//   partial  (V, n_pieces, 2, N, B) float32, what the first launch gave; unread in that one, and
//            where no block-row is LONG. Of the two, the second is of one that begins in the piece.
// Output
//   y        as there; OF_PIECES, `partial`
// Launch
//   (R STRIPS 32 GROUPS, 1, V) threads in groups of (32 GROUPS, 1, 1), STRIPS = ceil(B / STRIP).
//   OF_PIECES, 2 n_pieces in place of R. One group owns STRIP outputs of a block-row, or of what a
//   piece holds of one, and all rows of x. Its simdgroups take steps in turn.
// Template
//   T float, half or bfloat; OUT, T, or float OF_PIECES; B; INSIDE columns of the last
//   block-column, 1 to B; ROWS of x, 1, or 8 for 2 to 8; STRIP, a multiple of 8; STEPS; GROUPS
//   simdgroups; PIECE blocks; LONG, OF_PIECES, TRANSPOSED and BIAS 0 or 1.
//
// A block-row is read as one row of vectors of four k, VECTORS of them from a block. A step is 8 of
// these, for all outputs of the strip. All loads of STEPS steps are on their way at once. A lane
// holds what simdgroup products take of it: of w vector `slot` for two of every 8 outputs, of x
// vectors `pair` and `pair + 1` for row `slot`. One row of x is multiplied lane by lane, vector
// `slot` by vector `slot`. Where there is no vector, row or output, a lane repeats another's, as
// zeros, or stores nothing.
// Sums in float32: each simdgroup its steps in order, k modulo 4 ascending, as the hardware adds 8
// products (one row of x: each lane its vectors in order, then over lanes), then over simdgroups,
// or over pieces, then the bias.

#include "common.h"
#include "search.h"

constexpr int VECTORS = (B + 3) / 4;
constexpr int STRIPS = (B + STRIP - 1) / STRIP;
constexpr bool WIDE = STRIP > 8;
constexpr int TILES = TRANSPOSED && WIDE ? (STRIP + 15) / 16 * 2 : STRIP / 8;
constexpr int LOADS = TRANSPOSED && !WIDE ? 4 : 2 * TILES;
constexpr bool RAGGED = B % 4 > 0;
constexpr int AT_ONCE = 8 * STEPS;
constexpr int X_LOADS = ROWS == 1 ? 1 : 2;
constexpr bool IN_STEP = B % 32 == 0;           // a step lies in one block
constexpr bool PAIRS = ROWS > 1 && B % 8 == 0;  // and so do two vectors of x
constexpr bool WHOLE = VECTORS % AT_ONCE == 0;  // and all that is loaded at once
threadgroup float group_sums[GROUPS * ROWS * STRIP];

const int unit = threadgroup_position_in_grid.x / STRIPS;
const int o0 = threadgroup_position_in_grid.x % STRIPS * STRIP;
const int v = threadgroup_position_in_grid.z;
const int thread_index = thread_index_in_threadgroup;
const int lane = thread_index_in_simdgroup;
const int simd_group = simdgroup_index_in_threadgroup;
const int slot = (lane / 4 & 4) + lane / 2 % 4;
const int pair = (lane / 4 & 2) * 2 + lane % 2 * 2;
const int N = x_shape[x_ndim - 2];
const int n_cols = x_shape[x_ndim - 1];
const int R = indptr_shape[0] - 1;
const int n_blocks = indices_shape[0];
const int n_pieces = (n_blocks - 1) / PIECE + 1;
const int n_inside = n_cols - B + INSIDE;
const int n_outputs = B % STRIP == 0 ? STRIP : min(STRIP, B - o0);

// The blocks of the block-row, or those of them in the piece.
const int cut = OF_PIECES ? unit / 2 * PIECE : 0;
const int cut_end = OF_PIECES ? cut + min(PIECE, n_blocks - cut) : 0;
int r = unit;
if (OF_PIECES) {
  r = search_row(indptr, R, unit % 2 == 0 ? cut : cut_end - 1, lane);
}
int begin = indptr[r];
int end = indptr[r + 1];
const bool is_long = LONG && end - begin > PIECE;
const int first_piece = begin / PIECE;
const int last_piece = is_long ? (end - 1) / PIECE : first_piece - 1;
const bool begins_within = begin % PIECE > 0;
if (OF_PIECES) {
  const bool is_other = unit % 2 == 0 || begin > cut;  // than that of the piece's other half
  begin = max(begin, cut);
  end = is_long && is_other ? min(end, cut_end) : begin;
} else if (is_long) {
  end = begin;
}
const int n_vectors = (end - begin) * VECTORS;
const int first = min(begin, n_blocks - 1);
const int last = max(n_vectors - (IN_STEP ? 8 : 1), 0);
const int x_last = max(n_vectors - (IN_STEP ? 8 : PAIRS ? 2 : 1), 0);

// Where a step lies in one block, a lane counts its vectors from that of lane 0, 4 elements each.
const int x_slot = ROWS == 1 ? slot : pair;
const int w_ahead = IN_STEP ? 0 : slot;
const int w_k = 4 * (slot - w_ahead);
const int x_ahead = IN_STEP ? 0 : x_slot;
const device T* x_row = x + ((size_t)v * N + min(slot, N - 1)) * n_cols + 4 * (x_slot - x_ahead);
const device T* blocks = data + (size_t)v * n_blocks * (B * B);

// Where its loads begin in a block. Past the last output they repeat another lane's.
int w_at[LOADS];
#pragma unroll
for (int i = 0; i < LOADS; i++) {
  if (TRANSPOSED) {
    const int o = WIDE ? i / 4 * 16 + pair / 2 * 4 : pair / 4 * 4;
    w_at[i] = (w_k + i % 4) * B + o0 + min(o, n_outputs - 4);
  } else {
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

int e = simd_group * AT_ONCE;  // the first vector of the simdgroup's steps
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
for (; e < n_vectors; e += GROUPS * AT_ONCE) {
  vec<T, 4> w[STEPS][LOADS];
  vec<T, 4> xs[STEPS][X_LOADS];
  int w_from[STEPS];
  int w_end[STEPS];
  int x_from[STEPS][X_LOADS];
  int x_end[STEPS][X_LOADS];
  bool is_cut = false;
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
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
  }
  // The indices of the next steps are on their way during these.
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    const int next = e + GROUPS * AT_ONCE + 8 * s;
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

threadgroup float* mine = group_sums + (simd_group * ROWS + (ROWS == 1 ? 0 : slot)) * STRIP;
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
for (int i = thread_index; i < N * STRIP; i += 32 * GROUPS) {
  const int n = i / STRIP;
  const int o = o0 + i % STRIP;
  if (o >= o0 + n_outputs) {
    continue;
  }
  float sum = group_sums[i];
  for (int other = 1; other < GROUPS; other++) {
    sum += group_sums[other * (ROWS * STRIP) + i];
  }
  if (OF_PIECES) {
    y[(((size_t)v * 2 * n_pieces + unit) * N + n) * B + o] = OUT(sum);
    continue;
  }
  if (LONG) {
#pragma unroll 4
    for (int p = first_piece; p <= last_piece; p++) {
      const int half_piece = 2 * p + (p == first_piece && begins_within ? 1 : 0);
      sum += float(partial[(((size_t)v * 2 * n_pieces + half_piece) * N + n) * B + o]);
    }
  }
  if (BIAS) {
    sum += float(bias[r * B + o]);
  }
  y[(((size_t)v * N + n) * R + r) * B + o] = OUT(sum);
}
