// Blocks of one size as those of another: with zeros behind and below, or cut there. Each of M
// times H_IN rows of blocks W_IN wide becomes one of M times H_OUT rows of blocks W_OUT wide.
//
// Input
//   blocks   (M H_IN, width) T, of any number of axes; the last block of a row may be cut
// Output
//   out      (M H_OUT, (C - 1) W_OUT + LAST) T, C = ceil(width / W_IN)
// Launch
//   (M H_OUT ceil(width of out / 8), rounded up to groups, 1, 1) threads in groups of (256, 1, 1).
//   One thread owns 8 neighbouring elements of a row.
// Template
//   T half, bfloat16 or float; H_IN, W_IN, H_OUT, W_OUT; LAST columns of the last block, 1 to
//   W_OUT.

#include "copies.h"

// Elements that lie together, and on a multiple of their bytes, in both.
constexpr int WIDEST = W_IN % 4 == 0 && W_OUT % 4 == 0   ? 4
                       : W_IN % 2 == 0 && W_OUT % 2 == 0 ? 2
                                                         : 1;
const unsigned width = in_register(blocks_shape[blocks_ndim - 1]);
const unsigned width_out = (width - 1) / W_IN * W_OUT + LAST;
const unsigned chunks = (width_out + 7) / 8;
unsigned rows = 1;
for (int axis = 0; axis < blocks_ndim - 1; axis++) {
  rows *= blocks_shape[axis];
}
const unsigned i = blockIdx.x * 256 + threadIdx.x;
const unsigned row = i / chunks;
if (row >= rows / H_IN * H_OUT) {
  return;
}
const unsigned first = i % chunks * 8;
const unsigned h = row % H_OUT;
const T* src = blocks + (size_t)(row / H_OUT * H_IN + min(h, unsigned(H_IN - 1))) * width;
T* dst = out + (size_t)row * width_out + first;
const bool aligned = (size_t)blocks % (WIDEST * sizeof(T)) == 0 && width % WIDEST == 0;

auto move = [&](auto whole) {
  constexpr int PIECE = whole.value ? WIDEST : 1;
  struct __align__(PIECE * sizeof(T)) Piece {
    T elements[PIECE];
  };
  struct __align__(16) Held {
    Piece pieces[8 / PIECE];
  } held;
#pragma unroll
  for (int p = 0; p < 8 / PIECE; p++) {
    const unsigned col = first + p * PIECE;
    const unsigned in_block = col % W_OUT;
    const unsigned from = col / W_OUT * W_IN + in_block;
    if (h < H_IN && in_block < W_IN && from < width) {
      held.pieces[p] = *reinterpret_cast<const Piece*>(src + from);
    } else {
#pragma unroll
      for (int e = 0; e < PIECE; e++) {
        held.pieces[p].elements[e] = T(0.0f);
      }
    }
  }
  if (width_out % 8 == 0) {
    *reinterpret_cast<Held*>(dst) = held;
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++) {
      if (first + e < width_out) {
        dst[e] = held.pieces[e / PIECE].elements[e % PIECE];
      }
    }
  }
};
if (WIDEST > 1 && aligned) {
  move(Constant<(WIDEST > 1)>());
} else {
  move(Constant<false>());
}
