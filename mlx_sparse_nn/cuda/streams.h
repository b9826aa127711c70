#pragma once

// Neighbouring floats, at any alignment; STREAM 1 if nobody reads them again soon.

template <int COUNT, int STREAM>
__device__ __forceinline__ Pack<float, COUNT> load_pack(const float* from) {
  Pack<float, COUNT> value;
  if ((size_t)from % sizeof(value)) {
#pragma unroll
    for (int e = 0; e < COUNT; e++) {
      value.elements[e] = STREAM ? __ldcs(from + e) : from[e];
    }
  } else if constexpr (STREAM && COUNT == 4) {
    const float4 floats = __ldcs(reinterpret_cast<const float4*>(from));
    value = {floats.x, floats.y, floats.z, floats.w};
  } else {
    value = *reinterpret_cast<const Pack<float, COUNT>*>(from);
  }
  return value;
}

// The same to memory, on their alignment.
template <int STREAM, int COUNT>
__device__ __forceinline__ void store_pack(float* to, Pack<float, COUNT> value) {
  if constexpr (STREAM && COUNT == 4) {
    const float* e = value.elements;
    __stcs(reinterpret_cast<float4*>(to), make_float4(e[0], e[1], e[2], e[3]));
  } else {
    *reinterpret_cast<Pack<float, COUNT>*>(to) = value;
  }
}
