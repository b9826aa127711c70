// What the kernels share: vector loads, sums over lanes.

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

// Sum over the lanes whose numbers differ in the bits FIRST, 2 FIRST, ... below LAST. Each of them
// receives the sum. The order is fixed.
template <int FIRST, int LAST>
METAL_FUNC float sum_lanes(float value) {
  for (int bit = FIRST; bit < LAST; bit *= 2) {
    value += simd_shuffle_xor(value, bit);
  }
  return value;
}
