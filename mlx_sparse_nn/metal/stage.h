// Copies of a tile from device memory to threadgroup memory, in two steps: all loads of a stage
// into registers, so that they are under way together, and behind the caller's barrier the stores.
//
// THREADS threads copy ROWS x COLS elements as vectors of 4; COLS is a multiple of 4. A thread has
// column t % (COLS / 4) * 4 of the rows t / (COLS / 4), and on in steps of stage_step. Threads that
// are left over load what others load, and store nothing. `t` counts from 0. Needs common.h.

// How many rows are copied at once.
template <int COLS, int THREADS>
inline constexpr int stage_step() {
  return THREADS / (COLS / 4);
}

// How many vectors a thread has.
template <int ROWS, int COLS, int THREADS>
inline constexpr int stage_vectors() {
  return (ROWS + stage_step<COLS, THREADS>() - 1) / stage_step<COLS, THREADS>();
}

// Whether every thread has a row for each of its vectors.
template <int ROWS, int COLS, int THREADS>
inline constexpr bool stage_is_even() {
  return THREADS % (COLS / 4) == 0 && ROWS % stage_step<COLS, THREADS>() == 0;
}

// Load this thread's vectors of a tile that is there as a whole. Its rows are `stride` apart.
template <typename T, int ROWS, int COLS, int THREADS>
METAL_FUNC void load_stage(const device T* src, const int stride, const int t,
                           thread vec<T, 4>* v) {
  constexpr int STEP = stage_step<COLS, THREADS>();
  constexpr bool EVEN = stage_is_even<ROWS, COLS, THREADS>();
  const int row = t / (COLS / 4);
  const int col = t % (COLS / 4) * 4;
#pragma unroll
  for (int i = 0; i < stage_vectors<ROWS, COLS, THREADS>(); i++) {
    const int m = EVEN ? row + i * STEP : min(row + i * STEP, ROWS - 1);
    v[i] = load4<T>(src + uint(m) * uint(stride) + col);
  }
}

// The same of a tile whose rows end with `last`: those behind it repeat it.
template <typename T, int ROWS, int COLS, int THREADS>
METAL_FUNC void load_stage(const device T* src, const int stride, const int last, const int t,
                           thread vec<T, 4>* v) {
  constexpr int STEP = stage_step<COLS, THREADS>();
  const int row = t / (COLS / 4);
  const int col = t % (COLS / 4) * 4;
#pragma unroll
  for (int i = 0; i < stage_vectors<ROWS, COLS, THREADS>(); i++) {
    v[i] = load4<T>(src + uint(min(row + i * STEP, last)) * uint(stride) + col);
  }
}

// The same of a tile of which `cols` columns are there: those behind them hold any of these. With
// VECTORS, `cols` is a multiple of 4; else elements are loaded one by one.
template <typename T, int ROWS, int COLS, int THREADS, bool VECTORS>
METAL_FUNC void load_part(const device T* src, const int stride, const int last, const int cols,
                          const int t, thread vec<T, 4>* v) {
  constexpr int STEP = stage_step<COLS, THREADS>();
  const int row = t / (COLS / 4);
  const int col = t % (COLS / 4) * 4;
#pragma unroll
  for (int i = 0; i < stage_vectors<ROWS, COLS, THREADS>(); i++) {
    const device T* at = src + uint(min(row + i * STEP, last)) * uint(stride);
    if (VECTORS) {
      v[i] = load4<T>(at + min(col, cols - 4));
    } else {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        v[i][e] = at[min(col + e, cols - 1)];
      }
    }
  }
}

// Put zeros in place of the rows from `valid` on.
template <typename T, int ROWS, int COLS, int THREADS>
METAL_FUNC void cut_rows(const int valid, const int t, thread vec<T, 4>* v) {
  const int row = t / (COLS / 4);
#pragma unroll
  for (int i = 0; i < stage_vectors<ROWS, COLS, THREADS>(); i++) {
    if (row + i * stage_step<COLS, THREADS>() >= valid) {
      v[i] = vec<T, 4>(T(0));
    }
  }
}

// Put zeros in place of the columns from `valid` on.
template <typename T, int ROWS, int COLS, int THREADS>
METAL_FUNC void cut_cols(const int valid, const int t, thread vec<T, 4>* v) {
#pragma unroll
  for (int i = 0; i < stage_vectors<ROWS, COLS, THREADS>(); i++) {
    v[i] = cut4(v[i], valid - t % (COLS / 4) * 4);
  }
}

// Store this thread's vectors in a tile whose rows are LD elements apart, a multiple of 4.
template <typename T, int ROWS, int COLS, int LD, int THREADS>
METAL_FUNC void store_stage(const thread vec<T, 4>* v, const int t, threadgroup vec<T, 4>* dst) {
  constexpr int STEP = stage_step<COLS, THREADS>();
  constexpr bool EVEN = stage_is_even<ROWS, COLS, THREADS>();
  const int row = t / (COLS / 4);
  const int at = (row * LD + t % (COLS / 4) * 4) / 4;
#pragma unroll
  for (int i = 0; i < stage_vectors<ROWS, COLS, THREADS>(); i++) {
    if (EVEN || (row < STEP && row + i * STEP < ROWS)) {
      dst[at + i * (STEP * LD / 4)] = v[i];
    }
  }
}
