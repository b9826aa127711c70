// Vectors of GCC and Clang, from which the compiler makes AVX-512, AVX2, SSE or NEON; and 16-bit
// numbers, which are widened when they are read and rounded to nearest even when written.

#pragma once

#include <stdint.h>
#include <string.h>
#include <utility>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

namespace mlx_sparse_nn {

// Bytes of a vector register, and registers.
#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
constexpr int REGISTERS = 32;
#elif defined(__AVX__)
constexpr int REGISTER_BYTES = 32;
constexpr int REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int REGISTER_BYTES = 16;
constexpr int REGISTERS = 32;
#else
constexpr int REGISTER_BYTES = 16;
constexpr int REGISTERS = 16;
#endif

// Lanes of a register of accumulators A.
template <class A>
constexpr int LANES = REGISTER_BYTES / sizeof(A);

template <class A, int N>
struct VectorOf {
  typedef A type __attribute__((vector_size(N * sizeof(A))));
  // The same anywhere in memory.
  typedef A loose __attribute__((vector_size(N * sizeof(A)), aligned(alignof(A)), may_alias));
};
template <class A, int N>
using vec = typename VectorOf<A, N>::type;
template <class A, int N>
using loose_vec = typename VectorOf<A, N>::loose;

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
struct complex64 {
  float re;
  float im;
};

// The type in which sums of E are accumulated.
template <class E>
struct AccumulatorOf {
  typedef float type;
};
template <>
struct AccumulatorOf<double> {
  typedef double type;
};
template <>
struct AccumulatorOf<complex64> {
  typedef complex64 type;
};
template <class E>
using accumulator = typename AccumulatorOf<E>::type;

template <class To, class From>
INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// N values from memory, widened.
template <int N>
INLINE vec<float, N> load(const float* p) {
  return *reinterpret_cast<const loose_vec<float, N>*>(p);
}
template <int N>
INLINE vec<double, N> load(const double* p) {
  return *reinterpret_cast<const loose_vec<double, N>*>(p);
}
template <int N>
INLINE vec<float, N> load(const bfloat16* p) {
  const auto bits = *reinterpret_cast<const loose_vec<uint16_t, N>*>(p);
  return bit_cast<vec<float, N>>(__builtin_convertvector(bits, vec<uint32_t, N>) << 16);
}
template <int N>
INLINE vec<float, N> load(const float16* p) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    return bit_cast<vec<float, 16>>(
        _mm512_maskz_cvtph_ps(0xFFFF, *reinterpret_cast<const __m256i_u*>(p)));
  }
#endif
#if defined(__F16C__)
  if constexpr (N == 8) {
    return bit_cast<vec<float, 8>>(_mm256_cvtph_ps(*reinterpret_cast<const __m128i_u*>(p)));
  }
  if constexpr (N == 4) {
    return bit_cast<vec<float, 4>>(
        _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  if constexpr (N == 1) return vec<float, 1>{_cvtsh_ss(p->bits)};
#endif
  // The exponent is moved up by a multiplication, which is exact; what has the largest exponent
  // already is infinite or no number.
  const auto bits = *reinterpret_cast<const loose_vec<uint16_t, N>*>(p);
  const auto wide = __builtin_convertvector(bits, vec<uint32_t, N>);
  const vec<uint32_t, N> sign = (wide & 0x8000) << 16, rest = (wide & 0x7FFF) << 13;
  const vec<float, N> moved = bit_cast<vec<float, N>>(rest) * 0x1p112f;
  const vec<uint32_t, N> special = bit_cast<vec<uint32_t, N>>(rest >= (0x7C00u << 13));
  const vec<uint32_t, N> value =
      (bit_cast<vec<uint32_t, N>>(moved) & ~special) | ((rest | 0x7F800000u) & special);
  return bit_cast<vec<float, N>>(value | sign);
}

// N values to memory, rounded.
template <int N>
INLINE void store(float* p, vec<float, N> value) {
  *reinterpret_cast<loose_vec<float, N>*>(p) = value;
}
template <int N>
INLINE void store(double* p, vec<double, N> value) {
  *reinterpret_cast<loose_vec<double, N>*>(p) = value;
}
template <int N>
INLINE void store(bfloat16* p, vec<float, N> value) {
#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
  if constexpr (N == 16) {
    // The instruction takes subnormal numbers for zero.
    const __m512 wide = bit_cast<__m512>(value);
    if (__builtin_expect(_mm512_fpclass_ps_mask(wide, 0x20) == 0, 1)) {
      *reinterpret_cast<__m256i_u*>(p) = bit_cast<__m256i>(_mm512_cvtneps_pbh(wide));
      return;
    }
  }
#endif
  const auto bits = bit_cast<vec<uint32_t, N>>(value);
  const vec<uint32_t, N> rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const auto nan = bit_cast<vec<uint32_t, N>>(value != value);
  const vec<uint32_t, N> out = (rounded & ~nan) | (((bits >> 16) | 0x40) & nan);
  *reinterpret_cast<loose_vec<uint16_t, N>*>(p) = __builtin_convertvector(out, vec<uint16_t, N>);
}
template <int N>
INLINE void store(float16* p, vec<float, N> value) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const __m512 wide = bit_cast<__m512>(value);
    *reinterpret_cast<__m256i_u*>(p) =
        _mm512_maskz_cvtps_ph(0xFFFF, wide, _MM_FROUND_TO_NEAREST_INT);
    return;
  }
