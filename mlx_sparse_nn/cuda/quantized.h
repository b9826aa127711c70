#pragma once

// Blocks in MLX's affine packing: value = scale q + bias, with one scale and one bias for each
// group of a stored row. The q lie one after the other, the lowest bits first.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Eight integers of BITS bits, by fours from the lowest bit on. Above them lies anything.
struct Pack {
  unsigned low;
  unsigned high;
};

// The COUNT integers, 4 or 8, of columns col to col + COUNT - 1 of the stored row that begins at
// `row`. They begin and end in two words at most.
template <int BITS, int COUNT>
__device__ __forceinline__ Pack load_pack(const unsigned* row, int col) {
  const int bit = col * BITS;
  const unsigned first = __ldg(row + bit / 32);
  if constexpr (32 % (BITS * COUNT) == 0) {
    const unsigned word = first >> bit % 32;
    return {word, COUNT == 8 ? word >> 4 * BITS : 0u};
  } else {
    const unsigned second = __ldg(row + (bit + BITS * COUNT - 1) / 32);
    const unsigned long long words = (first | (unsigned long long)second << 32) >> bit % 32;
    return {(unsigned)words, (unsigned)(words >> 4 * BITS)};
  }
}

// word & MASK | SET, in one instruction where the compiler would take two.
template <unsigned MASK, unsigned SET>
__device__ __forceinline__ unsigned mask_and_set(unsigned word) {
  unsigned result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(MASK), "r"(SET));
  return result;
}

// Pairs of integers in the halves of a word: those of a, and those of b above them. The bits of SET
// are set, too.
template <int BITS, unsigned SET>
__device__ __forceinline__ void pair_up(unsigned a, unsigned b, unsigned (&pairs)[4]) {
  constexpr unsigned MASK = ((1u << BITS) - 1) * 0x10001u;
  const unsigned both = __byte_perm(a, b, 0x5410);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const unsigned word =
        BITS <= 4 ? both >> i * BITS : __byte_perm(a >> i * BITS, b >> i * BITS, 0x5410);
    pairs[i] = mask_and_set<MASK, SET>(word);
  }
}

// Products of two pairs, plus another pair, each rounded once; the first argument only says of what
// type.
__device__ __forceinline__ unsigned fma2(__nv_bfloat16, unsigned a, unsigned b, unsigned c) {
  unsigned sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}
__device__ __forceinline__ unsigned fma2(__half, unsigned a, unsigned b, unsigned c) {
  unsigned sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}
// What is set above integers of BITS bits to make them 128 + q as bfloat16, or 1024 + q as half:
// they are the last bits of the significand. Those of 8 bits are too long for bfloat16, which takes
// them another way.
template <typename T, int BITS>
constexpr unsigned SHIFT = 0x64006400u;
template <int BITS>
constexpr unsigned SHIFT<__nv_bfloat16, BITS> = BITS < 8 ? 0x43004300u : 0;
// Take off what has been added so.
__device__ __forceinline__ unsigned exactly(__nv_bfloat16, unsigned shifted) {
  return fma2(__nv_bfloat16(), shifted, 0x3f803f80u, 0xc300c300u);  // times 1, minus 128
}
__device__ __forceinline__ unsigned exactly(__half, unsigned shifted) {
  return fma2(__half(), shifted, 0x3c003c00u, 0xe400e400u);  // times 1, minus 1024
}

__device__ __forceinline__ float integer(unsigned q) {
  return __uint_as_float(q | 0x4b000000u) - 8388608.0f;  // 2^23 + q: the last bits again
}

// The elements of a word.
template <typename T>
__device__ __forceinline__ T element_of(unsigned pair, int i) {
  const unsigned short bits = i ? pair >> 16 : pair;
  return *reinterpret_cast<const T*>(&bits);
}

// 2 scales times a pair of integers that SHIFT is set in, plus 2 biases; each rounded once.
template <int BITS, typename T>
__device__ __forceinline__ unsigned scale_pair(unsigned shifted, unsigned scales, unsigned biases) {
  if constexpr (SHIFT<T, BITS> != 0) {
    return fma2(T(), exactly(T(), shifted), scales, biases);
  } else {
    return pack2(T(),
                 fmaf(integer(shifted & 0xffff), float(element_of<T>(scales, 0)),
                      float(element_of<T>(biases, 0))),
                 fmaf(integer(shifted >> 16), float(element_of<T>(scales, 1)),
                      float(element_of<T>(biases, 1))));
  }
}

// Two elements in a word, as bits.
template <typename T>
__device__ __forceinline__ unsigned bits_of_pair(T low, T high) {
  return *reinterpret_cast<const unsigned short*>(&low) |
         (unsigned)*reinterpret_cast<const unsigned short*>(&high) << 16;
}

