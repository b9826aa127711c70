// Parts of the moments of Pauli strings: out[v, w, t] = sum of u[v, n, i] s_t(i ^ m_t) x[v, n, i ^
// m_t] over the places of a state that simdgroup w owns. Letters and tiles as in pauli.metal.
//
// Inputs
//   u, x   (V, N, size) float, size a power of two
//   terms  (n_terms + 1, 4) int32, as there
// Output
//   out    (V, N size / TILE THREADS / 32, n_terms) float
// Launch
//   (V N size / TILE THREADS, 1, 1) threads in groups of (THREADS, 1, 1), TILE = 2^LOW. Threads
//   take places of the tile in turn; there may be more threads than places.
// Template
//   LOW at least 1; THREADS a multiple of 32; SIGNED 0 where no z_t has a bit.
// Sums in float32: each thread its places, ascending, then over lanes.

#include "common.h"

constexpr int TILE = 1 << LOW;
constexpr int HELD = TILE > THREADS ? TILE / THREADS : 1;

threadgroup float tile[TILE];

const uint size = x_shape[x_ndim - 1];
const uint n_tiles = size / TILE;
const uint n = threadgroup_position_in_grid.x / n_tiles;
const uint l = thread_index_in_threadgroup;
const uint first = threadgroup_position_in_grid.x % n_tiles * TILE + l % TILE;
const int n_terms = terms_shape[0] - 1;
const int n_near = terms[0];
auto xn = x + (size_t)n * size;
auto un = u + (size_t)n * size;
const size_t simdgroup = (size_t)threadgroup_position_in_grid.x * (THREADS / 32) + l / 32;

float factors[HELD];
#pragma unroll
for (int h = 0; h < HELD; h++) {
  const uint i = first + h * THREADS;
  factors[h] = l < TILE ? float(un[i]) : 0.0f;
  if (l < TILE) {
    tile[i % TILE] = xn[i];
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int t = 0; t < n_terms; t++) {
  const uint m = terms[4 * t + 4];
  const uint z = terms[4 * t + 5];
  float acc = 0.0f;
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    const uint j = (first + h * THREADS) ^ m;
    const float value = t < n_near ? float(tile[j % TILE]) : float(xn[j]);
    acc = fma(SIGNED && popcount(~j & z) % 2 ? -factors[h] : factors[h], value, acc);
  }
  acc = sum_lanes<1, 32>(acc);
  if (l % 32 == 0) {
    out[simdgroup * n_terms + terms[4 * t + 6]] = acc;
  }
}
