// The dense matrix of stored blocks, with zeros where nothing is stored, for products of MLX's own.
//
// Inputs
//   data (V, n_blocks, B, B), indptr (R + 1), indices (n_blocks); no block is stored twice
//   sizes    (5): n_rows and n_cols, which may end within the last blocks, WIDTH columns of a part,
//            a multiple of 16 bytes, and two that are unread
// Output
//   out      (V, n_rows, n_cols)
// Launch
//   (R STRIPS 256, ceil(n_cols / WIDTH), V) threads in groups of (256, 1, 1), STRIPS = ceil(B /
//   HEIGHT). One group owns WIDTH columns of a strip: of HEIGHT rows of a block-row.
//   Shared memory: HEIGHT WIDTH elements, which hold the strip.
// Template
//   T float, half or bfloat16; B; HEIGHT at most B.

#include "packs.h"

constexpr int THREADS = 256;
constexpr int STRIPS = (B + HEIGHT - 1) / HEIGHT;
constexpr int PACK = packed<T, B>();
constexpr int CHUNK = 16 / sizeof(T);
extern __shared__ __align__(128) char shared[];
T* strip = reinterpret_cast<T*>(shared);

const int r = blockIdx.x / STRIPS;
const int o0 = blockIdx.x % STRIPS * HEIGHT;
const int v = blockIdx.z;
const int n_rows = sizes[0];
const int n_cols = sizes[1];
const int width = sizes[2];
const int row0 = r * B + o0;
const int col0 = blockIdx.y * width;
const int height = min(min(HEIGHT, B - o0), n_rows - row0);
const int taken = min(width, n_cols - col0);

for (int i = threadIdx.x; i < height * width / CHUNK; i += THREADS) {
  reinterpret_cast<uint4*>(strip)[i] = make_uint4(0, 0, 0, 0);
}
__syncthreads();

const int begin = indptr[r];
const int n_blocks = indptr[r + 1] - begin;
const T* blocks = data + ((size_t)v * indices_shape[0] + begin) * (B * B) + o0 * B;
auto place_by = [&](auto count) {
  constexpr int COUNT = count.value;
  constexpr int PACKS = HEIGHT * B / COUNT;  // of a block's part in the strip
#pragma unroll 4
  for (int i = threadIdx.x; i < n_blocks * PACKS; i += THREADS) {
    const int o = i % PACKS / (B / COUNT);
    const int k = i % (B / COUNT) * COUNT;
    const int col = indices[begin + i / PACKS] * B + k - col0;
    if (o < height && col >= 0 && col < taken) {
      *reinterpret_cast<Pack<T, COUNT>*>(strip + o * width + col) =
          *reinterpret_cast<const Pack<T, COUNT>*>(blocks + (size_t)(i / PACKS) * (B * B) + o * B +
                                                   k);
    }
  }
};
if ((size_t)data % sizeof(Pack<T, PACK>) == 0) {
  place_by(Count<PACK>());
} else {
  place_by(Count<1>());
}
__syncthreads();

T* matrix = out + ((size_t)v * n_rows + row0) * n_cols + col0;
if (n_cols % CHUNK == 0) {
  const int chunks = taken / CHUNK;
  for (int i = threadIdx.x; i < height * chunks; i += THREADS) {
    const int o = i / chunks;
    const int at = i % chunks * CHUNK;
    *reinterpret_cast<uint4*>(matrix + (size_t)o * n_cols + at) =
        *reinterpret_cast<const uint4*>(strip + o * width + at);
  }
} else {
  for (int o = 0; o < height; o++) {
    for (int i = threadIdx.x; i < taken; i += THREADS) {
      matrix[(size_t)o * n_cols + i] = strip[o * width + i];
    }
  }
}
