// y[row] = sum of data[j] x[indices[j]] over the j of a row. One simdgroup takes a row.
//
// data: (nnz,) float.  indices: (nnz,) int.  indptr: (rows + 1,) int.  x: (cols,) float.
// y: (rows,) float.
// Launch: (32 rows, 1, 1) threads in groups of (128, 1, 1).
const uint row = thread_position_in_grid.x / 32;
const int end = indptr[row + 1];
float sum = 0;
for (int j = indptr[row] + thread_index_in_simdgroup; j < end; j += 32)
  sum = fma(data[j], x[indices[j]], sum);
sum = simd_sum(sum);
if (thread_index_in_simdgroup == 0) y[row] = sum;
