#pragma once

// Hopper's asynchronous products by a warpgroup whose first factor lies in registers, as fragments
// of mma.h: warp w of the four has rows 16 w to 16 w + 15 of it. The second factor lies in shared
// memory, as wgmma.h describes it.

// acc (64 x COLS, float32) += a (64 x K) b (K x COLS): K is 16, or 8 for float. The contraction
// runs along the rows of the tile of b, or across them where ACROSS is 1, which that of floats
// cannot.
template <typename T, int COLS, int ACROSS>
struct FragmentProduct;

#define SUMS_16 "{%0, %1, %2, %3, %4, %5, %6, %7"
#define SUMS_24 SUMS_16 ", %8, %9, %10, %11"
#define SUMS_32 SUMS_24 ", %12, %13, %14, %15"
#define SUMS_48 SUMS_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define SUMS_64 SUMS_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_96 \
  SUMS_64 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define SUMS_128 \
  SUMS_96 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ACC4(acc, i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3])
#define SUMS_OF_16(acc) ACC8(acc, 0)
#define SUMS_OF_24(acc) ACC8(acc, 0), ACC4(acc, 8)
#define SUMS_OF_32(acc) ACC8(acc, 0), ACC8(acc, 8)
#define SUMS_OF_48(acc) ACC8(acc, 0), ACC8(acc, 8), ACC8(acc, 16)
#define SUMS_OF_64(acc) ACC32(acc, 0)
#define SUMS_OF_96(acc) ACC32(acc, 0), ACC8(acc, 32), ACC8(acc, 40)
#define SUMS_OF_128(acc) ACC32(acc, 0), ACC32(acc, 32)
#define FACTORS_16 "}, {%8, %9, %10, %11}, %12, p, 1, 1"
#define FACTORS_24 "}, {%12, %13, %14, %15}, %16, p, 1, 1"
#define FACTORS_32 "}, {%16, %17, %18, %19}, %20, p, 1, 1"
#define FACTORS_48 "}, {%24, %25, %26, %27}, %28, p, 1, 1"
#define FACTORS_64 "}, {%32, %33, %34, %35}, %36, p, 1, 1"
#define FACTORS_96 "}, {%48, %49, %50, %51}, %52, p, 1, 1"
#define FACTORS_128 "}, {%64, %65, %66, %67}, %68, p, 1, 1"
// `END` is what follows the scales.
#define WARPGROUP_1_FACTOR(T, COLS, ACROSS, DEPTH, TYPES, END)              \
  template <>                                                               \
  struct FragmentProduct<T, COLS, ACROSS> {                                 \
    __device__ __forceinline__ static void multiply(float (&acc)[COLS / 2], \
                                                    const unsigned (&a)[4], \
                                                    unsigned long long b) { \
      asm volatile(                                                         \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                        \
          "wgmma.mma_async.sync.aligned.m64n" #COLS DEPTH ".f32." TYPES     \
          " " SUMS_##COLS FACTORS_##COLS END ";\n}\n"                       \
          : SUMS_OF_##COLS(acc)                                             \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));            \
    }                                                                       \
  }
#define WARPGROUP_1_WIDTH(COLS)                                          \
  WARPGROUP_1_FACTOR(float, COLS, 0, "k8", "tf32.tf32", "");             \
  WARPGROUP_1_FACTOR(__nv_bfloat16, COLS, 0, "k16", "bf16.bf16", ", 0"); \
  WARPGROUP_1_FACTOR(__nv_bfloat16, COLS, 1, "k16", "bf16.bf16", ", 1"); \
  WARPGROUP_1_FACTOR(__half, COLS, 0, "k16", "f16.f16", ", 0");          \
  WARPGROUP_1_FACTOR(__half, COLS, 1, "k16", "f16.f16", ", 1")
WARPGROUP_1_WIDTH(16);
WARPGROUP_1_WIDTH(24);
WARPGROUP_1_WIDTH(32);
WARPGROUP_1_WIDTH(48);
WARPGROUP_1_WIDTH(64);
WARPGROUP_1_WIDTH(96);
WARPGROUP_1_WIDTH(128);

// Write a chunk of four floats of a column, `STRIDE` apart, rounded to TF32.
template <int STRIDE, typename T>
__device__ __forceinline__ void transpose_chunk(T* dst, const T* src) {
  unsigned column[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    column[i] = __float_as_uint(src[i * STRIDE]);
  }
  round_factors<T>(column);
  *reinterpret_cast<uint4*>(dst) = make_uint4(column[0], column[1], column[2], column[3]);
}
