// y[v, n, r B + o] = bias[r B + o] + sum of W_j[o, k] x[v, n, indices[j] B + k] over the blocks j
// of block-row r and k < B. W_j is data[v, j], or the transpose of data[v, perm[j]]. Letters as in
// README.md. By the tensor units of an M5, which read x and blocks where they lie: nothing is
// staged, and no thread waits for another simdgroup. Off until a run on an M5 is recorded.
//
// Inputs
//   data     (V, n_blocks, B, B) T
//   indptr   (R + 1) int32, indices (n_blocks) int32
//   perm     (n_blocks) int32; not read unless TRANSPOSED
//   x        (V, N, n_cols) T
//   bias     (n_rows) T; not read unless BIAS
// Output
//   y        (V, N, n_rows) T
// Launch
//   (R THREADS, ceil(N / ROWS), V) threads in groups of (THREADS, 1, 1), THREADS = ROWS B / COLS.
//   One group owns one block-row and ROWS rows of x, one simdgroup of it 32 rows and COLS outputs.
// Template
//   T half or bfloat; B a multiple of 16, 16 to 128; INSIDE columns of the last block-column, 1 to
//   B; ROWS of x in a tile, a multiple of 32; WHOLE 1 where N is a multiple of 32, else 0; COLS 16,
//   32 or 48, a divisor of B; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: blocks in stored order, those of a block in the order of the hardware, then the
// bias.
//
// Specification: Metal Shading Language 4, sections 2.21 and 7.2. Tensors of half and bfloat have
// the alignment of an element, so x and data may begin at any. Extents bound what is read, and are
// static where nothing is cut: then the operation looks at no bound. Rows of x past the last one
// leave sums that are not stored. Columns outside the matrix are not part of the product, since a
// nan there times zero would be nan. Tensors begin at the slice itself, because slice() of a large
// one goes wrong from 2 GB on (llama.cpp #28748).

#include "tensor_units.h"

constexpr int TILE = 32;                                 // rows of x of a simdgroup
constexpr int TILES_O = B / COLS;                        // simdgroups side by side over the outputs
constexpr size_t WIDTH = WHOLE ? TILE : dynamic_extent;  // rows of x,
constexpr size_t DEPTH = INSIDE < B ? dynamic_extent : B;  // and k, of a product

const int r = threadgroup_position_in_grid.x;
const int v = threadgroup_position_in_grid.z;
const int simd_group = simdgroup_index_in_threadgroup;
const int n0 = threadgroup_position_in_grid.y * ROWS + simd_group / TILES_O * TILE;
const int o0 = simd_group % TILES_O * COLS;
const int N = x_shape[x_ndim - 2];
const int n_cols = x_shape[x_ndim - 1];
const int n_rows = (indptr_shape[0] - 1) * B;
const int n_inside = n_cols - B + INSIDE;
if (n0 >= N) {
  return;
}

// Operands are x and W, not const: the operation takes no other. Extents and strides count from the
// contiguous axis.
typedef tensor<device T, dextents<int, 2>, tensor_inline> Operand;
constexpr auto form = mpp::tensor_ops::matmul2d_descriptor(
    TILE, COLS, static_cast<int>(DEPTH), false, !TRANSPOSED, false,
    mpp::tensor_ops::matmul2d_descriptor::mode::multiply_accumulate);
mpp::tensor_ops::matmul2d<form, execution_simdgroup> product;
auto acc = product.template get_destination_cooperative_tensor<Operand, Operand, float>();
#pragma unroll
for (ushort i = 0; i < acc.get_capacity(); i++) {
  if (acc.is_valid_element(i)) {
    acc[i] = 0.0f;
  }
}

const device T* x_panel = x + ((size_t)v * N + n0) * n_cols;
const int end = indptr[r + 1];
for (int j = indptr[r]; j < end; j++) {
  const int stored = TRANSPOSED ? perm[j] : j;
  const device T* block = data + ((size_t)v * indices_shape[0] + stored) * (B * B);
  const int col = indices[j] * B;
  const int depth = INSIDE < B ? min(B, n_inside - col) : B;  // k in the matrix
  Operand x_part((device T*)(x_panel + col), dextents<int, 2>(depth, N - n0),
                 array<int, 2>{1, n_cols});
  Operand w_part((device T*)(block + (TRANSPOSED ? o0 : o0 * B)),
                 TRANSPOSED ? dextents<int, 2>(COLS, depth) : dextents<int, 2>(depth, COLS),
                 array<int, 2>{1, B});
  auto xs = x_part.template slice<DEPTH, WIDTH>(0, 0);
  auto ws = w_part.template slice<TRANSPOSED ? COLS : DEPTH, TRANSPOSED ? DEPTH : COLS>(0, 0);
  product.run(xs, ws, acc);
}

#pragma unroll
for (ushort i = 0; i < acc.get_capacity(); i++) {
  if (acc.is_valid_element(i)) {
    const auto at = acc.get_multidimensional_index(i);  // output, row of x
    const int row = r * B + o0 + at[0];
    const int n = n0 + at[1];
    if (WHOLE || n < N) {
      const float b = BIAS ? float(bias[row]) : 0.0f;
      y[((size_t)v * N + n) * n_rows + row] = T(acc[i] + b);
    }
  }
}
