// out[v, n, i] = diagonal[v, i] x[v, n, i] + sum over t of c[v, t] s_t(i ^ m_t) x[v, n, i ^ m_t]: V
// sums of Pauli strings, times N states each. s_t(j) is -1 to the number of clear bits of j among
// those of z_t.
//
// A group owns a tile: the places i of a state that agree in their middle bits, those above LOW low
// ones and below HIGH high ones. Terms that flip no middle bit read the tile, others read x.
//
// Inputs
//   coefficients  (V, n_terms) float; (n_terms) where V = 1
//   diagonal      (V, size / PARTS) float, START 1; START 2, (V, N, size), what a sum starts from
//   x             (V, N, size) float, any (..., size) where V = 1, size a power of two; of complex
//   states, PARTS 2, their parts
//                 in turn, so that bit 0 says which
//   terms         (n_terms + 1, 4) int32: n_near and zeros; then m_t, z_t, the place of c_t, zero.
//                 The first n_near flip no middle bit.
// Output
//   out           (V, N, size) float
// Launch
//   (V N size / TILE THREADS, 1, 1) threads in groups of (THREADS, 1, 1), TILE = 2^(LOW + HIGH).
//   Shared memory: the tile.
// Template
//   LOW at least 1, HIGH 0 where size = TILE, THREADS; PARTS 1 or 2; START 0, from zero, 1 or 2;
//   SIGNED 0 where no z_t has a bit; STREAM 1 if diagonal and out should leave the cache to x;
//   TOGETHER terms whose loads are under way at once.
// Sums in float32: what a sum starts from, the terms that flip middle bits, in order, then the
// others.

#include "packs.h"
#include "streams.h"

constexpr int TILE = 1 << (LOW + HIGH);
constexpr int VECTOR = LOW < 2 ? 1 << LOW : 4;
constexpr int HELD = TILE > THREADS* VECTOR ? TILE / (THREADS * VECTOR) : 1;  // of a thread
constexpr unsigned ALIGNED = ~(VECTOR - 1u);
constexpr unsigned LOW_BITS = (1u << LOW) - 1;
typedef Pack<float, VECTOR> Vector;
extern __shared__ __align__(128) char shared[];
float* tile = reinterpret_cast<float*>(shared);

const unsigned size = x_shape[x_ndim - 1];
const unsigned n_tiles = size / TILE;
const unsigned n = blockIdx.x / n_tiles;
const unsigned middle = (blockIdx.x % n_tiles) << LOW;
const int high_shift = __popc(size - 1) - HIGH;
const int n_terms = terms_shape[0] - 1;
const int n_near = terms[0];
const int4* strings = reinterpret_cast<const int4*>(terms) + 1;
const unsigned v = coefficients_ndim > 1 ? n / x_shape[x_ndim - 2] : 0;
const float* c = coefficients + (size_t)v * n_terms;
const float* xn = x + (size_t)n * size;
const float* start = diagonal + (START == 1   ? (size_t)v * (size / PARTS)
                                 : START == 2 ? (size_t)n * size
                                              : 0);

// acc += c_t s_t(j) x[j] of the places j = from, from + 1, ..., whose values come, each to the
// place that differs in the low bits of m.
auto add = [&](Vector& acc, Vector value, float w, unsigned m, unsigned z, unsigned from) {
  if (SIGNED) {
    w = __popc(~from & z & ALIGNED) & 1 ? -w : w;
#pragma unroll
    for (int e = 0; e < VECTOR; e++) {
      const float sign = __popc(~e & z & (VECTOR - 1)) & 1 ? -w : w;
      value.elements[e] *= sign;
    }
    w = 1.0f;
  }
#pragma unroll
  for (int bit = 1; bit < VECTOR; bit *= 2) {
    if (m & bit) {
#pragma unroll
      for (int e = 0; e < VECTOR; e++) {
        if (!(e & bit)) {
          const float other = value.elements[e];
          value.elements[e] = value.elements[e | bit];
          value.elements[e | bit] = other;
        }
      }
    }
  }
#pragma unroll
  for (int e = 0; e < VECTOR; e++) {
    acc.elements[e] = fmaf(w, value.elements[e], acc.elements[e]);
  }
};

unsigned locals[HELD];  // places in the tile
unsigned places[HELD];
Vector acc[HELD];
const bool is_active = threadIdx.x * VECTOR < TILE;
#pragma unroll
for (int h = 0; h < HELD; h++) {
  const unsigned l = (h * THREADS + threadIdx.x) * VECTOR % TILE;
  locals[h] = l;
  places[h] = ((l >> LOW) << high_shift | middle) | (l & LOW_BITS);
  acc[h] = load_pack<VECTOR, 0>(xn + places[h]);
}
#pragma unroll
for (int h = 0; h < HELD; h++) {
  if (is_active) {
    *reinterpret_cast<Vector*>(tile + locals[h]) = acc[h];
  }
  if (START == 1) {
    const auto factors = load_pack<VECTOR / PARTS, STREAM>(start + places[h] / PARTS);
#pragma unroll
    for (int e = 0; e < VECTOR; e++) {
      acc[h].elements[e] *= factors.elements[e / PARTS];
    }
  } else {
    acc[h] = START == 2 ? load_pack<VECTOR, STREAM>(start + places[h]) : Vector();
  }
}
#pragma unroll TOGETHER
for (int t = n_near; t < n_terms; t++) {
  const int4 string = __ldg(strings + t);
  const float w = __ldg(c + string.z);
  Vector values[HELD];
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    values[h] = load_pack<VECTOR, 0>(xn + ((places[h] ^ string.x) & ALIGNED));
  }
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    add(acc[h], values[h], w, string.x, string.y, places[h] ^ string.x);
  }
}
__syncthreads();
for (int t = 0; t < n_near; t++) {
  const int4 string = __ldg(strings + t);
  const float w = __ldg(c + string.z);
  const unsigned flip = ((unsigned)string.x >> high_shift << LOW) | (string.x & LOW_BITS);
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    const unsigned from = (locals[h] ^ flip) & ALIGNED;
    add(acc[h], *reinterpret_cast<const Vector*>(tile + from), w, flip, string.y,
        places[h] ^ string.x);
  }
}
if (is_active) {
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    store_pack<STREAM>(out + (size_t)n * size + places[h], acc[h]);
  }
}