// Eight elements of 16 bits, 16 bytes at once where they are ALIGNED.
template <bool ALIGNED, typename T>
__device__ __forceinline__ uint4 load8(const T* p) {
  if constexpr (ALIGNED) {
    return __ldg(reinterpret_cast<const uint4*>(p));
  }
  return make_uint4(bits_of_pair(p[0], p[1]), bits_of_pair(p[2], p[3]), bits_of_pair(p[4], p[5]),
                    bits_of_pair(p[6], p[7]));
}

// The eight values of a pack, of 16 bits, in order.
template <int BITS, typename T>
__device__ __forceinline__ uint4 values_of(Pack pack, T scale, T bias) {
  const unsigned s = bits_of_pair(scale, scale);
  const unsigned b = bits_of_pair(bias, bias);
  unsigned pairs[4];  // i and i + 4
  pair_up<BITS, SHIFT<T, BITS>>(pack.low, pack.high, pairs);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    pairs[i] = scale_pair<BITS, T>(pairs[i], s, b);
  }
  return make_uint4(
      __byte_perm(pairs[0], pairs[1], 0x5410), __byte_perm(pairs[2], pairs[3], 0x5410),
      __byte_perm(pairs[0], pairs[1], 0x7632), __byte_perm(pairs[2], pairs[3], 0x7632));
}

// The first `count` of 2 or 8 elements of 16 bits, and zeros behind them.
__device__ __forceinline__ unsigned cut2(unsigned pair, int count) {
  return count > 1 ? pair : count > 0 ? pair & 0xffff : 0;
}
__device__ __forceinline__ uint4 cut8(uint4 values, int count) {
  return make_uint4(cut2(values.x, count), cut2(values.y, count - 2), cut2(values.z, count - 4),
                    cut2(values.w, count - 6));
}

// Store 16 bytes at once: the compiler may take a uint4 apart.
__device__ __forceinline__ void store16(void* to, uint4 words) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}

// Store the eight values of a pack.
template <int BITS, typename T>
__device__ __forceinline__ void store_values(Pack pack, T scale, T bias, T* to) {
  store16(to, values_of<BITS>(pack, scale, bias));
}
template <int BITS>
__device__ __forceinline__ void store_values(Pack pack, float scale, float bias, float* to) {
  uint4 words[2];
  unsigned* values = reinterpret_cast<unsigned*>(words);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const unsigned q = (i < 4 ? pack.low : pack.high) >> i % 4 * BITS & ((1u << BITS) - 1);
    values[i] = __float_as_uint(fmaf(scale, integer(q), bias));
  }
  store16(to, words[0]);
  store16(to + 4, words[1]);
}

// A pair of integers that SHIFT of bfloat16 is set in as bfloat16: plus 128 unless they are to be
// EXACT. Those of 8 bits go by halves, 128 + low and 2048 + 16 high.
template <int BITS, bool EXACT>
__device__ __forceinline__ unsigned factors(unsigned shifted) {
  constexpr unsigned ONES = 0x3f803f80u;
  if constexpr (BITS == 8) {
    const unsigned low = mask_and_set<0x000f000fu, 0x43004300u>(shifted);
    const unsigned high = mask_and_set<0x000f000fu, 0x45004500u>(shifted >> 4);
    return fma2(__nv_bfloat16(), fma2(__nv_bfloat16(), high, ONES, 0xc508c508u), ONES, low);
  }
  return EXACT ? exactly(__nv_bfloat16(), shifted) : shifted;
}

// How many bfloat16 add up to an element of T.
template <typename T>
constexpr int PARTS = 3;
template <>
constexpr int PARTS<__half> = 2;
template <>
constexpr int PARTS<__nv_bfloat16> = 1;

// Eight elements, 16 bytes at a time where they are ALIGNED.
template <typename T>
struct Eight {
  uint4 words[sizeof(T) / 2];
};
template <bool ALIGNED, typename T>
__device__ __forceinline__ Eight<T> load_eight(const T* p) {
  Eight<T> value;
  if constexpr (ALIGNED) {
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) {
      value.words[i] = __ldg(reinterpret_cast<const uint4*>(p) + i);
    }
  } else {
    T* elements = reinterpret_cast<T*>(&value);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      elements[i] = p[i];
    }
  }
  return value;
}

// COUNT bfloat16 whose sum is each of eight floats, which are used up, in pairs: elements i and
// i + 4 where they lie APART, or neighbours.
template <int COUNT, bool APART>
__device__ __forceinline__ void split(float (&values)[8], unsigned (&parts)[COUNT][4]) {
#pragma unroll
  for (int part = 0; part < COUNT; part++) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float& a = values[APART ? i : 2 * i];
      float& b = values[APART ? i + 4 : 2 * i + 1];
      const unsigned pair = pack2(__nv_bfloat16(), a, b);
      parts[part][i] = pair;
      a -= __uint_as_float(pair << 16);
      b -= __uint_as_float(pair & 0xffff0000u);
    }
  }
}
