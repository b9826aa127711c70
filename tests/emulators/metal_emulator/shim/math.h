// The Metal mathematics functions. half and bfloat compute in float and round once.
#pragma once
#include "pointers.h"

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define FLT_MAX 3.40282347e38f
#define M_PI_F 3.14159265358979323846f

namespace metal {

#define UNARY(name, expression)                                   \
  INLINE float name(float x) { return expression; }               \
  INLINE half name(half x) { return half(name(float(x))); }       \
  INLINE bfloat name(bfloat x) { return bfloat(name(float(x))); } \
  template <class T, int N>                                       \
  INLINE vec<T, N> name(vec<T, N> x) {                            \
    for (int i = 0; i < N; i++) x[i] = name(x[i]);                \
    return x;                                                     \
  }
UNARY(abs, __builtin_fabsf(x))
UNARY(fabs, __builtin_fabsf(x))
UNARY(ceil, __builtin_ceilf(x))
UNARY(floor, __builtin_floorf(x))
UNARY(trunc, __builtin_truncf(x))
UNARY(rint, __builtin_rintf(x))
UNARY(round, __builtin_roundf(x))
UNARY(sqrt, __builtin_sqrtf(x))
UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))
UNARY(exp, __builtin_expf(x))
UNARY(exp2, __builtin_exp2f(x))
UNARY(log, __builtin_logf(x))
UNARY(log2, __builtin_log2f(x))
UNARY(sin, __builtin_sinf(x))
UNARY(cos, __builtin_cosf(x))
UNARY(tanh, __builtin_tanhf(x))
#undef UNARY

#define MINMAX(T)                                  \
  INLINE T min(T a, T b) { return b < a ? b : a; } \
  INLINE T max(T a, T b) { return a < b ? b : a; }
#define MINMAX_CLAMP(T) \
  MINMAX(T)             \
  INLINE T clamp(T x, T lo, T hi) { return min(max(x, lo), hi); }
MINMAX_CLAMP(char)
MINMAX_CLAMP(uchar)
MINMAX_CLAMP(short)
MINMAX_CLAMP(ushort)
MINMAX_CLAMP(int)
MINMAX_CLAMP(uint)
MINMAX_CLAMP(long)
MINMAX_CLAMP(ulong)
MINMAX_CLAMP(float)
MINMAX_CLAMP(half)
MINMAX(bfloat)
#undef MINMAX_CLAMP
#undef MINMAX
bfloat clamp(bfloat, bfloat, bfloat) = delete;  // as in Metal
INLINE int abs(int x) { return x < 0 ? -x : x; }
INLINE long abs(long x) { return x < 0 ? -x : x; }

template <class T, int N>
INLINE vec<T, N> min(vec<T, N> a, vec<T, N> b) {
  for (int i = 0; i < N; i++) a[i] = min(a[i], b[i]);
  return a;
}
template <class T, int N>
INLINE vec<T, N> max(vec<T, N> a, vec<T, N> b) {
  for (int i = 0; i < N; i++) a[i] = max(a[i], b[i]);
  return a;
}

INLINE bool isnan(float x) { return x != x; }
INLINE bool isinf(float x) { return __builtin_fabsf(x) == __builtin_inff(); }
INLINE bool isfinite(float x) { return !isnan(x) && !isinf(x); }
INLINE float pow(float x, float y) { return __builtin_powf(x, y); }
INLINE float fmod(float x, float y) { return __builtin_fmodf(x, y); }
INLINE float divide(float x, float y) { return x / y; }

// fma and dot are the scalar multiply-accumulates that the emulator counts.
INLINE float fma(float a, float b, float c) {
  emu::emu_self.macs += 1;
  return __builtin_fmaf(a, b, c);
}
INLINE half fma(half a, half b, half c) { return half(fma(float(a), float(b), float(c))); }
INLINE bfloat fma(bfloat a, bfloat b, bfloat c) {
  return bfloat(fma(float(a), float(b), float(c)));
}
template <class T, int N>
INLINE vec<T, N> fma(const vec<T, N>& a, const vec<T, N>& b, vec<T, N> c) {
  for (int i = 0; i < N; i++) c[i] = fma(a[i], b[i], c[i]);
  return c;
}
template <class T, int N>
INLINE T dot(const vec<T, N>& a, const vec<T, N>& b) {
  emu::emu_self.macs += N;
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) sum = sum + a[i] * b[i];
  return sum;
}

template <class T>
INLINE T select(T if_false, T if_true, bool condition) {
  return condition ? if_true : if_false;
}
INLINE uint popcount(uint x) { return uint(__builtin_popcount(x)); }
INLINE uint clz(uint x) { return x ? uint(__builtin_clz(x)) : 32; }
INLINE uint ctz(uint x) { return x ? uint(__builtin_ctz(x)) : 32; }

namespace fast {
using namespace metal;
}
namespace precise {
using namespace metal;
}

}  // namespace metal
