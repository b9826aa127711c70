// Outer products of rows, in registers.

// Add y[n, i] x[n, k] to acc[block, i, k] for DEPTH rows n. Their loads are under way together. Of
// the first one, y[n, 0] is at y_at, and x[n, 0] of a block at x_at; of the others in steps of
// y_step and x_step. Columns are y_col and x_col apart.
template <typename T, int B, int BLOCKS, int DEPTH, typename Y, typename X>
METAL_FUNC void add_rows(Y y, const size_t y_at, const size_t y_col, const size_t y_step, X x,
                         const thread size_t* x_at, const size_t x_col, const size_t x_step,
                         thread float* acc) {
  T ys[DEPTH * B];
  T xs[DEPTH * BLOCKS * B];
#pragma unroll
  for (int m = 0; m < DEPTH; m++) {
#pragma unroll
    for (int i = 0; i < B; i++) {
      ys[m * B + i] = y[y_at + m * y_step + i * y_col];
    }
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
      for (int k = 0; k < B; k++) {
        xs[(m * BLOCKS + block) * B + k] = x[x_at[block] + m * x_step + k * x_col];
      }
    }
  }
#pragma unroll
  for (int m = 0; m < DEPTH; m++) {
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
#pragma unroll
      for (int i = 0; i < B; i++) {
#pragma unroll
        for (int k = 0; k < B; k++) {
          const int e = (block * B + i) * B + k;
          acc[e] = fma(float(ys[m * B + i]), float(xs[(m * BLOCKS + block) * B + k]), acc[e]);
        }
      }
    }
  }
}
