#pragma once

// Copies of 16 bytes into shared memory from places that lie on fewer.

// Copy BYTES, 4 or 8, from device to shared memory asynchronously: the first `taken` of them, and
// zeros behind.
template <int BYTES>
__device__ __forceinline__ void copy_bytes(void* dst, const void* src, int taken) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(dst);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(src), "n"(BYTES),
               "r"(taken));
}

// Copy the first `count` of the elements that 16 bytes hold, and zeros behind them: PIECE elements
// at a time, or one by one where these are fewer than 4 bytes.
template <int PIECE, typename T>
__device__ __forceinline__ void copy_pieces(T* dst, const T* src, int count) {
  constexpr int HELD = 16 / sizeof(T);
  if constexpr (PIECE * sizeof(T) >= 4) {
#pragma unroll
    for (int i = 0; i < HELD; i += PIECE) {
      const int taken = max(0, min(PIECE, count - i));
      copy_bytes<PIECE*(int)sizeof(T)>(dst + i, taken > 0 ? src + i : src, taken * sizeof(T));
    }
  } else {
    __align__(16) T held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      held[i] = i < count ? src[i] : T(0.0f);
    }
    *reinterpret_cast<uint4*>(dst) = *reinterpret_cast<const uint4*>(held);
  }
}

// Copy the first `count` of four floats asynchronously, and zeros behind them: at once where they
// are ALIGNED, or one by one.
template <bool ALIGNED>
__device__ __forceinline__ void copy_floats(float* dst, const float* src, int count) {
  if constexpr (ALIGNED) {
    copy_first<true>(dst, src, count);
  } else {
    copy_pieces<1>(dst, src, count);
  }
}
