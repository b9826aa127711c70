// out[v, j] = the values that packed[v, j], scales[v, j] and biases[v, j] stand for.
//
// Inputs
//   packed   (V, n_blocks, B, B BITS / 32) uint32
//   scales   (V, n_blocks, B, B / GROUP_SIZE) T, biases likewise
// Output
//   out      (V, n_blocks, B, B) T
// Launch
//   (ceil(size / (2048 TURNS)) 256, 1, 1) threads in groups of (256, 1, 1). One group owns
//   2048 TURNS values, of which a thread takes 8 neighbours at a time.
// Template
//   T float, half or bfloat16; BITS 2, 3, 4, 5, 6 or 8; GROUP_SIZE 32, 64 or 128; B a multiple of
//   32 and of GROUP_SIZE; TURNS.
// Each value is rounded once.

#include "stores.h"
#include "quantized.h"

constexpr int PACKS = B / 8;            // of a stored row
constexpr int WORDS = B * BITS / 32;    // of a stored row
constexpr int SCALES = B / GROUP_SIZE;  // of a stored row

const size_t n_packs =
    (size_t)(packed_ndim == 4 ? packed_shape[0] : 1) * packed_shape[packed_ndim - 3] * (B * PACKS);
const size_t begin = (size_t)blockIdx.x * (256 * TURNS);
const int count = n_packs - begin < 256 * TURNS ? n_packs - begin : 256 * TURNS;
const size_t first_row = begin / PACKS;
const int first_pack = begin % PACKS;
const unsigned* rows = packed + first_row * WORDS;
const T* row_scales = scales + first_row * SCALES;
const T* row_biases = biases + first_row * SCALES;
T* to = out + begin * 8;
Pack packs[TURNS];
T scale[TURNS];
T offset[TURNS];
#pragma unroll
for (int turn = 0; turn < TURNS; turn++) {
  const int i = min(turn * 256 + (int)threadIdx.x, count - 1);
  const int row = (first_pack + i) / PACKS;
  const int col = (first_pack + i) % PACKS * 8;
  packs[turn] = load_pack<BITS, 8>(rows + row * WORDS, col);
  scale[turn] = row_scales[row * SCALES + col / GROUP_SIZE];
  offset[turn] = row_biases[row * SCALES + col / GROUP_SIZE];
}
#pragma unroll
for (int turn = 0; turn < TURNS; turn++) {
  const int i = turn * 256 + threadIdx.x;
  if (i < count) {
    store_values<BITS>(packs[turn], scale[turn], offset[turn], to + i * 8);
  }
}
