#pragma once

// Tensor-core products by a warp, of fragments from shared memory. See "Warp Level Matrix
// Multiply-Accumulate Instructions" in NVIDIA's PTX ISA.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <bool TRANS, typename T>
__device__ __forceinline__ void load_matrix4(unsigned (&fragment)[4], const T* p) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(p);
  if (TRANS) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address));
  }
}

template <bool TRANS, typename T>
__device__ __forceinline__ void load_matrix2(unsigned (&fragment)[2], const T* p) {
  const unsigned address = (unsigned)__cvta_generic_to_shared(p);
  if (TRANS) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(address));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(fragment[0]), "=r"(fragment[1])
                 : "r"(address));
  }
}

// Transpose an 8 x 8 tile of 16 bits, of which each lane holds two neighbours.
__device__ __forceinline__ unsigned transpose_tile(unsigned pair) {
  unsigned transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// Round floats to the nearest TF32, or the one farther from 0, as tensor cores take them: they
// would cut them off. Other types are taken as they are.
__device__ __forceinline__ unsigned to_tf32(unsigned value) {
  unsigned rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(value)));
  return rounded;
}
template <typename T, int COUNT>
__device__ __forceinline__ void round_factors(unsigned (&fragment)[COUNT]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
      fragment[i] = to_tf32(fragment[i]);
    }
  }
}

// COUNT fragments of 4 x 8 floats each, one below the other, of a tile that lies with its rows
// STRIDE apart: what ldmatrix gives where it transposes 16 bits.
template <int STRIDE, int COUNT, typename T>
__device__ __forceinline__ void load_columns(unsigned (&fragment)[COUNT], const T* p) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    fragment[i] = __float_as_uint(p[(lane % 4 + 4 * i) * STRIDE + lane / 4]);
  }
}

// acc (16 x 8, float32) += a (16 x K) b (K x 8): K is 16, or 8 for float.
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[4], unsigned a0, unsigned a1, unsigned a2,
                                         unsigned a3, unsigned b0, unsigned b1);
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&acc)[4], unsigned a0, unsigned a1,
                                                        unsigned a2, unsigned a3, unsigned b0,
                                                        unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<__half>(float (&acc)[4], unsigned a0, unsigned a1,
                                                 unsigned a2, unsigned a3, unsigned b0,
                                                 unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<float>(float (&acc)[4], unsigned a0, unsigned a1,
                                                unsigned a2, unsigned a3, unsigned b0,
                                                unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// acc (16 x 8, float32) += a (16 x 8) b (8 x 8) of 16 bits.
template <typename T>
__device__ __forceinline__ void multiply_half(float (&acc)[4], unsigned a0, unsigned a1,
                                              unsigned b0);
template <>
__device__ __forceinline__ void multiply_half<__nv_bfloat16>(float (&acc)[4], unsigned a0,
                                                             unsigned a1, unsigned b0) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(b0));
}
template <>
__device__ __forceinline__ void multiply_half<__half>(float (&acc)[4], unsigned a0, unsigned a1,
                                                      unsigned b0) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a0), "r"(a1), "r"(b0));
}
