// What the kernels share: vector loads, copies to threadgroup memory, sums over lanes.

// Four neighbouring elements, with the alignment of one: a slice may begin at any element.
template <typename T>
struct packed4;
template <>
struct packed4<float> {
  typedef packed_float4 type;
};
template <>
struct packed4<half> {
  typedef packed_half4 type;
};
template <>
struct packed4<bfloat16_t> {
  typedef packed_bfloat4 type;
};

template <typename T>
METAL_FUNC vec<T, 4> load4(const device T* p) {
  return *(const device typename packed4<T>::type*)p;
}

// The elements of four from `from` on and before `end`, and zeros elsewhere.
template <typename T>
METAL_FUNC vec<T, 4> cut4(vec<T, 4> v, const int end, const int from = 0) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (i < from || i >= end) {
      v[i] = T(0);
    }
  }
  return v;
}

// Copy ROWS x COLS of src, whose rows are `stride` apart, to dst, whose rows are LD apart. Rows
// from `valid` on are zeros, and columns from `cols` on. All THREADS of the group take part. The
// caller places the barriers.
template <typename T, int ROWS, int COLS, int LD, int THREADS>
METAL_FUNC void stage(const device T* src, const size_t stride, const int valid, threadgroup T* dst,
                      const int thread_index, const int cols = COLS) {
  for (int i = thread_index; i < ROWS * (COLS / 4); i += THREADS) {
    const int row = i / (COLS / 4);
    const int col = i % (COLS / 4) * 4;
    vec<T, 4> v = vec<T, 4>(T(0));
    if (row < valid) {
      v = load4<T>(src + row * stride + col);
    }
    if (cols < COLS) {
      v = cut4(v, cols - col);
    }
    dst[row * LD + col] = v[0];
    dst[row * LD + col + 1] = v[1];
    dst[row * LD + col + 2] = v[2];
    dst[row * LD + col + 3] = v[3];
  }
}

// Sum over the lanes whose numbers differ in the bits FIRST, 2 FIRST, ... below LAST. Each of them
// receives the sum. The order is fixed.
template <int FIRST, int LAST>
METAL_FUNC float sum_lanes(float value) {
  for (int bit = FIRST; bit < LAST; bit *= 2) {
    value += simd_shuffle_xor(value, bit);
  }
  return value;
}
