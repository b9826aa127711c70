// Barriers, the 32-lane simdgroup functions and simdgroup_matrix.
#pragma once
#include "math.h"

#define LINE int line = __builtin_LINE()

namespace metal {

using emu::emu_self;
using emu::value_t;

enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
INLINE mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
COLLECTIVE void threadgroup_barrier(mem_flags flags, LINE) { emu::emu_barrier(uint(flags), line); }
COLLECTIVE void simdgroup_barrier(mem_flags flags, LINE) {
  emu::emu_simd_barrier(uint(flags), line);
}

// A simdgroup operation: every lane leaves `mine` in its slot, waits for the others, and reads the
// slots. `resolve` runs once in between.
template <class T>
COLLECTIVE const T* gather(T mine, emu::Resolve resolve, const char* what, int line) {
  static_assert(sizeof(T) <= 16, "a simdgroup operation takes up to 16 bytes a lane");
  T* slots = reinterpret_cast<T*>(emu_self.exchange);
  slots[emu_self.lane] = mine;
  emu::emu_simd_wait(resolve, what, line);
  return slots;
}

#define SIMD_REDUCE(name, operation)                              \
  template <class U, class T = value_t<U>>                        \
  COLLECTIVE T name(U x, LINE) {                                  \
    auto fold = [](char* exchange, uint32_t lanes) {              \
      T* slots = reinterpret_cast<T*>(exchange);                  \
      for (uint32_t step = 16; step > 0; step /= 2) {             \
        for (uint32_t i = 0; i < step && i + step < lanes; i++) { \
          T a = slots[i], b = slots[i + step];                    \
          slots[i] = T(operation);                                \
        }                                                         \
      }                                                           \
    };                                                            \
    return gather<T>(static_cast<U&&>(x), fold, #name, line)[0];  \
  }
SIMD_REDUCE(simd_sum, a + b)
SIMD_REDUCE(simd_product, (a * b))
SIMD_REDUCE(simd_min, min(a, b))
SIMD_REDUCE(simd_max, max(a, b))
SIMD_REDUCE(simd_and, (a & b))
SIMD_REDUCE(simd_or, a | b)
SIMD_REDUCE(simd_xor, a ^ b)
#undef SIMD_REDUCE

COLLECTIVE bool simd_all(bool x, LINE) { return simd_and(uint(x), line) != 0; }
COLLECTIVE bool simd_any(bool x, LINE) { return simd_or(uint(x), line) != 0; }

template <class U, class T = value_t<U>>
COLLECTIVE T simd_prefix_exclusive_sum(U x, LINE) {
  const T* slots = gather<T>(static_cast<U&&>(x), nullptr, "simd_prefix_exclusive_sum", line);
  T sum = T(0);
  for (uint i = 0; i < emu_self.lane; i++) sum = sum + slots[i];
  return sum;
}
template <class U, class T = value_t<U>>
COLLECTIVE T simd_prefix_inclusive_sum(U x, LINE) {
  T own = static_cast<U&&>(x);
  return simd_prefix_exclusive_sum(own, line) + own;
}

// A lane the simdgroup does not have gives an undefined value in Metal: a fault here.
template <class T>
COLLECTIVE T shuffle(T x, int64_t lane, const char* what, int line) {
  if (lane < 0 || lane >= emu_self.lanes) emu::emu_lane_fault(what, lane, line);
  return gather<T>(x, nullptr, what, line)[lane];
}
template <class U, class T = value_t<U>>
COLLECTIVE T simd_shuffle(U x, ushort lane, LINE) {
  return shuffle<T>(static_cast<U&&>(x), lane, "simd_shuffle", line);
}
template <class U, class T = value_t<U>>
COLLECTIVE T simd_broadcast(U x, ushort lane, LINE) {
  return shuffle<T>(static_cast<U&&>(x), lane, "simd_broadcast", line);
}
template <class U, class T = value_t<U>>
COLLECTIVE T simd_broadcast_first(U x, LINE) {
  return shuffle<T>(static_cast<U&&>(x), 0, "simd_broadcast_first", line);
}
template <class U, class T = value_t<U>>
COLLECTIVE T simd_shuffle_xor(U x, ushort mask, LINE) {
  return shuffle<T>(static_cast<U&&>(x), emu_self.lane ^ mask, "simd_shuffle_xor", line);
}
// Lanes that would read past an end of the 32 keep their own value.
template <class U, class T = value_t<U>>
COLLECTIVE T simd_shuffle_down(U x, ushort delta, LINE) {
  uint lane = emu_self.lane + delta;
  lane = lane < 32 ? lane : emu_self.lane;
  return shuffle<T>(static_cast<U&&>(x), lane, "simd_shuffle_down", line);
}
template <class U, class T = value_t<U>>
COLLECTIVE T simd_shuffle_up(U x, ushort delta, LINE) {
  uint lane = emu_self.lane >= delta ? emu_self.lane - delta : emu_self.lane;
  return shuffle<T>(static_cast<U&&>(x), lane, "simd_shuffle_up", line);
}

// Each lane holds two neighbours of a row, in the layout of Apple's GPUs that MLX relies on too.
INLINE int matrix_row(uint lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
INLINE int matrix_column(uint lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }

template <class T, int R, int C>
struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "simdgroup_matrix is 8 x 8");
  vec<T, 2> elements;

  simdgroup_matrix() = default;
  COLLECTIVE explicit simdgroup_matrix(T diagonal) {
    int row = matrix_row(emu_self.lane), column = matrix_column(emu_self.lane);
    elements = vec<T, 2>(row == column ? diagonal : T(0), row == column + 1 ? diagonal : T(0));
  }
  INLINE vec<T, 2>& thread_elements() { return elements; }
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <class T, int R, int C>
COLLECTIVE simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(typename type_identity<T>::type x,
                                                                  LINE) {
  emu::emu_simd_mark("make_filled_simdgroup_matrix", line);
  simdgroup_matrix<T, R, C> m;
  m.elements = vec<T, 2>(x);
  return m;
}

// The byte offset of this lane's first element, and the distance to its second.
template <class T>
INLINE int64_t matrix_offset(ulong stride, ulong2 origin, bool transpose, int64_t& next, int line) {
  if (transpose && (origin.x || origin.y)) {
    emu::emu_not_modelled("a transposed matrix with an origin", line);
  }
  int64_t row = matrix_row(emu_self.lane), column = matrix_column(emu_self.lane);
  int64_t first = transpose ? column * stride + row : row * stride + column;
  next = int64_t(sizeof(T)) * (transpose ? int64_t(stride) : 1);
  return int64_t(sizeof(T)) * (first + int64_t(origin.y * stride + origin.x));
}

template <class T, class S>
COLLECTIVE void simdgroup_load(simdgroup_matrix<T, 8, 8>& d, emu::ptr<S, const T> src,
                               ulong elements_per_row = 8, ulong2 origin = ulong2(0),
                               bool transpose = false, LINE) {
  emu::emu_simd_mark("simdgroup_load", line);
  emu_self.matrix_loads++;
  int64_t next, offset = matrix_offset<T>(elements_per_row, origin, transpose, next, line);
  d.elements.x = emu::load<T>(src.buffer, src.offset + offset, line);
  d.elements.y = emu::load<T>(src.buffer, src.offset + offset + next, line);
}

template <class T, class S>
COLLECTIVE void simdgroup_store(const simdgroup_matrix<T, 8, 8>& a, emu::ptr<S, T> dst,
                                ulong elements_per_row = 8, ulong2 origin = ulong2(0),
                                bool transpose = false, LINE) {
  emu::emu_simd_mark("simdgroup_store", line);
  int64_t next, offset = matrix_offset<T>(elements_per_row, origin, transpose, next, line);
  emu::store<T>(dst.buffer, dst.offset + offset, a.elements.x, line);
  emu::store<T>(dst.buffer, dst.offset + offset + next, a.elements.y, line);
}

// D = A B + C in float32, k ascending, rounded to D's type at the end.
template <class D, class A, class B, class C>
COLLECTIVE void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d,
                                              const simdgroup_matrix<A, 8, 8>& a,
                                              const simdgroup_matrix<B, 8, 8>& b,
                                              const simdgroup_matrix<C, 8, 8>& c, LINE) {
  if (emu_self.lanes != 32) emu::emu_lane_fault("simdgroup_multiply_accumulate", 31, line);
  auto& p = *reinterpret_cast<emu::MatrixProduct*>(emu_self.exchange);
  int i = matrix_row(emu_self.lane), j = matrix_column(emu_self.lane);
  for (int k = 0; k < 2; k++) {
    p.a[i][j + k] = float(a.elements[k]);
    p.b[i][j + k] = float(b.elements[k]);
    p.d[i][j + k] = float(c.elements[k]);
  }
  emu::emu_simd_wait(emu::emu_multiply_accumulate, "simdgroup_multiply_accumulate", line);
  emu_self.macs += 16;
  emu_self.matrix_products++;
  for (int k = 0; k < 2; k++) d.elements[k] = D(p.d[i][j + k]);
}

template <class D, class A, class B>
COLLECTIVE void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                   const simdgroup_matrix<B, 8, 8>& b, LINE) {
  simdgroup_matrix<float, 8, 8> zero;
  zero.elements = vec<float, 2>(0.0f);
  simdgroup_multiply_accumulate(d, a, b, zero, line);
}

}  // namespace metal

#undef LINE
