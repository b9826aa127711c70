#pragma once

// Neighbouring elements that are loaded and stored together.
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
  T elements[COUNT];
};

// Neighbours from anywhere: at once where they lie on their alignment.
template <int COUNT>
__device__ __forceinline__ Pack<float, COUNT> load_pack(const float* from) {
  Pack<float, COUNT> pack;
  if ((size_t)from % sizeof(pack) == 0) {
    pack = *reinterpret_cast<const Pack<float, COUNT>*>(from);
  } else {
#pragma unroll
    for (int e = 0; e < COUNT; e++) {
      pack.elements[e] = from[e];
    }
  }
  return pack;
}

// How many neighbours of a row of a block are: as many as divide it, up to 16 bytes.
template <typename T, int B>
constexpr __device__ int packed() {
  int count = 1;
  while (B % (2 * count) == 0 && 2 * count * sizeof(T) <= 16) {
    count *= 2;
  }
  return count;
}

// Such a number as a type.
template <int VALUE>
struct Count {
  static constexpr int value = VALUE;
};