#endif
#if defined(__F16C__)
  if constexpr (N == 8) {
    const __m256 wide = bit_cast<__m256>(value);
    *reinterpret_cast<__m128i_u*>(p) = _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT);
    return;
  }
  if constexpr (N == 4) {
    const __m128i narrow = _mm_cvtps_ph(bit_cast<__m128>(value), _MM_FROUND_TO_NEAREST_INT);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), narrow);
    return;
  }
  if constexpr (N == 1) {
    p->bits = _cvtss_sh(value[0], _MM_FROUND_TO_NEAREST_INT);
    return;
  }
#endif
  const auto bits = bit_cast<vec<uint32_t, N>>(value);
  const vec<uint32_t, N> size = bits & 0x7FFFFFFF, sign = (bits >> 16) & 0x8000;
  // Normal numbers: round at bit 13, and move the exponent down; too large ones become infinite.
  const vec<uint32_t, N> normal = (size - (112u << 23) + 0xFFF + ((size >> 13) & 1)) >> 13;
  // Subnormal ones: the addition rounds to multiples of 2^-24, which are then the low bits.
  const vec<float, N> sum = bit_cast<vec<float, N>>(size) + 0.5f;
  const vec<uint32_t, N> subnormal = bit_cast<vec<uint32_t, N>>(sum) - 0x3F000000u;
  const auto is_small = bit_cast<vec<uint32_t, N>>(size < (113u << 23));
  const auto is_large = bit_cast<vec<uint32_t, N>>(size >= 0x477FF000u);
  const auto is_nan = bit_cast<vec<uint32_t, N>>(size > 0x7F800000u);
  vec<uint32_t, N> out = (normal & ~is_small) | (subnormal & is_small);
  out = (out & ~is_large) | (0x7C00u & is_large);
  out = (out & ~is_nan) | (((0x7E00u | (size >> 13)) & 0x7FFF) & is_nan) | sign;
  *reinterpret_cast<loose_vec<uint16_t, N>*>(p) = __builtin_convertvector(out, vec<uint16_t, N>);
}

// The same of one value.
template <class E>
INLINE auto widen(E value) {
  return load<1>(&value)[0];
}
template <class E, class A>
INLINE void put(E* p, A value) {
  store<1>(p, vec<A, 1>{value});
}

// The sum of the lanes, halves first.
template <class A, int N>
INLINE A total(vec<A, N> value) {
  if constexpr (N == 1) {
    return value[0];
  } else {
    vec<A, N / 2> low, high;
    memcpy(&low, &value, sizeof low);
    memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof low, sizeof high);
    return total<A, N / 2>(low + high);
  }
}

template <class A, int N, int... LANE>
INLINE vec<A, 2 * N> join(vec<A, N> low, vec<A, N> high, std::integer_sequence<int, LANE...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(low, high, LANE...);
#else
  vec<A, 2 * N> both;
  memcpy(&both, &low, sizeof low);
  memcpy(reinterpret_cast<char*>(&both) + sizeof low, &high, sizeof high);
  return both;
#endif
}
// The lanes of both, one after the other.
template <class A, int N>
INLINE vec<A, 2 * N> join(vec<A, N> low, vec<A, N> high) {
  return join<A, N>(low, high, std::make_integer_sequence<int, 2 * N>{});
}

// Lane i of the result is lane LANE[i] of x.
template <class A, int N, int... LANE>
INLINE vec<A, N> shuffle(vec<A, N> x) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, x, LANE...);
#else
  typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> index;
  return __builtin_shuffle(x, vec<index, N>{LANE...});
#endif
}

template <class A, int N, int S, int... LANE>
INLINE void swap_lanes(vec<A, N>& a, vec<A, N>& b, std::integer_sequence<int, LANE...>) {
#if defined(__clang__) || __GNUC__ >= 12
  const vec<A, N> low = __builtin_shufflevector(a, b, (LANE & S ? LANE - S + N : LANE)...);
  const vec<A, N> high = __builtin_shufflevector(a, b, (LANE & S ? LANE + N : LANE + S)...);
#else
  typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> index;
  const vec<A, N> low = __builtin_shuffle(a, b, vec<index, N>{(LANE & S ? LANE - S + N : LANE)...});
  const vec<A, N> high =
      __builtin_shuffle(a, b, vec<index, N>{(LANE & S ? LANE + N : LANE + S)...});
#endif
  a = low;
  b = high;
}

// Transposes N vectors of N lanes: in rounds, which swap blocks of S x S.
template <class A, int N, int S = 1>
INLINE void transpose(vec<A, N>* rows) {
  if constexpr (S < N) {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      if (!(i & S)) {
        swap_lanes<A, N, S>(rows[i], rows[i + S], std::make_integer_sequence<int, N>{});
      }
    }
    transpose<A, N, 2 * S>(rows);
  }
}

// The totals of N vectors of N lanes. S: as above, but vectors swap half of what they hold and are
// added.
template <class A, int N, int S = 1>
INLINE vec<A, N> totals(vec<A, N>* rows) {
  if constexpr (S < N) {
#pragma GCC unroll 16
    for (int i = 0; i < N; i += 2 * S) {
      swap_lanes<A, N, S>(rows[i], rows[i + S], std::make_integer_sequence<int, N>{});
      rows[i] += rows[i + S];
    }
    return totals<A, N, 2 * S>(rows);
  } else {
    return rows[0];
  }
}

}  // namespace mlx_sparse_nn
