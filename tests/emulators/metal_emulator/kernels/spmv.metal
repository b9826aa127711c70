// y[r] = sum over j in indptr[r] .. indptr[r + 1] of data[j] x[indices[j]], one simdgroup a row.
//
// data: (nnz,) float.  indices: (nnz,) int.  indptr: (R + 1,) int.  x: (C,) float.  y: (R,) float.
// Launch: (32 R, 1, 1) threads in groups of (128, 1, 1).
const uint row = thread_position_in_grid.x / 32;
const int end = indptr[row + 1];
float sum = 0;
for (int j = indptr[row] + thread_index_in_simdgroup; j < end; j += 32)
  sum = fma(data[j], x[indices[j]], sum);
sum = simd_sum(sum);
if (thread_index_in_simdgroup == 0) y[row] = sum;
