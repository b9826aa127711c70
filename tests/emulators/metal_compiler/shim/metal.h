// Metal as plain C++, for a compiler's output only: nothing here runs. A host's compiler sees
// simdgroup operations and barriers as opaque functions. For AMD's GPUs, whose compiler is LLVM as
// Apple's is, barriers and loads of matrices are what that GPU has, and a matrix product is one
// instruction of no meaning.
#pragma once

using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long;
using uint64_t = unsigned long;
using size_t = unsigned long;
using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using half = _Float16;
using float16_t = half;
using bfloat = __bf16;
using bfloat16_t = bfloat;

#define INLINE inline __attribute__((always_inline))
#define METAL_FUNC INLINE
#define CONVERGENT __attribute__((convergent))

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

#define VECTORS_OF(T, N)  \
  using T##N = vec<T, N>; \
  typedef T packed_##T##N __attribute__((ext_vector_type(N), aligned(sizeof(T))));
#define VECTORS(T) \
  VECTORS_OF(T, 2) \
  VECTORS_OF(T, 3) \
  VECTORS_OF(T, 4)
VECTORS(char)
VECTORS(uchar)
VECTORS(short)
VECTORS(ushort)
VECTORS(int)
VECTORS(uint)
VECTORS(long)
VECTORS(ulong)
VECTORS(half)
VECTORS(bfloat)
VECTORS(float)
#undef VECTORS
#undef VECTORS_OF

// Every constructor of a vector: from a scalar, from a vector, from its elements.
template <class T>
inline constexpr bool is_vector = false;
template <class T, int N>
inline constexpr bool is_vector<vec<T, N>> = true;
template <class V, class U>
INLINE V make(U x) {
  if constexpr (is_vector<U>) {
    return __builtin_convertvector(x, V);
  } else {
    return V(x);
  }
}
template <class V, class U0, class U1, class... U>
INLINE V make(U0 x0, U1 x1, U... x) {
  using T = __remove_cvref(decltype(V{}[0]));
  return V{T(x0), T(x1), T(x)...};
}

template <class To, class From>
INLINE To as_type(From from) {
  return __builtin_bit_cast(To, from);
}

template <class T, class U>
inline constexpr bool is_same_v = false;
template <class T>
inline constexpr bool is_same_v<T, T> = true;
template <bool, class T, class>
struct conditional {
  using type = T;
};
template <class T, class U>
struct conditional<false, T, U> {
  using type = U;
};
template <bool c, class T, class U>
using conditional_t = typename conditional<c, T, U>::type;

#define MINMAX(T)                                  \
  INLINE T min(T a, T b) { return b < a ? b : a; } \
  INLINE T max(T a, T b) { return a < b ? b : a; } \
  INLINE T clamp(T x, T low, T high) { return min(max(x, low), high); }
MINMAX(short)
MINMAX(ushort)
MINMAX(int)
MINMAX(uint)
MINMAX(long)
MINMAX(ulong)
MINMAX(half)
MINMAX(float)
#undef MINMAX
INLINE float abs(float x) { return __builtin_fabsf(x); }
INLINE int abs(int x) { return x < 0 ? -x : x; }
INLINE float exp(float x) { return __builtin_expf(x); }
INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
INLINE uint popcount(uint x) { return uint(__builtin_popcount(x)); }
INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
INLINE half fma(half a, half b, half c) { return half(fma(float(a), float(b), float(c))); }
template <class T, int N>
INLINE vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  return __builtin_elementwise_fma(a, b, c);
}
template <class T, int N>
INLINE T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  _Pragma("unroll") for (int i = 1; i < N; i++) sum = fma(a[i], b[i], sum);
  return sum;
}
template <class T>
INLINE T select(T if_false, T if_true, bool condition) {
  return condition ? if_true : if_false;
}

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
INLINE mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }

#ifdef __AMDGCN__
INLINE uint lane() { return __builtin_amdgcn_mbcnt_lo(~0u, 0u); }
INLINE void threadgroup_barrier(mem_flags) {
  __builtin_amdgcn_fence(__ATOMIC_SEQ_CST, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_SEQ_CST, "workgroup");
}
INLINE void simdgroup_barrier(mem_flags) { asm volatile("; SIMD BARRIER" ::: "memory"); }
template <class T>
INLINE T simd_shuffle_xor(T x, ushort mask) {
  T moved;
  asm volatile("; SHUFFLE %0 %1 %2" : "=v"(moved) : "v"(x), "v"(int(mask)));
  return moved;
}
#else
extern "C" CONVERGENT __attribute__((const)) uint lane();
extern "C" CONVERGENT void opaque_barrier(uint flags);
extern "C" CONVERGENT float opaque_shuffle(float, uint);
INLINE void threadgroup_barrier(mem_flags flags) { opaque_barrier(uint(flags)); }
INLINE void simdgroup_barrier(mem_flags flags) { opaque_barrier(uint(flags)); }
template <class T>
INLINE T simd_shuffle_xor(T x, ushort mask) {
  return T(opaque_shuffle(float(x), mask));
}
#endif

template <class T>
INLINE T simd_sum(T x) {
  _Pragma("unroll") for (ushort step = 1; step < 32; step *= 2) x += simd_shuffle_xor(x, step);
  return x;
}
#define SHUFFLE(name)                       \
  template <class T>                        \
  INLINE T name(T x, ushort lane_or_by) {   \
    return simd_shuffle_xor(x, lane_or_by); \
  }
