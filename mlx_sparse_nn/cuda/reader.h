#pragma once

// Reads an array in order, ahead of its use: the lanes of a warp hold 64 values from the last one
// read on.
struct Reader {
  const int* values;
  int base;
  int end;
  int now;
  int next;
  // Begin at `begin`; nothing from `end` on is read.
  __device__ __forceinline__ Reader(const int* values, int begin, int end)
      : values(values), base(begin), end(end) {
    now = load(begin);
    next = load(begin + 32);
  }
  // Return value `i` to all lanes of the warp, which ask together. It is the last one read, or the
  // one after it.
  __device__ __forceinline__ int at(int i) {
    if (i - base == 32) {
      base += 32;
      now = next;
      next = load(base + 32);
    }
    return __shfl_sync(0xffffffffu, now, i - base);
  }
  __device__ __forceinline__ int load(int begin) const {
    const int i = begin + threadIdx.x % 32;
    return i < end ? __ldg(values + i) : 0;
  }
};
