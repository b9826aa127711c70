// out[v, j] = the values that packed[v, j], scales[v, j] and biases[v, j] stand for.
//
// Inputs
//   packed   (V, n_blocks, B, B BITS / 32) uint32
//   scales   (V, n_blocks, B, B / GROUP_SIZE) T, biases likewise
// Output
//   out      (V, n_blocks, B, B) T
// Launch
//   (ceil(rows / (TURNS ROWS)) THREADS, 1, 1) threads in groups of (THREADS, 1, 1), for stored rows
//   of which THREADS have ROWS = 8 THREADS / B at a time. One group owns TURNS ROWS of them. A
//   thread has 8 neighbours of a row, at the same place in each turn.
// Template
//   T float, half or bfloat16; BITS 2, 3, 4, 5, 6 or 8; GROUP_SIZE 32, 64 or 128; B a multiple of
//   32 and of GROUP_SIZE; THREADS a multiple of B; TURNS.
// Each value is rounded once.

#include "stores.h"
#include "quantized.h"

constexpr int PACKS = B / 8;            // of a stored row
constexpr int WORDS = B * BITS / 32;    // of a stored row
constexpr int SCALES = B / GROUP_SIZE;  // of a stored row
constexpr int ROWS = THREADS / PACKS;

const size_t n_rows =
    (size_t)(packed_ndim == 4 ? packed_shape[0] : 1) * packed_shape[packed_ndim - 3] * B;
const size_t row = (size_t)blockIdx.x * (TURNS * ROWS) + threadIdx.x / PACKS;
const int col = threadIdx.x % PACKS * 8;
if (row >= n_rows) {
  return;
}
const int last = min((n_rows - row - 1) / ROWS, (size_t)(TURNS - 1));  // turn with a row
const unsigned* words = packed + row * WORDS;
const T* scale_at = scales + row * SCALES + col / GROUP_SIZE;
const T* bias_at = biases + row * SCALES + col / GROUP_SIZE;
T* to = out + row * B + col;
Pack packs[TURNS];
T scale[TURNS];
T offset[TURNS];
#pragma unroll
for (int turn = 0; turn < TURNS; turn++) {
  const int at = min(turn, last) * ROWS;
  packs[turn] = load_pack<BITS, 8>(words + at * WORDS, col);
  scale[turn] = scale_at[at * SCALES];
  offset[turn] = bias_at[at * SCALES];
}
#pragma unroll
for (int turn = 0; turn < TURNS; turn++) {
  if (turn <= last) {
    store_values<BITS>(packs[turn], scale[turn], offset[turn], to + turn * ROWS * B);
  }
}
