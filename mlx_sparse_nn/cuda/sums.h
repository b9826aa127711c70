#pragma once

// Sum over the lanes whose numbers differ in the bits FIRST, 2 FIRST, ... below LAST. Each of them
// receives the sum. The order is fixed.
template <int FIRST, int LAST>
__device__ __forceinline__ float sum_lanes(float value) {
#pragma unroll
  for (int bit = FIRST; bit < LAST; bit *= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, bit);
  }
  return value;
}
