// The product of sddmm_tiles.cu for scalars (B = 1), for float32, and for block sizes without
// tiles, with the rows n in splits: out[s] sums those of split s.
//
// Inputs
//   y, x, indptr, indices as there, B any; step (1) int32: rows of a split.
// Output
//   out      (S, V, n_blocks, B, B) OUT
// Launch
//   (ceil(R B LANES / 256) 256, S, V) threads in blocks of 256. LANES neighbouring threads share
//   the stored values of one scalar row in turn; each value is summed by one thread.
// Template
//   T float, half or bfloat16; OUT, T or float; B; LANES.
// Sums in float32, n ascending.

const size_t position = (size_t)blockIdx.x * 256 + threadIdx.x;
const int row = position / LANES;
const int lane = position % LANES;
const int split = blockIdx.y;
const int v = blockIdx.z;
const int N = x_shape[x_ndim - 2];
const int C = x_shape[x_ndim - 1];
const int R = y_shape[y_ndim - 1];

if (row < R) {
  const int i = row % B;
  const int begin = indptr[row / B];
  const int values = (indptr[row / B + 1] - begin) * B;
  const int first = split * step[0];
  const int last = min(N, first + step[0]);
  const size_t base = ((size_t)split * gridDim.z + v) * indices_shape[0];
  const T* y_col = y + (size_t)v * N * R + row;
  for (int e = lane; e < values; e += LANES) {
    const int j = begin + e / B;
    const int k = e % B;
    const T* x_col = x + (size_t)v * N * C + indices[j] * B + k;
    float acc = 0.0f;
    for (int n = first; n < last; n++) {
      acc = fmaf(float(y_col[(size_t)n * R]), float(x_col[(size_t)n * C]), acc);
    }
    out[((base + j) * B + i) * B + k] = OUT(acc);
  }
}
