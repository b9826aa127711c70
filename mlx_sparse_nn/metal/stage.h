// Copies of a tile from device memory to threadgroup memory, in two steps: all loads of a stage
// into registers, so that they are under way together, and behind the caller's barrier the stores.
//
// THREADS threads copy ROWS x COLS elements, COLS a multiple of 8, at least COLS / 8 threads.
// Thread t has eight neighbours, columns t % (COLS / 8) * 8 and on, as two vectors of 4; it has
// them in row t / (COLS / 8), and in every stage_step'th row behind it. Threads that are left over
// load what others load, and store nothing. Needs common.h.

// How many rows are copied at once.
template <int COLS, int THREADS>
inline constexpr int stage_step() {
  return THREADS / (COLS / 8);
}

// How many vectors a thread has.
template <int ROWS, int COLS, int THREADS>
inline constexpr int stage_vectors() {
  return (ROWS + stage_step<COLS, THREADS>() - 1) / stage_step<COLS, THREADS>() * 2;
}

// Whether every thread has a row for each of its vectors.
template <int ROWS, int COLS, int THREADS>
inline constexpr bool stage_is_even() {
  return THREADS % (COLS / 8) == 0 && ROWS % stage_step<COLS, THREADS>() == 0;
}

// Load this thread's vectors of a tile that is there as a whole. Its rows are `stride` apart.
template <typename T, int ROWS, int COLS, int THREADS>
METAL_FUNC void load_stage(const device T* src, const int stride, const int t,
                           thread vec<T, 4>* v) {
  constexpr int STEP = stage_step<COLS, THREADS>();
  constexpr bool EVEN = stage_is_even<ROWS, COLS, THREADS>();
#pragma unroll
  for (int i = 0; i < stage_vectors<ROWS, COLS, THREADS>(); i += 2) {
    const int m = t / (COLS / 8) + i / 2 * STEP;
    const uint row = EVEN ? m : min(m, ROWS - 1);
    const device T* at = src + (row * uint(stride) + t % (COLS / 8) * 8);
    v[i] = load4<T>(at);
    v[i + 1] = load4<T>(at + 4);
  }
}

// The same of a tile whose rows end with `last`: those behind it repeat it.
template <typename T, int ROWS, int COLS, int THREADS>
METAL_FUNC void load_stage(const device T* src, const int stride, const int last, const int t,
                           thread vec<T, 4>* v) {
  constexpr int STEP = stage_step<COLS, THREADS>();
#pragma unroll
  for (int i = 0; i < stage_vectors<ROWS, COLS, THREADS>(); i += 2) {
    const uint row = min(t / (COLS / 8) + i / 2 * STEP, last);
    const device T* at = src + (row * uint(stride) + t % (COLS / 8) * 8);
    v[i] = load4<T>(at);
    v[i + 1] = load4<T>(at + 4);
  }
}

// The same of a tile that begins at column `begin` of rows `width` wide, 4 at least. Behind them
// are zeros, or anything where `width` is a multiple of 8. A vector that would reach past its row
// is the row's last; align_part moves it back.
template <typename T, int ROWS, int COLS, int THREADS>
METAL_FUNC void load_part(const device T* src, const int stride, const int last, const int begin,
                          const int width, const int t, thread vec<T, 4>* v) {
  constexpr int STEP = stage_step<COLS, THREADS>();
#pragma unroll
  for (int i = 0; i < stage_vectors<ROWS, COLS, THREADS>(); i++) {
    const uint row = min(t / (COLS / 8) + i / 2 * STEP, last);
    const int col = begin + t % (COLS / 8) * 8 + i % 2 * 4;
    const device T* at = src + (row * uint(stride) + min(col, width - 4));
    if (width % 8 == 0) {
      v[i] = load4<T>(at);
    } else {
      v[i] = vec<T, 4>(T(0));
      if (col < width) {
        v[i] = load4<T>(at);
      }
    }
  }
}

// Put the vectors that load_part took from before their place there, and zeros behind their row.
template <typename T, int ROWS, int COLS, int THREADS>
METAL_FUNC void align_part(const int begin, const int width, const int t, thread vec<T, 4>* v) {
#pragma unroll
  for (int i = 0; i < stage_vectors<ROWS, COLS, THREADS>(); i++) {
    const int over = begin + t % (COLS / 8) * 8 + i % 2 * 4 - (width - 4);
    if (over == 1 || over == 3) {
      v[i] = vec<T, 4>(v[i][1], v[i][2], v[i][3], T(0));
    }
    if (over == 2 || over == 3) {
      v[i] = vec<T, 4>(v[i][2], v[i][3], T(0), T(0));
    }
  }
}

// Put zeros in place of the rows from `valid` on.
template <typename T, int ROWS, int COLS, int THREADS>
METAL_FUNC void cut_rows(const int valid, const int t, thread vec<T, 4>* v) {
#pragma unroll
  for (int i = 0; i < stage_vectors<ROWS, COLS, THREADS>(); i++) {
    if (t / (COLS / 8) + i / 2 * stage_step<COLS, THREADS>() >= valid) {
      v[i] = vec<T, 4>(T(0));
    }
  }
}

// Put zeros in place of the columns from `valid` on.
template <typename T, int ROWS, int COLS, int THREADS>
METAL_FUNC void cut_cols(const int valid, const int t, thread vec<T, 4>* v) {
#pragma unroll
  for (int i = 0; i < stage_vectors<ROWS, COLS, THREADS>(); i++) {
    v[i] = cut4<T>(v[i], valid - t % (COLS / 8) * 8 - i % 2 * 4);
  }
}

// Store this thread's vectors in a tile whose rows are LD elements apart, a multiple of 4.
template <typename T, int ROWS, int COLS, int LD, int THREADS>
METAL_FUNC void store_stage(const thread vec<T, 4>* v, const int t, threadgroup vec<T, 4>* dst) {
  constexpr int STEP = stage_step<COLS, THREADS>();
  constexpr bool EVEN = stage_is_even<ROWS, COLS, THREADS>();
  const int row = t / (COLS / 8);
  const int at = row * (LD / 4) + t % (COLS / 8) * 2;
#pragma unroll
  for (int i = 0; i < stage_vectors<ROWS, COLS, THREADS>(); i += 2) {
    if (EVEN || (row < STEP && row + i / 2 * STEP < ROWS)) {
      dst[at + i / 2 * (STEP * LD / 4)] = v[i];
      dst[at + i / 2 * (STEP * LD / 4) + 1] = v[i + 1];
    }
  }
}
