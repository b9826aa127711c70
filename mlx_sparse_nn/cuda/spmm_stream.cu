// The product of spmm_csr.cu for scalars, one row of x, and short rows: a sparse matrix times a vector.
// Values and indices are copied to shared memory in the order in which they lie, whatever the lengths
// of the rows; then neighbouring threads walk neighbouring rows, so that the places of x that matrices
// such as the Ising Hamiltonian ask for together lie together.
//
// Inputs, output: as there with B = 1 and N = 1; no TRANSPOSED.
// Launch
//   (ceil(R / 128) 128, 1, V) threads in blocks of 128. One thread block owns 128 rows.
// Template
//   T float, half or bfloat16; BIAS 0 or 1.
// Sums in float32: each row its values in stored order, then the bias.

constexpr int ROWS = 128;
constexpr int HELD = 3072;  // values held at a time
__shared__ int columns[HELD];
__shared__ float values[HELD];

const int R = indptr_shape[0] - 1;
const int r0 = blockIdx.x * ROWS;
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int r = min(r0 + thread, R - 1);
const int begin = indptr[r0];
const int end = indptr[min(r0 + ROWS, R)];
const int row_begin = indptr[r];
const int row_end = indptr[r + 1];
const T* stored = data + (size_t)v * data_shape[1];
const T* xv = x + (size_t)v * x_shape[2];

float acc = 0.0f;
for (int first = begin; first < end; first += HELD) {
  const int count = min(HELD, end - first);
#pragma unroll 8
  for (int i = thread; i < count; i += ROWS) {
    columns[i] = __ldcs(indices + first + i);
    values[i] = float(__ldcs(stored + first + i));
  }
  __syncthreads();
  const int stop = min(row_end, first + count) - first;
#pragma unroll 4
  for (int i = max(row_begin, first) - first; i < stop; i++) {
    acc = fmaf(values[i], float(xv[columns[i]]), acc);
  }
  __syncthreads();
}
if (r0 + thread < R) {
  y[(size_t)v * R + r] = T(acc + (BIAS ? float(bias[r]) : 0.0f));
}
