// What the kernels share: 16-byte copies into shared memory, fragments, and sums over lanes.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Copy 16 bytes from device to shared memory: asynchronously where the source is aligned, which a
// slice of another array need not be. Zeros where it is not `valid`.
template <typename T>
__device__ __forceinline__ void copy16(T* dst, const T* src, bool aligned, bool valid) {
  if (aligned) {
    const unsigned address = (unsigned)__cvta_generic_to_shared(dst);
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(src), "r"(bytes));
  } else {
    for (int i = 0; i < 16 / (int)sizeof(T); i++) {
      dst[i] = valid ? src[i] : T(0.0f);
    }
  }
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;");
}

// Wait until at most N of the last committed groups of copies are under way.
template <int N>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N));
}

// The place of 16-byte chunk `chunk` of row `row` in a tile whose rows have CHUNKS of them, permuted so
// that the 8 rows that ldmatrix reads together lie in different banks.
template <int CHUNKS>
__device__ __forceinline__ int swizzle(int row, int chunk) {
  if (CHUNKS >= 8) {
    return row * CHUNKS + (chunk ^ (row & 7));
  }
  if (CHUNKS == 4) {
    return row * 4 + (chunk ^ ((row >> 1) & 3));
  }
  if (CHUNKS == 2) {
    return row * 2 + (chunk ^ ((row >> 2) & 1));
  }
  return row;
}

template <bool TRANS, typename T>
__device__ __forceinline__ void load_matrix4(unsigned (&r)[4], const T* p) {
  const unsigned a = (unsigned)__cvta_generic_to_shared(p);
  if (TRANS) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a));
  }
}

template <bool TRANS, typename T>
__device__ __forceinline__ void load_matrix2(unsigned (&r)[2], const T* p) {
  const unsigned a = (unsigned)__cvta_generic_to_shared(p);
  if (TRANS) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(a));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(a));
  }
}

// c (16 x 8, float32) += a (16 x 16) b (16 x 8).
template <typename T>
__device__ __forceinline__ void multiply(
    float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1);
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(
    float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<__half>(
    float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Store two neighbouring elements, the first at an even place.
__device__ __forceinline__ void store2(__nv_bfloat16* p, float a, float b) {
  *reinterpret_cast<__nv_bfloat162*>(p) = __floats2bfloat162_rn(a, b);
}
__device__ __forceinline__ void store2(__half* p, float a, float b) {
  *reinterpret_cast<__half2*>(p) = __floats2half2_rn(a, b);
}

// Sum over the LANES neighbouring lanes of a warp; every one receives it.
template <int LANES>
__device__ __forceinline__ float sum_lanes(float value) {
#pragma unroll
  for (int bit = 1; bit < LANES; bit *= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, bit);
  }
  return value;
}
