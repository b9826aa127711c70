#pragma once

// Loads of what lies at any place.

// COUNT values as one load, of an address that is a multiple of its bytes.
template <typename T, int COUNT>
struct alignas(COUNT * sizeof(T)) Pack {
  T at[COUNT];
};

// Load COUNT values as floats, at once where they are `aligned`: COUNT a power of two.
template <int COUNT, typename T>
__device__ __forceinline__ void load_values(float (&values)[COUNT], const T* from, bool aligned) {
  if constexpr ((COUNT & (COUNT - 1)) == 0) {
    if (aligned) {
      const Pack<T, COUNT> pack = *reinterpret_cast<const Pack<T, COUNT>*>(from);
#pragma unroll
      for (int i = 0; i < COUNT; i++) {
        values[i] = float(pack.at[i]);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    values[i] = float(from[i]);
  }
}
