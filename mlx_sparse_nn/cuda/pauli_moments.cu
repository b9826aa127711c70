// Parts of the moments of Pauli strings: out[v, w, t] = sum of u[v, n, i] s_t(i ^ m_t) x[v, n, i ^
// m_t] over the places of a state that warp w owns. Letters and tiles as in pauli.cu.
//
// Inputs
//   u, x   (V, N, size) float, size a power of two
//   terms  (n_terms + 1, 4) int32, as there
// Output
//   out    (V, N size / TILE THREADS / 32, n_terms) float
// Launch
//   (V N size / TILE THREADS, 1, 1) threads in groups of (THREADS, 1, 1), TILE = 2^LOW.
//   Shared memory: the tile.
// Template
//   LOW at least 1; THREADS; SIGNED 0 where no z_t has a bit.
// Sums in float32: each thread its places, ascending, then over lanes.

#include "packs.h"
#include "strings.h"
#include "sums.h"

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
const int n_terms = terms_shape[0] - 1;
const int n_near = terms[0];
const int4* strings = reinterpret_cast<const int4*>(terms) + 1;
const float* xn = x + (size_t)n * size;
const float* un = u + (size_t)n * size;
const bool is_active = threadIdx.x * VECTOR < TILE;
const size_t warp = (size_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32;

unsigned places[HELD];
Vector factors[HELD];
#pragma unroll
for (int h = 0; h < HELD; h++) {
  places[h] = first + (h * THREADS + threadIdx.x) * VECTOR % TILE;
  factors[h] = is_active ? load_pack<VECTOR>(un + places[h]) : Vector();
  if (is_active) {
    *reinterpret_cast<Vector*>(tile + places[h] % TILE) = load_pack<VECTOR>(xn + places[h]);
  }
}
__syncthreads();
for (int t = 0; t < n_terms; t++) {
  const int4 string = __ldg(strings + t);
  Vector values[HELD];
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    const unsigned from = first_of<VECTOR>(places[h] ^ string.x);
    values[h] = t < n_near ? *reinterpret_cast<const Vector*>(tile + from % TILE)
                           : load_pack<VECTOR>(xn + from);
  }
  float acc = 0.0f;
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    const Vector moved = apply<SIGNED>(values[h], string, places[h]);
#pragma unroll
    for (int e = 0; e < VECTOR; e++) {
      acc = fmaf(factors[h].elements[e], moved.elements[e], acc);
    }
  }
  acc = sum_lanes<1, 32>(acc);
  if (threadIdx.x % 32 == 0) {
    out[warp * n_terms + string.z] = acc;
  }
}
