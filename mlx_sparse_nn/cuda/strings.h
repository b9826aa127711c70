#pragma once

// Strings of Pauli matrices: `string` holds the mask of flips and that of signs.

// The first place of the pack in which one lies.
template <int COUNT>
__device__ __forceinline__ unsigned first_of(unsigned place) {
  return place & ~(COUNT - 1u);
}

// What a string takes to the pack at `place`, of the values of the pack from which it comes.
template <bool SIGNED, int COUNT>
__device__ __forceinline__ Pack<float, COUNT> apply(Pack<float, COUNT> values, int4 string,
                                                    unsigned place) {
  const unsigned from = first_of<COUNT>(place ^ string.x);
  if constexpr (SIGNED) {
    const int n_clear = __popc(first_of<COUNT>(~from & string.y));
#pragma unroll
    for (int e = 0; e < COUNT; e++) {
      const bool is_odd = (n_clear + __popc(~e & string.y & (COUNT - 1))) & 1;
      values.elements[e] = is_odd ? -values.elements[e] : values.elements[e];
    }
  }
#pragma unroll
  for (int bit = 1; bit < COUNT; bit *= 2) {
    if (string.x & bit) {
#pragma unroll
      for (int e = 0; e < COUNT; e++) {
        if (!(e & bit)) {
          const float other = values.elements[e];
          values.elements[e] = values.elements[e | bit];
          values.elements[e | bit] = other;
        }
      }
    }
  }
  return values;
}

template <int COUNT>
__device__ __forceinline__ void add(Pack<float, COUNT>& acc, float w, Pack<float, COUNT> values) {
#pragma unroll
  for (int e = 0; e < COUNT; e++) {
    acc.elements[e] = fmaf(w, values.elements[e], acc.elements[e]);
  }
}
