// The block-row of stored block j: the last one that begins at j or before it. A whole simdgroup
// searches together, 32 block-rows at a time; each of its lanes receives the same.
template <typename Pointer>
METAL_FUNC int search_row(Pointer indptr, const int R, const int j, const int lane) {
  int low = 0;
  int high = R;  // it is one of low, ..., high - 1
  while (high - low > 1) {
    const int step = (high - low + 31) / 32;
    const int ahead = lane * step;
    const bool begins = ahead < high - low && indptr[low + ahead] <= j;
    const int found = simd_sum(begins ? 1 : 0);
    high = low + min(high - low, found * step);
    low += (found - 1) * step;
  }
  return low;
}
