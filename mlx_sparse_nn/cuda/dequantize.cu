// out[v, j] = the values that packed[v, j], scales[v, j] and biases[v, j] stand for.
//
// Inputs
//   packed   (V, n_blocks, B, B BITS / 32) uint32
//   scales   (V, n_blocks, B, B / GROUP_SIZE) T, biases likewise
// Output
//   out      (V, n_blocks, B, B) T
// Launch
//   (ceil(size / (2048 TURNS)) 256, 1, 1) threads in groups of (256, 1, 1). A thread owns 8
//   neighbours in each of TURNS parts of 2048 values.
// Template
//   T float, half or bfloat16; BITS; GROUP_SIZE; B; TURNS.
// Each value in float32, and rounded once.

#include "stores.h"
#include "quantized.h"

constexpr int WORDS = B * BITS / 32;    // of a stored row
constexpr int SCALES = B / GROUP_SIZE;  // of a stored row
const size_t n_rows =
    (size_t)(packed_ndim == 4 ? packed_shape[0] : 1) * packed_shape[packed_ndim - 3] * B;
const size_t begin = (size_t)blockIdx.x * (TURNS * 256) + threadIdx.x;
Pack packs[TURNS];
float scale[TURNS];
float offset[TURNS];
#pragma unroll
for (int turn = 0; turn < TURNS; turn++) {
  const size_t at = begin + turn * 256;
  const size_t row = at / (B / 8);
  const int col = at % (B / 8) * 8;
  if (row < n_rows) {
    packs[turn] = load_pack<BITS, 8>(packed + row * WORDS, col);
    scale[turn] = float(scales[row * SCALES + col / GROUP_SIZE]);
    offset[turn] = float(biases[row * SCALES + col / GROUP_SIZE]);
  }
}
#pragma unroll
for (int turn = 0; turn < TURNS; turn++) {
  const size_t at = begin + turn * 256;
  if (at / (B / 8) < n_rows) {
    float values[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const unsigned word = i < 4 ? packs[turn].low : packs[turn].high;
      values[i] =
          fmaf(scale[turn], integer(word >> i % 4 * BITS & ((1u << BITS) - 1)), offset[turn]);
    }
    if constexpr (sizeof(T) == 4) {
      uint4* to = reinterpret_cast<uint4*>(out + at * 8);
      to[0] = make_uint4(__float_as_uint(values[0]), __float_as_uint(values[1]),
                         __float_as_uint(values[2]), __float_as_uint(values[3]));
      to[1] = make_uint4(__float_as_uint(values[4]), __float_as_uint(values[5]),
                         __float_as_uint(values[6]), __float_as_uint(values[7]));
    } else {
      *reinterpret_cast<uint4*>(out + at * 8) =
          make_uint4(pack2(T(), values[0], values[1]), pack2(T(), values[2], values[3]),
                     pack2(T(), values[4], values[5]), pack2(T(), values[6], values[7]));
    }
  }
}
