#pragma once

// The block-row of stored block j: the last one that begins at j or before it. A whole warp
// searches together, 32 block-rows at a time; each of its lanes receives the same.
__device__ __forceinline__ int search_row(const int* indptr, const int R, const int j,
                                          const int lane) {
  int low = 0;
  int high = R;  // it is one of low, ..., high - 1
  while (high - low > 1) {
    const int step = (high - low + 31) / 32;
    const int ahead = lane * step;
    const bool begins = ahead < high - low && indptr[low + ahead] <= j;
    const int found = __popc(__ballot_sync(0xffffffffu, begins));
    high = low + min(high - low, found * step);
    low += (found - 1) * step;
  }
  return low;
}
