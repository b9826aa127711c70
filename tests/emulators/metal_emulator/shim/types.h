// Scalar and vector types of the Metal language: 16-bit floats, vec<T, N>, bit casts, limits.
#pragma once
#include <stddef.h>
#include <stdint.h>

#define INLINE inline __attribute__((always_inline))
// The runtime tells simdgroup operations and barriers apart by their call's address: the compiler
// must not merge two of them, nor move one under another condition.
#define CONVERGENT __attribute__((convergent, nomerge))
#define COLLECTIVE INLINE CONVERGENT
#define METAL_FUNC COLLECTIVE

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using half = _Float16;
using float16_t = half;

template <class To, class From>
INLINE To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  return __builtin_bit_cast(To, from);
}

// Metal's bfloat: widens implicitly, never narrows implicitly, rounds to nearest even after each
// operation.
struct bfloat {
  uint16_t bits;

  bfloat() = default;
  INLINE explicit constexpr bfloat(float x) : bits(round(x)) {}
  INLINE constexpr operator float() const {
    return __builtin_bit_cast(float, uint32_t(bits) << 16);
  }
  // clang-format off: it reads op##= as an assignment
#define BFLOAT_OPERATOR(op)                                                                     \
  friend INLINE bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); } \
  INLINE bfloat& operator op##=(bfloat b) { return *this = *this op b; }
  // clang-format on
  BFLOAT_OPERATOR(+)
  BFLOAT_OPERATOR(-)
  BFLOAT_OPERATOR(*)
  BFLOAT_OPERATOR(/)
#undef BFLOAT_OPERATOR
  friend INLINE bfloat operator-(bfloat a) { return bfloat(-float(a)); }

 private:
  static INLINE constexpr uint16_t round(float x) {
    uint32_t u = __builtin_bit_cast(uint32_t, x);
    if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16) | 0x40;  // keep a NaN a NaN
    return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
};
using bfloat16_t = bfloat;

INLINE constexpr half operator""h(long double x) { return half(x); }

namespace metal {

template <class T>
struct type_identity {
  using type = T;
};
template <class T, class U>
inline constexpr bool is_same_v = false;
template <class T>
inline constexpr bool is_same_v<T, T> = true;
template <class T>
struct remove_const {
  using type = T;
};
template <class T>
struct remove_const<const T> {
  using type = T;
};
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

template <class T, int N>
struct components;
template <class T>
struct components<T, 2> {
  T x, y;
};
template <class T>
struct components<T, 3> {
  T x, y, z;
};
template <class T>
struct components<T, 4> {
  T x, y, z, w;
};

template <class T, int N>
struct alignas(sizeof(T) * (N == 3 ? 4 : N)) vec : components<T, N> {
  vec() = default;
  INLINE vec(T all) {
    for (int i = 0; i < N; i++) (*this)[i] = all;
  }
  INLINE vec(T x, T y)
    requires(N == 2)
      : components<T, N>{x, y} {}
  INLINE vec(T x, T y, T z)
    requires(N == 3)
      : components<T, N>{x, y, z} {}
  INLINE vec(T x, T y, T z, T w)
    requires(N == 4)
      : components<T, N>{x, y, z, w} {}
  INLINE vec(vec<T, 2> a, vec<T, 2> b)
    requires(N == 4)
      : components<T, N>{a.x, a.y, b.x, b.y} {}
  template <class U>
    requires(!is_same_v<T, U>)
  INLINE explicit vec(const vec<U, N>& other) {
    for (int i = 0; i < N; i++) (*this)[i] = T(other[i]);
  }
  INLINE T& operator[](int i) { return reinterpret_cast<T*>(this)[i]; }
  INLINE const T& operator[](int i) const { return reinterpret_cast<const T*>(this)[i]; }
};

// packed_vec has the alignment of its elements: packed_float3 is 12 bytes.
template <class T, int N>
struct packed_vec : components<T, N> {
  packed_vec() = default;
  INLINE packed_vec(const vec<T, N>& v) : components<T, N>(v) {}
  INLINE operator vec<T, N>() const {
    vec<T, N> v;
    for (int i = 0; i < N; i++) v[i] = (*this)[i];
    return v;
  }
  INLINE T& operator[](int i) { return reinterpret_cast<T*>(this)[i]; }
  INLINE const T& operator[](int i) const { return reinterpret_cast<const T*>(this)[i]; }
};

// clang-format off: it reads op##= as an assignment
#define VEC_OPERATOR(op)                                                              \
  template <class T, int N>                                                           \
  INLINE vec<T, N> operator op(vec<T, N> a, const vec<T, N>& b) {                     \
    for (int i = 0; i < N; i++) a[i] = a[i] op b[i];                                  \
    return a;                                                                         \
  }                                                                                   \
  template <class T, int N>                                                           \
  INLINE vec<T, N> operator op(const vec<T, N>& a, typename type_identity<T>::type b) { \
    return a op vec<T, N>(b);                                                         \
  }                                                                                   \
  template <class T, int N>                                                           \
  INLINE vec<T, N> operator op(typename type_identity<T>::type a, const vec<T, N>& b) { \
    return vec<T, N>(a) op b;                                                         \
  }                                                                                   \
  template <class T, int N>                                                           \
  INLINE vec<T, N>& operator op##=(vec<T, N>& a, const vec<T, N>& b) {                \
    return a = a op b;                                                                \
  }                                                                                   \
  template <class T, int N>                                                           \
  INLINE vec<T, N>& operator op##=(vec<T, N>& a, typename type_identity<T>::type b) { \
    return a = a op vec<T, N>(b);                                                     \
  }
