// Loads of a stage of which neighbouring columns lie in a block. Needs common.h and stage.h.

// Elements k to k + 3 of a row of a block; in place of those behind its end, some within it, or
// zeros where all are.
template <typename T, int B>
METAL_FUNC vec<T, 4> load_within(const device T* row, const int k) {
  if (B % 8 > 0 && B % 8 <= 4 && k >= B) {
    return vec<T, 4>(T(0));
  }
  if (B % 4 == 0) {
    return load4<T>(row + min(k, B - 4));
  }
  return vec<T, 4>(row[min(k, B - 1)], row[min(k + 1, B - 1)], row[min(k + 2, B - 1)],
                   row[min(k + 3, B - 1)]);
}

// Load this thread's vectors as load_stage does, of columns k to k + 7 of a block: of rows `row`,
// row + STEP, ... of a tile. At src begins the block's part of the first one, and rows are `stride`
// apart. Rows from `valid` on are zeros.
template <typename T, int B, int ROWS, int COLS, int THREADS>
METAL_FUNC void load_panel(const device T* src, const size_t stride, const int valid, const int row,
                           const int k, thread vec<T, 4>* v) {
  constexpr int STEP = stage_step<COLS, THREADS>();
  constexpr int COUNT = stage_vectors<ROWS, COLS, THREADS>();
  if (valid >= ROWS) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      const int m = i / 2 * STEP;
      if (m + STEP <= ROWS || row + m < ROWS) {
        v[i] = load_within<T, B>(src + m * stride, k + i % 2 * 4);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      v[i] = vec<T, 4>(T(0));
      if (row + i / 2 * STEP < valid) {
        v[i] = load_within<T, B>(src + i / 2 * STEP * stride, k + i % 2 * 4);
      }
    }
  }
}
