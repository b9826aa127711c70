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

const uint i = threadgroup_position_in_grid.x * 256 + thread_index_in_threadgroup;
const uint M = partial_shape[1];
if (i < M) {
  float sum = 0.0f;
  for (int s = 0; s < partial_shape[0]; s++) {
    sum += float(partial[(size_t)s * M + i]);
  }
  out[i] = T(sum);
}