// clang-format on
VEC_OPERATOR(+)
VEC_OPERATOR(-)
VEC_OPERATOR(*)
VEC_OPERATOR(/)
VEC_OPERATOR(%)
VEC_OPERATOR(&)
VEC_OPERATOR(|)
VEC_OPERATOR(^)
VEC_OPERATOR(<<)
VEC_OPERATOR(>>)
#undef VEC_OPERATOR

template <class T, int N>
INLINE vec<T, N> operator-(vec<T, N> a) {
  for (int i = 0; i < N; i++) a[i] = -a[i];
  return a;
}

#define VEC_COMPARISON(op)                                                  \
  template <class T, int N>                                                 \
  INLINE vec<bool, N> operator op(const vec<T, N>& a, const vec<T, N>& b) { \
    vec<bool, N> r;                                                         \
    for (int i = 0; i < N; i++) r[i] = a[i] op b[i];                        \
    return r;                                                               \
  }
VEC_COMPARISON(==)
VEC_COMPARISON(!=)
VEC_COMPARISON(<)
VEC_COMPARISON(<=)
VEC_COMPARISON(>)
VEC_COMPARISON(>=)
#undef VEC_COMPARISON

template <class T>
struct numeric_limits;
#define LIMITS(T, lowest_, min_, max_, infinity_)                 \
  template <>                                                     \
  struct numeric_limits<T> {                                      \
    static INLINE constexpr T lowest() { return T(lowest_); }     \
    static INLINE constexpr T min() { return T(min_); }           \
    static INLINE constexpr T max() { return T(max_); }           \
    static INLINE constexpr T infinity() { return T(infinity_); } \
  };
LIMITS(float, -3.40282347e38f, 1.17549435e-38f, 3.40282347e38f, __builtin_inff())
LIMITS(half, -65504.0f, 6.10351562e-5f, 65504.0f, __builtin_inff())
LIMITS(bfloat, -3.38953139e38f, 1.17549435e-38f, 3.38953139e38f, __builtin_inff())
LIMITS(int, INT32_MIN, INT32_MIN, INT32_MAX, 0)
LIMITS(uint, 0, 0, UINT32_MAX, 0)
LIMITS(long, INT64_MIN, INT64_MIN, INT64_MAX, 0)
LIMITS(ulong, 0, 0, UINT64_MAX, 0)
#undef LIMITS

}  // namespace metal

#define VEC_NAMES(T)                             \
  using T##2 = metal::vec<T, 2>;                 \
  using T##3 = metal::vec<T, 3>;                 \
  using T##4 = metal::vec<T, 4>;                 \
  using packed_##T##2 = metal::packed_vec<T, 2>; \
  using packed_##T##3 = metal::packed_vec<T, 3>; \
  using packed_##T##4 = metal::packed_vec<T, 4>;
VEC_NAMES(bool)
VEC_NAMES(char)
VEC_NAMES(uchar)
VEC_NAMES(short)
VEC_NAMES(ushort)
VEC_NAMES(int)
VEC_NAMES(uint)
VEC_NAMES(long)
VEC_NAMES(ulong)
VEC_NAMES(half)
VEC_NAMES(bfloat)
VEC_NAMES(float)
#undef VEC_NAMES
