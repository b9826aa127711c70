// y[row] = sum of a row of x, one simdgroup a row, four elements a load.
//
// x: (rows, cols) T, cols a multiple of 4.  y: (rows,) float.
// Launch: (32 rows, 1, 1) threads in groups of (64, 1, 1).
// Each lane sums every 128th group of four, then the lanes are summed pairwise.
const uint row = thread_position_in_grid.x / 32, lane = thread_index_in_simdgroup;
const int cols = x_shape[1];
const device vec<T, 4>* p = (const device vec<T, 4>*)(x + row * cols);
float sum = 0;
for (int i = lane; i < cols / 4; i += 32) {
  float4 v = float4(p[i]);
  sum += v.x + v.y + v.z + v.w;
}
sum = simd_sum(sum);
if (lane == 0) y[row] = sum;
