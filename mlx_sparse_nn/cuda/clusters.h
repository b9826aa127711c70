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
