#pragma once

// Vectors in panels of WIDTH floats, by groups of THREADS threads: each thread owns four neighbours
// of a panel. Group g of G takes the panels g, g + G, ...

typedef Pack<float, 4> Four;

// Four neighbours of a column: unlike what a product may give, these lie on their alignment.
__device__ __forceinline__ Four load_four(const float* from) {
  return *reinterpret_cast<const Four*>(from);
}

__device__ __forceinline__ void store_four(float* to, Four values) {
  *reinterpret_cast<Four*>(to) = values;
}

// Sum over all threads of a group, in a fixed order, which each of them receives.
template <int THREADS>
__device__ __forceinline__ float sum_group(float value) {
  __shared__ float sums[THREADS / 32];
  value = sum_lanes<1, 32>(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    sums[threadIdx.x / 32] = value;
  }
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) {
    sum += sums[w];
  }
  return sum;
}

// Sum of up to THREADS parts.
template <int THREADS>
__device__ __forceinline__ float sum_parts(const float* parts, int count) {
  return sum_group<THREADS>(threadIdx.x < count ? parts[threadIdx.x] : 0.0f);
}
