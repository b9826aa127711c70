#pragma once

// Float32 by fours.

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