SHUFFLE(simd_shuffle)
SHUFFLE(simd_shuffle_down)
SHUFFLE(simd_shuffle_up)
SHUFFLE(simd_broadcast)
#undef SHUFFLE

// Each lane holds two neighbours of a row, in the layout of Apple's GPUs.
template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "simdgroup_matrix is 8 x 8");
  vec<T, 2> elements;

  INLINE vec<T, 2>& thread_elements() { return elements; }
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <class T, int R, int C>
INLINE simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T x) {
  return {{x, x}};
}

INLINE int matrix_row() { return ((lane() / 4) & 4) + (lane() / 2) % 4; }
INLINE int matrix_column() { return ((lane() / 4) & 2) * 2 + (lane() % 2) * 2; }

template <class P>
INLINE P matrix_place(P p, int stride, ulong2 origin, bool transpose) {
  const int row = matrix_row(), column = matrix_column();
  return p + (int(origin.y) * stride + int(origin.x)) +
         (transpose ? column * stride + row : row * stride + column);
}
template <class T, class P>
INLINE void simdgroup_load(simdgroup_matrix<T, 8, 8>& d, P src, ulong stride = 8,
                           ulong2 origin = ulong2{0, 0}, bool transpose = false) {
  const T* p = matrix_place(src, stride, origin, transpose);
  d.elements = transpose ? vec<T, 2>{p[0], p[stride]} : *(const vec<T, 2>*)p;
}
template <class T, class P>
INLINE void simdgroup_store(simdgroup_matrix<T, 8, 8> a, P dst, ulong stride = 8,
                            ulong2 origin = ulong2{0, 0}, bool transpose = false) {
  T* p = matrix_place(dst, stride, origin, transpose);
  if (transpose) {
    p[0] = a.elements[0];
    p[stride] = a.elements[1];
  } else {
    *(vec<T, 2>*)p = a.elements;
  }
}

#ifndef __AMDGCN__
extern "C" CONVERGENT float2 opaque_product_f(float2, float2, float2);
extern "C" CONVERGENT float2 opaque_product_h(uint, uint, float2);
#endif
template <class D, class A, class B, class C>
INLINE void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, simdgroup_matrix<A, 8, 8> a,
                                          simdgroup_matrix<B, 8, 8> b,
                                          simdgroup_matrix<C, 8, 8> c) {
  float2 sum = __builtin_convertvector(c.elements, float2);
#ifdef __AMDGCN__
  if constexpr (sizeof(A) == 4) {
    asm("; PRODUCT %0 %1 %2" : "+v"(sum) : "v"(a.elements), "v"(b.elements));
  } else {
    asm("; PRODUCT %0 %1 %2" : "+v"(sum) : "v"(as_type<uint>(a)), "v"(as_type<uint>(b)));
  }
#else
  if constexpr (sizeof(A) == 4) {
    sum = opaque_product_f(a.elements, b.elements, sum);
  } else {
    sum = opaque_product_h(as_type<uint>(a), as_type<uint>(b), sum);
  }
#endif
  d.elements = __builtin_convertvector(sum, decltype(d.elements));
}

namespace fast {
using namespace metal;
}
namespace precise {
using namespace metal;
}

}  // namespace metal

using namespace metal;

// What the emulator's rewriter writes.
namespace emu {

struct device_space;
struct constant_space;
struct threadgroup_space;
template <class Space, class T>
using ptr = T*;
template <class Space, class T>
using lref = T&;
template <class P, class Space>
concept pointer_in = true;

}  // namespace emu

namespace plain {

#ifdef __AMDGCN__
#define ADDRESS_SPACE(n) __attribute__((address_space(n)))
template <class T, int ID>
INLINE T& threadgroup_variable() {
  static ADDRESS_SPACE(3) __attribute__((loader_uninitialized)) T variable;
  return *(T*)&variable;
}
#else
template <class T, int ID>
inline T threadgroup_memory;  // external: a function that is opaque may change it
template <class T, int ID>
INLINE T& threadgroup_variable() {
  return threadgroup_memory<T, ID>;
}
#endif

struct Attributes {
  uint3 dispatch_threads_per_threadgroup, grid_origin, grid_size, thread_position_in_grid,
      thread_position_in_threadgroup, threadgroup_position_in_grid, threadgroups_per_grid,
      threads_per_grid, threads_per_threadgroup;
  uint dispatch_quadgroups_per_threadgroup, dispatch_simdgroups_per_threadgroup,
      quadgroup_index_in_threadgroup, quadgroups_per_threadgroup, simdgroup_index_in_threadgroup,
      simdgroups_per_threadgroup, thread_execution_width, thread_index_in_quadgroup,
      thread_index_in_simdgroup, thread_index_in_threadgroup, threads_per_simdgroup;
};

// An argument of a kernel: whatever its parameter is.
struct Argument {
  const void* address;

  template <class T>
  INLINE operator T*() const {
    return (T*)address;
  }
  template <class T>
  INLINE operator const T&() const {
    return *(const T*)address;
  }
};

}  // namespace plain

// MLX pastes its utils.h before every custom kernel: the part of it in use.
template <class U>
struct Limits {
  static constexpr U min = U(-__builtin_inff());
  static constexpr U max = U(__builtin_inff());
};
