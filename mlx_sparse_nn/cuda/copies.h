#pragma once

// Copies into shared memory, 16 bytes at a time, asynchronous where they can be.

// Copy 16 bytes from device to shared memory, or zeros where the source is not `valid`:
// asynchronously where it is ALIGNED, which a slice need not be.
template <bool ALIGNED, typename T>
__device__ __forceinline__ void copy16(T* dst, const T* src, bool valid) {
  if constexpr (ALIGNED) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(dst);
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(src),
                 "r"(bytes));
  } else {
#pragma unroll 1
    for (int i = 0; i < 16 / (int)sizeof(T); i++) {
      dst[i] = valid ? src[i] : T(0.0f);
    }
  }
}

// Copy 16 bytes as copy16 does, but only their first `count` elements, and zeros behind them. In
// place of copy16, this would take more registers.
template <bool ALIGNED, typename T>
__device__ __forceinline__ void copy_first(T* dst, const T* src, int count) {
  const int taken = max(0, min(16 / (int)sizeof(T), count));
  if constexpr (ALIGNED) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(dst);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(src),
                 "r"(taken * (int)sizeof(T)));
  } else {
#pragma unroll 1
    for (int i = 0; i < 16 / (int)sizeof(T); i++) {
      dst[i] = i < taken ? src[i] : T(0.0f);
    }
  }
}

// Copy COUNT times 16 bytes: from `src` on, `stride` elements apart, to `dst` on, STEP elements
// apart. From number `valid` on they are zeros, and nothing is read.
template <bool ALIGNED, int COUNT, int STEP, typename T>
__device__ __forceinline__ void copy_rows(T* dst, const T* src, size_t stride, int valid) {
  if (ALIGNED && valid >= COUNT) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      copy16<ALIGNED>(dst + i * STEP, src, true);
      src += stride;
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < COUNT; i++) {
      copy16<ALIGNED>(dst + i * STEP, i < valid ? src + i * stride : src, i < valid);
    }
  }
}

// A constant as a type, such as whether sources are aligned: a loop of copies is written once, and
// compiled once for each path of copy16.
template <bool VALUE>
struct Constant {
  static constexpr bool value = VALUE;
};
using Aligned = Constant<true>;
using Unaligned = Constant<false>;

// Return `value` in a register. Without this the compiler may read the size of an array again in
// every round of a loop.
__device__ __forceinline__ int in_register(int value) {
  int copy;
  asm volatile("mov.b32 %0, %1;" : "=r"(copy) : "r"(value));
  return copy;
}

// Copy the 16 bytes from element `i` on of `count` that are read once, as copy16 does. Nothing from
// `count` on is read.
template <typename T>
__device__ __forceinline__ void copy_some(T* dst, const T* src, int i, int count, bool aligned) {
  const int taken = min(16 / (int)sizeof(T), count - i);
  if (taken <= 0) {
    return;
  }
  if (aligned) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(dst + i);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(src + i),
                 "r"(taken * (int)sizeof(T)));
  } else {
    for (int k = i; k < i + taken; k++) {
      dst[k] = src[k];
    }
  }
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Wait until at most COUNT of the last committed groups of copies are under way.
template <int COUNT>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(COUNT));
}

// Chunks of 16 bytes from one row of a tile to the next, where a row has CHUNKS of them.
template <int CHUNKS>
constexpr __device__ int row_stride() {
  return (CHUNKS & (CHUNKS - 1)) == 0 ? CHUNKS : CHUNKS | 1;
}
// The same where four neighbouring rows are read together, 8 floats of each.
template <int CHUNKS>
constexpr __device__ int column_stride() {
  return CHUNKS + (6 - CHUNKS % 4) % 4;
}

// The place of 16-byte chunk `chunk` of row `row` in a tile whose rows have CHUNKS of them. The 8
// rows that ldmatrix reads together lie in different banks: chunks of a row are permuted where
// their number is a power of two, and rows are an odd number of chunks apart where it is not.
template <int CHUNKS>
__device__ __forceinline__ int swizzle(int row, int chunk) {
  if (CHUNKS == 1 || (CHUNKS & (CHUNKS - 1)) != 0) {
    return row * row_stride<CHUNKS>() + chunk;
  }
  if (CHUNKS >= 8) {
    return row * CHUNKS + (chunk ^ (row & 7));
  }
  if (CHUNKS == 4) {
    return row * 4 + (chunk ^ ((row >> 1) & 3));
  }
  return row * 2 + (chunk ^ ((row >> 2) & 1));
}
