// Loads of a stage whose columns come in blocks. Needs common.h and stage.h.

// Elements k to k + 7 of a row of a block. Behind its end are others of it, or zeros; those before
// its end are in their place once align_panel is through.
template <typename T, int B>
METAL_FUNC void load_eight(const device T* row, const int k, thread vec<T, 4>* v) {
  if (B % 8 == 0) {
    v[0] = load4<T>(row + min(k, B - 8));
    v[1] = load4<T>(row + min(k, B - 8) + 4);
  } else {
    v[0] = load4<T>(row + min(k, B - 4));
    v[1] = vec<T, 4>(T(0));
    if (B % 8 > 4 || k + 4 < B) {
      v[1] = load4<T>(row + min(k + 4, B - 4));
    }
  }
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
    for (int i = 0; i < COUNT; i += 2) {
      const int m = i / 2 * STEP;
      if (m + STEP <= ROWS || row + m < ROWS) {
        load_eight<T, B>(src + m * stride, k, v + i);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i += 2) {
      const int m = i / 2 * STEP;
      v[i] = vec<T, 4>(T(0));
      v[i + 1] = vec<T, 4>(T(0));
      if (row + m < valid) {
        load_eight<T, B>(src + m * stride, k, v + i);
      }
    }
  }
}

// Put the vectors that load_eight took from before their place there.
template <typename T, int B, int ROWS, int COLS, int THREADS>
METAL_FUNC void align_panel(const int k, thread vec<T, 4>* v) {
  if (B % 4 > 0) {
#pragma unroll
    for (int i = 0; i < stage_vectors<ROWS, COLS, THREADS>(); i++) {
      const int over = k + i % 2 * 4 - (B - 4);
      const vec<T, 4> a = v[i];
      if (over == 1) {
        v[i] = vec<T, 4>(a[1], a[2], a[3], a[3]);
      } else if (over == 2) {
        v[i] = vec<T, 4>(a[2], a[3], a[3], a[3]);
      } else if (over == 3) {
        v[i] = vec<T, 4>(a[3]);
      }
    }
  }
}
