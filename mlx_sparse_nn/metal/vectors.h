// Vectors in panels of WIDTH floats, by groups of THREADS threads: each thread owns four neighbours
// of a panel. Group g of G takes the panels g, g + G, ...

// Sum over all threads of a group, in a fixed order, which each of them receives.
template <int THREADS>
METAL_FUNC float sum_group(float value, threadgroup float* sums, const uint l) {
  value = sum_lanes<1, 32>(value);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (l % 32 == 0) {
    sums[l / 32] = value;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float sum = 0.0f;
  for (int w = 0; w < THREADS / 32; w++) {
    sum += sums[w];
  }
  return sum;
}
