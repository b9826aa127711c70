// out[i] = sum of partial[s, i] over s, in ascending order. M elements, S splits.
//
// Input
//   partial  (S, M) float32
// Output
//   out      (M) T
// Launch
//   (ceil(M / 256) 256, 1, 1) threads in groups of (256, 1, 1). One thread owns one element.
// Template
//   T float, half or bfloat.
// Sums in float32, s ascending.

constexpr int DEPTH = 8;  // splits whose loads are under way together
const uint i = threadgroup_position_in_grid.x * 256 + thread_index_in_threadgroup;
const uint M = partial_shape[1];
const int S = partial_shape[0];
if (i < M) {
  float sum = 0.0f;
  for (int s = 0; s < S; s += DEPTH) {
    float values[DEPTH];
#pragma unroll
    for (int q = 0; q < DEPTH; q++) {
      values[q] = partial[(size_t)min(s + q, S - 1) * M + i];
    }
#pragma unroll
    for (int q = 0; q < DEPTH; q++) {
      sum = s + q < S ? sum + values[q] : sum;
    }
  }
  out[i] = T(sum);
}
