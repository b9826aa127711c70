// The product of sddmm_tiles.metal for scalars (B = 1) and for the block sizes without tiles.
//
// Inputs, output: as there, B any.
// Launch
//   (ceil(R B LANES / 256) 256, S, V) threads in groups of (256, 1, 1). LANES neighbouring threads
//   share the stored values of one scalar row in turn; each value is summed by one thread.
// Template
//   T float, half or bfloat; OUT, T or float; B; LANES.
// Sums in float32, n ascending.

const int position = threadgroup_position_in_grid.x * 256 + thread_index_in_threadgroup;
const int row = position / LANES;
const int lane = position % LANES;
const int split = threadgroup_position_in_grid.y;
const int v = threadgroup_position_in_grid.z;
const int N = x_shape[x_ndim - 2];
const int C = x_shape[x_ndim - 1];
const int R = y_shape[y_ndim - 1];

if (row < R) {
  const int i = row % B;
  const int begin = indptr[row / B];
  const int values = (indptr[row / B + 1] - begin) * B;
  const int first = split * step[0];
  const int last = min(N, first + step[0]);
  const size_t n_blocks = indices_shape[0];
  const size_t base = ((size_t)split * threadgroups_per_grid.z + v) * n_blocks;
  auto y_col = y + (size_t)v * N * R + row;
  for (int e = lane; e < values; e += LANES) {
    const int j = begin + e / B;
    const int k = e % B;
    auto x_col = x + (size_t)v * N * C + indices[j] * B + k;
    float acc = 0.0f;
    for (int n = first; n < last; n++) {
      acc = fma(float(y_col[(size_t)n * R]), float(x_col[(size_t)n * C]), acc);
    }
    out[((base + j) * B + i) * B + k] = OUT(acc);
  }
}
