// The values that a dense matrix has in the stored blocks: a weight gradient, of MLX's own product.
//
// Inputs
//   matrix   (V, n_rows, n_cols)
//   indptr (R + 1), indices (n_blocks)
//   sizes    (4): n_rows and n_cols, which may end within the last blocks, and two that are unread
// Output
//   out      (V, n_blocks, B, B), zeros outside of the matrix
// Launch
//   (R STRIPS 256, shares, V) threads in groups of (256, 1, 1), STRIPS = ceil(B / HEIGHT). One
//   group owns an equal share of a block-row's blocks, and HEIGHT rows of each.
// Template
//   T float, half or bfloat16; B; HEIGHT at most B.

#include "packs.h"

constexpr int THREADS = 256;
constexpr int STRIPS = (B + HEIGHT - 1) / HEIGHT;
constexpr int PACK = packed<T, B>();

const int r = blockIdx.x / STRIPS;
const int i0 = blockIdx.x % STRIPS * HEIGHT;
const int v = blockIdx.z;
const int n_rows = sizes[0];
const int n_cols = sizes[1];
const int height = min(HEIGHT, B - i0);
const int n_inside = n_rows - r * B - i0;  // rows of the strip in the matrix
const int n_blocks = indptr[r + 1] - indptr[r];
const int begin = indptr[r] + (size_t)n_blocks * blockIdx.y / gridDim.y;
const int end = indptr[r] + (size_t)n_blocks * (blockIdx.y + 1) / gridDim.y;
const T* rows = matrix + ((size_t)v * n_rows + r * B + i0) * n_cols;
T* blocks = out + ((size_t)v * indices_shape[0] + begin) * (B * B) + i0 * B;

auto take_by = [&](auto count) {
  constexpr int COUNT = count.value;
  constexpr int PACKS = HEIGHT * B / COUNT;  // of a block's part in the strip
#pragma unroll 4
  for (int e = threadIdx.x; e < (end - begin) * PACKS; e += THREADS) {
    const int i = e % PACKS / (B / COUNT);
    const int k = e % (B / COUNT) * COUNT;
    const int col = indices[begin + e / PACKS] * B + k;
    if (i < height) {
      Pack<T, COUNT> values;
      if (i < n_inside && col + COUNT <= n_cols) {
        values = *reinterpret_cast<const Pack<T, COUNT>*>(rows + (size_t)i * n_cols + col);
      } else {
        for (int n = 0; n < COUNT; n++) {
          const bool inside = i < n_inside && col + n < n_cols;
          values.elements[n] = inside ? rows[(size_t)i * n_cols + col + n] : T(0.0f);
        }
      }
      *reinterpret_cast<Pack<T, COUNT>*>(blocks + (size_t)(e / PACKS) * (B * B) + i * B + k) =
          values;
    }
  }
};
if ((size_t)matrix % sizeof(Pack<T, PACK>) == 0 && n_cols % PACK == 0) {
  take_by(Count<PACK>());
} else {
  take_by(Count<1>());
}
