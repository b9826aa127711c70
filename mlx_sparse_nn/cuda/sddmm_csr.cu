// The product of sddmm_tiles.cu for scalars (B = 1), for float32, and for block sizes without
// tiles. The rows n come in splits: out[s] sums those of split s.
//
// A row of more than PIECE blocks is LONG. Threads behind those of the rows take these: all stored
// blocks, in stored order, are cut into pieces of PIECE, wherever rows begin, and a warp takes what
// is long of a piece: of the row in which it begins, and of the one in which it ends.
//
// Where WIDTH > 1, x and y lie by columns: then lanes side by side read neighbouring places.
//
// Inputs
//   y        (V, N, n_rows), or (V, n_rows, N) where WIDTH > 1
//   x        (V, N, n_cols), or (V, n_cols, N) where WIDTH > 1
//   indptr, indices: as there, B any
//   step     (1) int32: rows n of a split
// Output
//   out      (S, V, n_blocks, B, B) OUT
// Launch
//   (ceil(n_rows LANES WIDTH / 256) 256 + ceil(n_pieces B 32 / 256) 256, S, V) threads in groups of
//   (256, 1, 1), the second term where a row is LONG. LANES WIDTH neighbouring threads own the
//   stored values of one scalar row: LANES take them in turn, and WIDTH share the rows n of each.
//   Of a piece, a warp owns one row of blocks.
// Template
//   T float, half or bfloat16; OUT, T or float; B; WIDTH and LANES powers of two, at most 32
//   together; PIECE blocks; LONG 0 or 1.
// Sums in float32: each lane every WIDTH-th n, ascending, then over lanes.

#include "search.h"
#include "sums.h"

constexpr int SHARING = LANES * WIDTH;

const size_t position = (size_t)blockIdx.x * 256 + threadIdx.x;
const int split = blockIdx.y;
const int v = blockIdx.z;
const int R = indptr_shape[0] - 1;
const int n_blocks = indices_shape[0];
const int n_pieces = (n_blocks - 1) / PIECE + 1;
const int N = WIDTH > 1 ? x_shape[x_ndim - 1] : x_shape[x_ndim - 2];
const int n_cols = WIDTH > 1 ? x_shape[x_ndim - 2] : x_shape[x_ndim - 1];
const int n_rows = R * B;
const int begin_n = split * step[0];
const int end_n = min(N, begin_n + step[0]);
const size_t base = ((size_t)split * gridDim.z + v) * n_blocks;
const size_t n_step = WIDTH > 1 ? 1 : n_rows;
const size_t x_step = WIDTH > 1 ? 1 : n_cols;
const size_t col_step = WIDTH > 1 ? N : 1;
const T* yv = y + (size_t)v * N * n_rows;
const T* xv = x + (size_t)v * N * n_cols;

const size_t of_rows = ((size_t)n_rows * SHARING + 255) / 256 * 256;
const bool of_piece = LONG && position >= of_rows;
const int lanes = of_piece ? 32 / WIDTH : LANES;
const int lane = position / WIDTH % lanes;
const size_t unit = of_piece ? (position - of_rows) / 32 : position / SHARING;
const bool is_unit = unit < (size_t)(of_piece ? n_pieces * B : n_rows);
const int i = unit % B;

for (int part = 0; part < (of_piece ? 2 : 1); part++) {
  int r = is_unit ? unit / B : 0;
  int begin = 0;
  int end = 0;
  if (of_piece) {
    const int cut = r * PIECE;
    const int cut_end = cut + min(PIECE, n_blocks - cut);
    r = search_row(indptr, R, part == 0 ? cut : cut_end - 1, threadIdx.x % 32);
    begin = indptr[r];
    end = indptr[r + 1];
    const bool is_long = end - begin > PIECE;
    const bool first = part == 0 || begin > cut;  // else it is the row of the first part
    begin = max(begin, cut);
    end = is_unit && is_long && first ? min(end, cut_end) : begin;
  } else {
    begin = indptr[r];
    end = indptr[r + 1];
    end = is_unit && !(LONG && end - begin > PIECE) ? end : begin;
  }
  const int n_values = (end - begin) * B;
  int most = n_values;  // in the warp, whose lanes stay together to add up
  if (WIDTH > 1) {
#pragma unroll
    for (int bit = 1; bit < 32; bit *= 2) {
      most = max(most, __shfl_xor_sync(0xffffffffu, most, bit));
    }
  }
  const T* y_row = yv + ((size_t)r * B + i) * col_step;
  for (int e = lane; e - lane < most; e += lanes) {
    const int j = begin + e / B;
    const int k = e % B;
    float acc = 0.0f;
    if (e < n_values) {
      const T* x_col = xv + ((size_t)indices[j] * B + k) * col_step;
#pragma unroll 4
      for (int n = begin_n + position % WIDTH; n < end_n; n += WIDTH) {
        acc = fmaf(float(y_row[n * n_step]), float(x_col[n * x_step]), acc);
      }
    }
    acc = sum_lanes<1, WIDTH>(acc);
    if (e < n_values && position % WIDTH == 0) {
      out[((base + j) * B + i) * B + k] = OUT(acc);
    }
  }
}
