// out[v, n, i] = diagonal[v, i] x[v, n, i] + sum over t of c[v, t] s_t(i ^ m_t) x[v, n, i ^ m_t]: V
// sums of Pauli strings, times N states each. s_t(j) is -1 to the number of clear bits of j among
// those of z_t.
//
// A group owns a tile: the places i of a state that agree in all bits above LOW low ones. Terms
// that flip none of these read the tile, others read x.
//
// Inputs
//   coefficients  (V, n_terms) float; (n_terms) where V = 1
//   diagonal      (V, size / PARTS) float, START 1; else unread
//   x             (V, N, size) float, any (..., size) where V = 1, size a power of two; of complex
//   states, PARTS 2, their parts
//                 in turn, so that bit 0 says which
//   terms         (n_terms + 1, 4) int32: n_near and zeros; then m_t, z_t, the place of c_t, zero.
//                 The first n_near flip low bits alone.
// Output
//   out           (V, N, size) float
// Launch
//   (V N size / TILE THREADS, 1, 1) threads in groups of (THREADS, 1, 1), TILE = 2^LOW.
//   Shared memory: the tile.
// Template
//   LOW at least 1; THREADS; PARTS 1 or 2; START 0, from zero, or 1; SIGNED 0 where no z_t has a
//   bit.
// Sums in float32: the diagonal's, the terms that flip other bits, in order, then those of low
// ones.

#include "packs.h"
#include "strings.h"

constexpr int TILE = 1 << LOW;
constexpr int VECTOR = LOW < 2 ? 1 << LOW : 4;
constexpr int HELD = TILE > THREADS* VECTOR ? TILE / (THREADS * VECTOR) : 1;  // of a thread
typedef Pack<float, VECTOR> Vector;
extern __shared__ __align__(128) char shared[];
float* tile = reinterpret_cast<float*>(shared);

const unsigned size = x_shape[x_ndim - 1];
const unsigned n_tiles = size / TILE;
const unsigned n = blockIdx.x / n_tiles;
const unsigned first = blockIdx.x % n_tiles * TILE;
const unsigned v = coefficients_ndim > 1 ? n / x_shape[x_ndim - 2] : 0;
const int n_terms = terms_shape[0] - 1;
const int n_near = terms[0];
const int4* strings = reinterpret_cast<const int4*>(terms) + 1;
const float* c = coefficients + (size_t)v * n_terms;
const float* xn = x + (size_t)n * size;
const float* factors = diagonal + (START ? (size_t)v * (size / PARTS) : 0);

const bool is_active = threadIdx.x * VECTOR < TILE;
unsigned places[HELD];
Vector acc[HELD];
#pragma unroll
for (int h = 0; h < HELD; h++) {
  places[h] = first + (h * THREADS + threadIdx.x) * VECTOR % TILE;
  acc[h] = load_pack<VECTOR>(xn + places[h]);
}
#pragma unroll
for (int h = 0; h < HELD; h++) {
  if (is_active) {
    *reinterpret_cast<Vector*>(tile + places[h] % TILE) = acc[h];
  }
  if (START) {
    const auto loaded = load_pack<VECTOR / PARTS>(factors + places[h] / PARTS);
#pragma unroll
    for (int e = 0; e < VECTOR; e++) {
      acc[h].elements[e] *= loaded.elements[e / PARTS];
    }
  } else {
    acc[h] = Vector();
  }
}
for (int t = n_near; t < n_terms; t++) {
  const int4 string = __ldg(strings + t);
  const float w = __ldg(c + string.z);
  Vector values[HELD];
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    values[h] = load_pack<VECTOR>(xn + first_of<VECTOR>(places[h] ^ string.x));
  }
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    add(acc[h], w, apply<SIGNED>(values[h], string, places[h]));
  }
}
__syncthreads();
for (int t = 0; t < n_near; t++) {
  const int4 string = __ldg(strings + t);
  const float w = __ldg(c + string.z);
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    const unsigned from = first_of<VECTOR>(places[h] ^ string.x);
    const Vector values = *reinterpret_cast<const Vector*>(tile + from % TILE);
    add(acc[h], w, apply<SIGNED>(values, string, places[h]));
  }
}
#pragma unroll
for (int h = 0; h < HELD; h++) {
  if (is_active) {
    *reinterpret_cast<Vector*>(out + (size_t)n * size + places[h]) = acc[h];
  }
}
