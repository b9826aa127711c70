#pragma once

// Neighbouring elements that are loaded and stored together.
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Pack {
  T elements[COUNT];
};

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
