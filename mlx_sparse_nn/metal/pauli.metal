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
//                 states, PARTS 2, their parts in turn, so that bit 0 says which
//   terms         (n_terms + 1, 4) int32: n_near and zeros; then m_t, z_t, the place of c_t, zero.
//                 The first n_near flip low bits alone.
// Output
//   out           (V, N, size) float
// Launch
//   (V N size / TILE THREADS, 1, 1) threads in groups of (THREADS, 1, 1), TILE = 2^LOW. Threads
//   take places of the tile in turn.
// Template
//   LOW at least 1, THREADS at most TILE, PARTS 1 or 2; START 0, from zero, or 1; SIGNED 0 where no
//   z_t has a bit.
// Sums in float32: the diagonal's, the terms that flip other bits, in order, then those of low
// ones.

constexpr int TILE = 1 << LOW;
constexpr int HELD = TILE / THREADS;

threadgroup float tile[TILE];

const uint size = x_shape[x_ndim - 1];
const uint n_tiles = size / TILE;
const uint n = threadgroup_position_in_grid.x / n_tiles;
const uint first = threadgroup_position_in_grid.x % n_tiles * TILE + thread_index_in_threadgroup;
const uint v = coefficients_ndim > 1 ? n / uint(x_shape[x_ndim - 2]) : 0;
const int n_terms = terms_shape[0] - 1;
const int n_near = terms[0];
auto c = coefficients + (size_t)v * n_terms;
auto xn = x + (size_t)n * size;
auto factors = diagonal + (START ? (size_t)v * (size / PARTS) : 0);

float acc[HELD];
#pragma unroll
for (int h = 0; h < HELD; h++) {
  const uint i = first + h * THREADS;
  const float value = xn[i];
  tile[i % TILE] = value;
  acc[h] = START ? float(factors[i / PARTS]) * value : 0.0f;
}
for (int t = n_near; t < n_terms; t++) {
  const uint m = terms[4 * t + 4];
  const uint z = terms[4 * t + 5];
  const float w = c[terms[4 * t + 6]];
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    const uint j = (first + h * THREADS) ^ m;
    const float signed_w = SIGNED && popcount(~j & z) % 2 ? -w : w;
    acc[h] = fma(signed_w, float(xn[j]), acc[h]);
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int t = 0; t < n_near; t++) {
  const uint m = terms[4 * t + 4];
  const uint z = terms[4 * t + 5];
  const float w = c[terms[4 * t + 6]];
#pragma unroll
  for (int h = 0; h < HELD; h++) {
    const uint j = (first + h * THREADS) ^ m;
    const float signed_w = SIGNED && popcount(~j & z) % 2 ? -w : w;
    const float value = tile[j % TILE];
    acc[h] = fma(signed_w, value, acc[h]);
  }
}
#pragma unroll
for (int h = 0; h < HELD; h++) {
  out[(size_t)n * size + first + h * THREADS] = acc[h];
}
