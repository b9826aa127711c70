// The product of spmm_tiles.cu for scalars (B = 1), for float32 where tiles are not for it, and for
// block sizes without tiles.
//
// One launch, or two where some row is long: has more than PIECE blocks. The first one is
// OF_PIECES. It cuts all stored blocks, in stored order, into pieces of PIECE, wherever rows begin,
// and sums what a piece holds of long rows: these are two at most, the one in which the piece
// begins and the one in which it ends. The second launch owns the rows. It walks short ones, and
// adds up the partial sums of long ones. So no lane walks more than a piece, and a long row changes
// nothing for others.
//
// Where WIDTH > 1, x and y lie by columns: then lanes side by side read neighbouring places.
//
// Inputs
//   data, indptr, indices, perm, bias: as there, B any
//   x        (V, N, n_cols), or (V, n_cols, N) where WIDTH > 1
//   partial  (V, n_pieces, 2, B, N) float32, what the first launch gave; unread in that one, and
//            where no row is LONG. Of the two, the second is of a row that begins within the piece.
// Output
//   y        (V, N, n_rows), or (V, n_rows, N) where WIDTH > 1; OF_PIECES, `partial`
// Launch
//   (ceil(n_rows LANES WIDTH / 256) 256, ceil(N / ROWS), V) threads in groups of (256, 1, 1).
//   OF_PIECES, n_pieces B in place of n_rows, and LANES WIDTH = 32. LANES WIDTH neighbouring
//   threads own one scalar row, or of a piece one row of blocks, and ROWS rows of x: WIDTH lie side
//   by side along x, LANES take stored values in turn.
// Template
//   T float, half or bfloat16; OUT, T, or float OF_PIECES; B; INSIDE columns of the last
//   block-column, 1 to B; ROWS of x, a multiple of WIDTH; WIDTH and LANES powers of two, at most 32
//   together; PIECE blocks; LONG, OF_PIECES, TRANSPOSED and BIAS 0 or 1.
// Sums in float32: each lane its values, or partial sums, in stored order, then over lanes, then
// the bias.

#include "search.h"
#include "sums.h"

constexpr int HELD = ROWS / WIDTH;
constexpr int SHARING = LANES * WIDTH;

const size_t position = (size_t)blockIdx.x * 256 + threadIdx.x;
const int lane = position / WIDTH % LANES;
const int n0 = blockIdx.y * ROWS + position % WIDTH;
const int v = blockIdx.z;
const int R = indptr_shape[0] - 1;
const int n_blocks = indices_shape[0];
const int n_pieces = (n_blocks - 1) / PIECE + 1;
const int n_units = (OF_PIECES ? n_pieces : R) * B;
const int N = WIDTH > 1 ? x_shape[x_ndim - 1] : x_shape[x_ndim - 2];
const int n_cols = WIDTH > 1 ? x_shape[x_ndim - 2] : x_shape[x_ndim - 1];
const int n_inside = n_cols - B + INSIDE;

// Threads past the last row of the matrix have nothing to do; those past the last one of x repeat
// it. Neither store.
const bool is_unit = position / SHARING < (size_t)n_units;
const int unit = is_unit ? position / SHARING : n_units - 1;
const int o = unit % B;
const size_t col_step = WIDTH > 1 ? N : 1;
int ns[HELD];
size_t x_at[HELD];
#pragma unroll
for (int i = 0; i < HELD; i++) {
  ns[i] = min(n0 + i * WIDTH, N - 1);
  x_at[i] = WIDTH > 1 ? ns[i] : (size_t)ns[i] * n_cols;
}
const T* xv = x + (size_t)v * N * n_cols;
const T* blocks = data + (size_t)v * n_blocks * (B * B);

for (int part = 0; part < (OF_PIECES ? 2 : 1); part++) {
  const int cut = OF_PIECES ? unit / B * PIECE : 0;
  const int cut_end = OF_PIECES ? cut + min(PIECE, n_blocks - cut) : 0;
  int r = unit / B;
  if (OF_PIECES) {
    r = search_row(indptr, R, part == 0 ? cut : cut_end - 1, threadIdx.x % 32);
  }
  int begin = indptr[r];
  int end = is_unit ? indptr[r + 1] : begin;
  float acc[HELD];
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    acc[i] = 0.0f;
  }
  if (OF_PIECES) {
    const bool is_long = end - begin > PIECE;
    const bool first = part == 0 || begin > cut;  // else it is the row of the first part
    begin = max(begin, cut);
    end = is_long && first ? min(end, cut_end) : begin;
  } else if (LONG && end - begin > PIECE) {
    const int last = (end - 1) / PIECE;
#pragma unroll 4
    for (int p = begin / PIECE + lane; p <= last; p += LANES) {
      const size_t half_piece = ((size_t)v * n_pieces + p) * 2 + (begin > p * PIECE ? 1 : 0);
      const auto* sums = partial + (half_piece * B + o) * N;
#pragma unroll
      for (int i = 0; i < HELD; i++) {
        acc[i] += float(sums[ns[i]]);
      }
    }
    end = begin;
  }
  const int n_values = (end - begin) * B;
#pragma unroll 4
  for (int e = lane; e < n_values; e += LANES) {
    const int j = begin + e / B;
    const int k = e % B;
    const size_t place =
        TRANSPOSED ? ((size_t)perm[j] * B + k) * B + o : ((size_t)j * B + o) * B + k;
    float w = float(blocks[place]);
    const int col = indices[j] * B + k;
    if (INSIDE < B && col >= n_inside) {
      w = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      acc[i] = fmaf(w, float(xv[col * col_step + x_at[i]]), acc[i]);
    }
  }
  const float bias_row = BIAS ? float(bias[unit]) : 0.0f;
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    acc[i] = sum_lanes<WIDTH, SHARING>(acc[i]);
    const int n = n0 + i * WIDTH;
    if (is_unit && lane == 0 && n < N) {
      size_t place = ((size_t)v * N + n) * n_units + unit;
      if (OF_PIECES) {
        const size_t half_piece = ((size_t)v * n_pieces + unit / B) * 2 + part;
        place = (half_piece * B + o) * N + n;
      } else if (WIDTH > 1) {
        place = ((size_t)v * n_units + unit) * N + n;
      }
      y[place] = OUT(acc[i] + bias_row);
    }
  }
}
