#pragma once

// Copies of boxes, 64 columns of some rows, by the tensor memory accelerator: a thread begins one.
// See "Tensor Map" and "cp.async.bulk.tensor" in NVIDIA's PTX ISA.

constexpr int MAP = 32;  // integers of a map, from a 128-byte boundary on

// Describe a matrix of 16-bit values in device memory, whose boxes have `box_rows` rows, at most
// 256. A warp makes the map in `shared`, and puts it to `map`, in device memory, for its own
// copies.
template <typename T>
__device__ __forceinline__ void make_map(int* map, int* shared, const T* matrix, int rows, int cols,
                                         int box_rows) {
  const unsigned at = (unsigned)__cvta_generic_to_shared(shared);
  shared[threadIdx.x % 32] = 0;
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
#define FIELD(name, type) "tensormap.replace.tile." name ".shared::cta.b1024." type " [%0], "
    asm volatile(FIELD("global_address", "b64") "%1;" ::"r"(at), "l"(matrix) : "memory");
    asm volatile(FIELD("rank", "b32") "1;" ::"r"(at) : "memory");
    asm volatile(FIELD("box_dim", "b32") "0, 64;" ::"r"(at) : "memory");
    asm volatile(FIELD("box_dim", "b32") "1, %1;" ::"r"(at), "r"(box_rows) : "memory");
    asm volatile(FIELD("global_dim", "b32") "0, %1;" ::"r"(at), "r"(cols) : "memory");
    asm volatile(FIELD("global_dim", "b32") "1, %1;" ::"r"(at), "r"(rows) : "memory");
    asm volatile(FIELD("global_stride", "b64") "0, %1;" ::"r"(at), "l"((size_t)cols * 2)
                 : "memory");
    asm volatile(FIELD("element_stride", "b32") "0, 1;" ::"r"(at) : "memory");
    asm volatile(FIELD("element_stride", "b32") "1, 1;" ::"r"(at) : "memory");
    asm volatile(FIELD("elemtype", "b32") "1;" ::"r"(at) : "memory");           // 16 bits
    asm volatile(FIELD("interleave_layout", "b32") "0;" ::"r"(at) : "memory");  // none
    asm volatile(FIELD("swizzle_mode", "b32") "3;" ::"r"(at) : "memory");       // swizzle<8>
    asm volatile(FIELD("fill_mode", "b32") "0;" ::"r"(at) : "memory");          // zeros
  }
  __syncwarp();
  asm volatile(
      "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned "
      "[%0], [%1], 128;" ::"l"(map),
      "r"(at)
      : "memory");
  asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"(map) : "memory");
}

// Arrive at a barrier whose phase also waits for `bytes` of the boxes that are copied from now on.
__device__ __forceinline__ void arrive_before(unsigned long long* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   (unsigned)__cvta_generic_to_shared(barrier)),
               "r"(bytes)
               : "memory");
}

// Copy the box from (row, col) on, zeros beyond the matrix, to a 1024-byte boundary: rows of 128
// bytes, with 16-byte chunks permuted by swizzle<8>.
template <typename T>
__device__ __forceinline__ void copy_box(T* dst, const int* map, int row, int col,
                                         unsigned long long* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"((unsigned)__cvta_generic_to_shared(dst)),
      "l"(map), "r"(col), "r"(row), "r"((unsigned)__cvta_generic_to_shared(barrier))
      : "memory");
}

// Show the barriers that this thread has made to such copies.
__device__ __forceinline__ void show_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
