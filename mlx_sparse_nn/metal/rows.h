// Which block-row a group of stored blocks is of, for kernels whose groups share out each
// block-row.

// The last of R block-rows r whose first group is not after `group`, which is number
// indptr[r] CUTS / SHARE + r: enough for groups of SHARE pieces, CUTS a block, whatever the length
// of the rows. A whole simdgroup looks at 32 block-rows at once: two loads in turn up to R = 1024.
template <int CUTS, int SHARE, typename Pointer>
METAL_FUNC int row_of_group(Pointer indptr, const int R, const int group, const int lane) {
  int low = 0;
  int count = R;  // it is one of low, ..., low + count - 1
  while (count > 1) {
    const int step = (count + 31) / 32;
    const int r = low + min(lane * step, count - 1);
    const bool begins = lane * step < count && indptr[r] * CUTS / SHARE + r <= group;
    const int ahead = (simd_sum(begins ? 1 : 0) - 1) * step;
    low += ahead;
    count = min(step, count - ahead);
  }
  return low;
}
