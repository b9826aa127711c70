// Copies of pieces of 4, 8 or 16 bytes into shared memory.
// Copy COUNT neighbouring elements of which only the first `taken` are read, and zeros
// behind them: asynchronously where the source is ALIGNED, which a slice need not be.
template <bool ALIGNED, int COUNT, typename T>
__device__ __forceinline__ void copy_piece(T* dst, const T* src, int taken) {
  taken = max(0, min(COUNT, taken));
  if constexpr (ALIGNED) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(dst);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(src),
                 "n"(COUNT * (int)sizeof(T)), "r"(taken * (int)sizeof(T)));
  } else {
#pragma unroll 1
    for (int i = 0; i < COUNT; i++) {
      dst[i] = i < taken ? src[i] : T(0.0f);
    }
  }
}
