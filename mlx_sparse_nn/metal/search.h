// Which block-row is meant, found by a whole simdgroup together: 32 block-rows at a time, so two
// loads in turn up to R = 1024. Each lane receives the same.

// The last of R block-rows r that begin at `at` or before: at indptr[r] CUTS / SHARE + r SPARE.
template <int CUTS, int SHARE, int SPARE, typename Pointer>
METAL_FUNC int search(Pointer indptr, const int R, const int at, const int lane) {
  int low = 0;
  int count = R;  // it is one of low, ..., low + count - 1
  while (count > 1) {
    const int step = (count + 31) / 32;
    const int ahead = lane * step;
    const int r = low + min(ahead, count - 1);
    const bool begins = ahead < count && indptr[r] * CUTS / SHARE + r * SPARE <= at;
    const int found = (simd_sum(begins ? 1 : 0) - 1) * step;
    low += found;
    count = min(step, count - found);
  }
  return low;
}

// The block-row of stored block j.
template <typename Pointer>
METAL_FUNC int search_row(Pointer indptr, const int R, const int j, const int lane) {
  return search<1, 1, 0>(indptr, R, j, lane);
}

// The block-row of a group, where the groups of block-row r begin at number
// indptr[r] CUTS / SHARE + r: then there are enough for groups of SHARE pieces, CUTS a block,
// whatever the length of the rows, and at least one for each.
template <int CUTS, int SHARE, typename Pointer>
METAL_FUNC int row_of_group(Pointer indptr, const int R, const int group, const int lane) {
  return search<CUTS, SHARE, 1>(indptr, R, group, lane);
}
