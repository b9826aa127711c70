// Float32 by fours: into shared memory from any element on, into registers, and out again.

// Copy 4 bytes from device to shared memory asynchronously, or a zero where the source is not
// `valid`.
__device__ __forceinline__ void copy_word(float* dst, const float* src, bool valid) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(dst);
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(src), "r"(bytes));
}

// Copy the first `count` of four floats asynchronously, and zeros behind them: at once where they
// are ALIGNED, or one by one.
template <bool ALIGNED>
__device__ __forceinline__ void copy_floats(float* dst, const float* src, int count) {
  if constexpr (ALIGNED) {
    copy_first<true>(dst, src, count);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      copy_word(dst + i, i < count ? src + i : src, i < count);
    }
  }
}

__device__ __forceinline__ void load_floats(float (&values)[4], const float* src) {
  const float4 value = *reinterpret_cast<const float4*>(src);
  values[0] = value.x;
  values[1] = value.y;
  values[2] = value.z;
  values[3] = value.w;
}

// Store the first `count` of four floats: at once where there are always four, on 16 bytes.
template <bool WHOLE>
__device__ __forceinline__ void store_floats(float* dst, float4 value, int count) {
  if constexpr (WHOLE) {
    if (count > 0) {
      *reinterpret_cast<float4*>(dst) = value;
    }
  } else {
    const float values[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (i < count) {
        dst[i] = values[i];
      }
    }
  }
}
