// Sum over the LANES neighbouring lanes of a warp; each of them receives it.
template <int LANES>
__device__ __forceinline__ float sum_lanes(float value) {
#pragma unroll
  for (int bit = 1; bit < LANES; bit *= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, bit);
  }
  return value;
}
