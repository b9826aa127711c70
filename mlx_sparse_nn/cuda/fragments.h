// Hopper's asynchronous products by a warpgroup whose first factor lies in registers, as fragments
// of mma.h: warp w of the four has rows 16 w to 16 w + 15 of it. The second factor lies in shared
// memory, as wgmma.h describes it.

// acc (64 x COLS, float32) += a (64 x K) b (K x COLS): K is 16, or 8 for float. The contraction
// runs along the rows of the tile of b, or across them where ACROSS is 1, which that of floats
// cannot.
template <typename T, int COLS, int ACROSS>
struct FragmentProduct;

#define SUMS_32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SUMS_64                                                                                 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_128                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "  \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "  \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_256                                                                         \
  SUMS_128                                                                               \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "   \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "     \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "     \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127"
// `TYPES` are those of factors and their depth, and `END` is what follows the scales.
#define WARPGROUP_32_ROWS(T, ACROSS, DEPTH, TYPES, END)                                       \
  template <>                                                                                 \
  struct FragmentProduct<T, 32, ACROSS> {                                                     \
    __device__ __forceinline__ static void multiply(float (&acc)[16], const unsigned (&a)[4], \
                                                    unsigned long long b) {                   \
      asm volatile(                                                                           \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                          \
          "wgmma.mma_async.sync.aligned.m64n32" DEPTH ".f32." TYPES " " SUMS_32               \
          "}, {%16, %17, %18, %19}, %20, p, 1, 1" END ";\n}\n"                                \
          : ACC8(acc, 0), ACC8(acc, 8)                                                        \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                              \
    }                                                                                         \
  }
#define WARPGROUP_64_ROWS(T, ACROSS, DEPTH, TYPES, END)                                       \
  template <>                                                                                 \
  struct FragmentProduct<T, 64, ACROSS> {                                                     \
    __device__ __forceinline__ static void multiply(float (&acc)[32], const unsigned (&a)[4], \
                                                    unsigned long long b) {                   \
      asm volatile(                                                                           \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                          \
          "wgmma.mma_async.sync.aligned.m64n64" DEPTH ".f32." TYPES " " SUMS_64               \
          "}, {%32, %33, %34, %35}, %36, p, 1, 1" END ";\n}\n"                                \
          : ACC32(acc, 0)                                                                     \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                              \
    }                                                                                         \
  }
#define WARPGROUP_128_ROWS(T, ACROSS, DEPTH, TYPES, END)                                      \
  template <>                                                                                 \
  struct FragmentProduct<T, 128, ACROSS> {                                                    \
    __device__ __forceinline__ static void multiply(float (&acc)[64], const unsigned (&a)[4], \
                                                    unsigned long long b) {                   \
      asm volatile(                                                                           \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                          \
          "wgmma.mma_async.sync.aligned.m64n128" DEPTH ".f32." TYPES " " SUMS_128             \
          "}, {%64, %65, %66, %67}, %68, p, 1, 1" END ";\n}\n"                                \
          : ACC32(acc, 0), ACC32(acc, 32)                                                     \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                              \
    }                                                                                         \
  }
#define WARPGROUP_256_ROWS(T, ACROSS, DEPTH, TYPES, END)                                       \
  template <>                                                                                  \
  struct FragmentProduct<T, 256, ACROSS> {                                                     \
    __device__ __forceinline__ static void multiply(float (&acc)[128], const unsigned (&a)[4], \
                                                    unsigned long long b) {                    \
      asm volatile(                                                                            \
          "{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\n"                                           \
          "wgmma.mma_async.sync.aligned.m64n256" DEPTH ".f32." TYPES " " SUMS_256              \
          "}, {%128, %129, %130, %131}, %132, p, 1, 1" END ";\n}\n"                            \
          : ACC32(acc, 0), ACC32(acc, 32), ACC32(acc, 64), ACC32(acc, 96)                      \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                               \
    }                                                                                          \
  }
WARPGROUP_32_ROWS(float, 0, "k8", "tf32.tf32", "");
WARPGROUP_32_ROWS(__nv_bfloat16, 0, "k16", "bf16.bf16", ", 0");
WARPGROUP_32_ROWS(__half, 0, "k16", "f16.f16", ", 0");
WARPGROUP_64_ROWS(float, 0, "k8", "tf32.tf32", "");
WARPGROUP_64_ROWS(__nv_bfloat16, 0, "k16", "bf16.bf16", ", 0");
WARPGROUP_64_ROWS(__half, 0, "k16", "f16.f16", ", 0");
WARPGROUP_128_ROWS(float, 0, "k8", "tf32.tf32", "");
WARPGROUP_128_ROWS(__nv_bfloat16, 0, "k16", "bf16.bf16", ", 0");
WARPGROUP_128_ROWS(__nv_bfloat16, 1, "k16", "bf16.bf16", ", 1");
WARPGROUP_128_ROWS(__half, 0, "k16", "f16.f16", ", 0");
WARPGROUP_128_ROWS(__half, 1, "k16", "f16.f16", ", 1");
WARPGROUP_256_ROWS(float, 0, "k8", "tf32.tf32", "");
WARPGROUP_256_ROWS(__nv_bfloat16, 0, "k16", "bf16.bf16", ", 0");
WARPGROUP_256_ROWS(__half, 0, "k16", "f16.f16", ", 0");

// Transpose a tile of 8 x 8 values of 16 bits, two neighbours of a row in each lane of a warp.
__device__ __forceinline__ unsigned transpose_tile(unsigned pair) {
  unsigned transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

// Store sums of a warpgroup whose columns are rows of `y`, `width` elements apart, of which `rows`
// are there: of its 64 rows, this warp's from `o` on, as elements of y up to `end`.
template <typename T, int COLS>
__device__ __forceinline__ void store_across(T* y, size_t width, int rows, int o, int end,
                                             const float (&acc)[COLS / 2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < COLS / 8; i += 2) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int e = 0; e < 8; e++) {
        const int row = 8 * (i + e / 4) + lane % 4 * 2 + e % 2;
        const int col = o + e / 2 % 2 * 8 + lane / 4;
        if (row < rows && col < end) {
          y[row * width + col] = acc[4 * i + e];
        }
      }
    } else {
      unsigned pairs[4];
#pragma unroll
      for (int q = 0; q < 4; q++) {
        pairs[q] = transpose_tile(pack2(T(), acc[4 * i + 2 * q], acc[4 * i + 2 * q + 1]));
      }
      const uint4 columns = gather_tile(pairs);
      const int row = 8 * (i + lane % 4 / 2) + lane / 4;
      const int col = o + lane % 2 * 8;
      if (row < rows && col < end) {
        *reinterpret_cast<uint4*>(y + row * width + col) = columns;
      }
    }
  }
}

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
