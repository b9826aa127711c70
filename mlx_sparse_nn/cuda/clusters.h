#pragma once

// Clusters: thread blocks that run together and read one another's shared memory. See "Cluster of
// Cooperative Thread Arrays" in NVIDIA's PTX ISA. A launch says their size; see launch.py.

// Wait until all threads of the cluster are here, and see what they have written.
__device__ __forceinline__ void sync_cluster() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;\n" ::: "memory");
}

// Four floats in the shared memory of thread block `rank` of the cluster, where p lies in this one.
__device__ __forceinline__ float4 load_shared(const float* p, int rank) {
  unsigned address;
  float4 value;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(p)), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// Add up the sums of a cluster's CLUSTER thread blocks, and store them. Each has `sums` of ROWS x
// WIDTH, with rows STRIDE apart, of the same place of y, of which `rows` rows and `cols` columns
// are there. THREADS threads of each store its share of the rows: the bias, then all sums in order.
template <typename T, int CLUSTER, int WIDTH, int STRIDE, int THREADS>
__device__ __forceinline__ void store_sums(T* y, size_t width, const float* sums, const T* bias,
                                           int rows, int cols) {
  constexpr int FOURS = WIDTH / 4;
  const int rank = blockIdx.x % CLUSTER;
  const int end = rows * (rank + 1) / CLUSTER * FOURS;
  for (int i = rows * rank / CLUSTER * FOURS + threadIdx.x; i < end; i += THREADS) {
    const int row = i / FOURS;
    const int col = i % FOURS * 4;
    float4 of[CLUSTER];
#pragma unroll
    for (int other = 0; other < CLUSTER; other++) {
      of[other] = load_shared(sums + row * STRIDE + col, (rank + other) % CLUSTER);
    }
    if (col < cols) {
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (bias) {
        const T* b = bias + col;
        sum = make_float4(float(b[0]), float(b[1]), float(b[2]), float(b[3]));
      }
#pragma unroll
      for (int other = 0; other < CLUSTER; other++) {
        sum.x += of[other].x;
        sum.y += of[other].y;
        sum.z += of[other].z;
        sum.w += of[other].w;
      }
      T* place = y + row * width + col;
      if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float4*>(place) = sum;
      } else {
        *reinterpret_cast<uint2*>(place) =
            make_uint2(pack2(T(), sum.x, sum.y), pack2(T(), sum.z, sum.w));
      }
    }
  }
}
