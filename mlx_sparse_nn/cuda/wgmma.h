#pragma once

// Hopper's asynchronous products of tiles in shared memory by a warpgroup, 128 threads. See
// "Asynchronous Warpgroup Level Matrix Instructions" in NVIDIA's PTX ISA.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define ACC8(acc, i)                                                                    \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), \
      "+f"(acc[i + 5]), "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define ACC32(acc, i) ACC8(acc, i), ACC8(acc, i + 8), ACC8(acc, i + 16), ACC8(acc, i + 24)

// Describe a tile from a 1024-byte boundary on. Its rows are 128 bytes, with 16-byte chunks
// permuted by swizzle<8>. Groups of 8 rows follow one another, and slabs of 128 bytes lie `slab`
// bytes apart.
template <typename T>
__device__ __forceinline__ unsigned long long describe(const T* tile, int slab) {
  const unsigned long long address = (unsigned)__cvta_generic_to_shared(tile);
  const unsigned long long lead = (unsigned)slab >> 4;
  return (address & 0x3ffff) >> 4 | lead << 16 | 64ull << 32 | 1ull << 62;
}

// Describe what lies `count` values of 16 bits, a multiple of 8, further on in the same tile.
__device__ __forceinline__ unsigned long long advance(unsigned long long tile, int count) {
  return (tile & 0xffffffff00000000ull) | ((unsigned)tile + count / 8);
}

// acc (64 x COLS, float32) += a (64 x 16) b (16 x COLS). The contraction runs along the rows of
// a tile, or across them where A_ACROSS or B_ACROSS is 1.
template <typename T, int COLS, int A_ACROSS, int B_ACROSS>
struct Warpgroup;

#define WARPGROUP_64(T, TYPE)                                                               \
  template <int A_ACROSS, int B_ACROSS>                                                     \
  struct Warpgroup<T, 64, A_ACROSS, B_ACROSS> {                                             \
    __device__ __forceinline__ static void multiply(float (&acc)[32], unsigned long long a, \
                                                    unsigned long long b) {                 \
      asm volatile(                                                                         \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                        \
          "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                       \
          " "                                                                               \
          "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "         \
          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "     \
          "%31}, %32, %33, p, 1, 1, %34, %35;\n}\n"                                         \
          : ACC32(acc, 0)                                                                   \
          : "l"(a), "l"(b), "n"(A_ACROSS), "n"(B_ACROSS));                                  \
    }                                                                                       \
  }

#define WARPGROUP_128(T, TYPE)                                                              \
  template <int A_ACROSS, int B_ACROSS>                                                     \
  struct Warpgroup<T, 128, A_ACROSS, B_ACROSS> {                                            \
    __device__ __forceinline__ static void multiply(float (&acc)[64], unsigned long long a, \
                                                    unsigned long long b) {                 \
      asm volatile(                                                                         \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                        \
          "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE                      \
          " "                                                                               \
          "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "         \
          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, "     \
          "%31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "     \
          "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, "     \
          "%61, %62, %63}, %64, %65, p, 1, 1, %66, %67;\n}\n"                               \
          : ACC32(acc, 0), ACC32(acc, 32)                                                   \
          : "l"(a), "l"(b), "n"(A_ACROSS), "n"(B_ACROSS));                                  \
    }                                                                                       \
  }

#define WARPGROUP_256(T, TYPE)                                                               \
  template <int A_ACROSS, int B_ACROSS>                                                      \
  struct Warpgroup<T, 256, A_ACROSS, B_ACROSS> {                                             \
    __device__ __forceinline__ static void multiply(float (&acc)[128], unsigned long long a, \
                                                    unsigned long long b) {                  \
      asm volatile(                                                                          \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                         \
          "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE                       \
          " "                                                                                \
          "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, "           \
          "%30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "           \
          "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, "           \
          "%58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, "           \
          "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, "           \
          "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, "           \
          "%100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "         \
          "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, "         \
          "%124, %125, %126, %127}, %128, "                                                  \
          "%129, p, 1, 1, %130, %131;\n}\n"                                                  \
          : ACC32(acc, 0), ACC32(acc, 32), ACC32(acc, 64), ACC32(acc, 96)                    \
          : "l"(a), "l"(b), "n"(A_ACROSS), "n"(B_ACROSS));                                   \
    }                                                                                        \
  }

WARPGROUP_64(__nv_bfloat16, "bf16");
WARPGROUP_64(__half, "f16");
WARPGROUP_128(__nv_bfloat16, "bf16");
WARPGROUP_128(__half, "f16");
WARPGROUP_256(__nv_bfloat16, "bf16");
WARPGROUP_256(__half, "f16");

// Have sums in their registers from here on. The compiler may move their first values into the loop
// of products that follows, and these would wait for one another.
template <int COUNT>
__device__ __forceinline__ void hold_sums(float (&sums)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    asm volatile("" : "+f"(sums[i])::"memory");
  }
}

// Order what this warpgroup wrote to registers before the products that follow.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Wait until at most COUNT of the last committed groups of products are under way.
template <int COUNT>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(COUNT) : "memory");
}

// Make what this thread copied to shared memory visible to products.
__device__ __forceinline__ void show_copies() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
