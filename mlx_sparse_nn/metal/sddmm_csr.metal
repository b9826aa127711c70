// The product of sddmm_tiles.metal for scalars (B = 1) and for the block sizes without tiles.
//
// Inputs, output: as there, B any.
// Launch
//   (ceil(n_rows LANES / 256) 256, S, V) threads in groups of (256, 1, 1). LANES neighbouring
//   threads take the stored values of one scalar row in turn. One thread sums each value.
// Template
//   T float, half or bfloat; OUT, T or float; B; LANES.
// Sums in float32, n ascending.

const int position = threadgroup_position_in_grid.x * 256 + thread_index_in_threadgroup;
const int row = position / LANES;
const int lane = position % LANES;
const int split = threadgroup_position_in_grid.y;
const int v = threadgroup_position_in_grid.z;
const int N = x_shape[x_ndim - 2];
const int n_cols = x_shape[x_ndim - 1];
const int n_rows = y_shape[y_ndim - 1];

if (row < n_rows) {
  const int i = row % B;
  const int begin = indptr[row / B];
  const int n_values = (indptr[row / B + 1] - begin) * B;
  const int begin_n = split * step[0];
  const int end_n = min(N, begin_n + step[0]);
  const size_t n_blocks = indices_shape[0];
  const size_t base = ((size_t)split * threadgroups_per_grid.z + v) * n_blocks;
  auto y_col = y + (size_t)v * N * n_rows + row;
  for (int e = lane; e < n_values; e += LANES) {
    const int j = begin + e / B;
    const int k = e % B;
    auto x_col = x + (size_t)v * N * n_cols + indices[j] * B + k;
    float acc = 0.0f;
    for (int n = begin_n; n < end_n; n++) {
      acc = fma(float(y_col[(size_t)n * n_rows]), float(x_col[(size_t)n * n_cols]), acc);
    }
    out[((base + j) * B + i) * B + k] = OUT(acc);
  }
}
