// Copies a ROWS x COLS tile of a row-major matrix to threadgroup memory, four elements a load.
// Rows from `rows` on are filled with zeros.
template <typename T, int ROWS, int COLS, int STRIDE, int THREADS>
METAL_FUNC void load_tile(const device T* src, int ld, int rows, threadgroup T* dst,
                          uint thread_index) {
  constexpr int VECTORS = ROWS * COLS / 4;
#pragma unroll
  for (int i = thread_index; i < VECTORS; i += THREADS) {
    int r = i / (COLS / 4), c = i % (COLS / 4) * 4;
    vec<T, 4> v = r < rows ? *(const device vec<T, 4>*)(src + r * ld + c) : vec<T, 4>(T(0));
    *(threadgroup vec<T, 4>*)(dst + r * STRIDE + c) = v;
  }
}
