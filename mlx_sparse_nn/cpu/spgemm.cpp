// The product of two sparse matrices on a pattern that is known, compiled with -DELEMENT=float,
// double or complex64. Letters as in ../metal/README.md.
//
// spgemm     c[r, j] = sum over k of a[r, k] b[k, j], where c is stored
// spgemm_a   a[r, k] = sum over j of c[r, j] b[k, j], where a is stored
// spgemm_b   b[k, j] = sum over r of a[r, k] c[r, j], where b is stored
//
// All three go through rows of a, and through the row of b for each of their entries, which is
// added to, or taken from, a row of c that lies dense in scratch, one for each thread. c stores
// whatever may not be zero. Sums are in stored order, spgemm_b's in that of all rows of a, on one
// thread: no result depends on how many there are.

#include <string.h>
#include <algorithm>
#include <type_traits>

#include "share.h"
#include "vectors.h"

namespace mlx_sparse_nn {
namespace {

using Element = ELEMENT;

// Entries of a from that whose row of b is read to the one whose row is fetched.
constexpr int AHEAD = 16;
// Values of b from which on its rows are fetched: with fewer, they are in the second cache.
constexpr int64_t MANY = 100000;

INLINE complex64 operator*(complex64 a, complex64 b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
INLINE complex64& operator+=(complex64& a, complex64 b) {
  a.re += b.re;
  a.im += b.im;
  return a;
}

// Which of the three matrices is computed.
enum class Out { A, B, C };

// Adds to one of three blocks of S x S the product of the other two.
template <Out out, int SIDE>
INLINE void multiply(Element* a, Element* b, Element* c, int64_t B) {
  if constexpr (SIDE >= 4 && !std::is_same_v<Element, complex64>) {
    using Row = vec<Element, SIDE>;
    for (int r = 0; r < SIDE; ++r) {
      Row sum = load<SIDE>(c + r * SIDE);
      for (int k = 0; k < SIDE; ++k) {
        Element* a_k = a + r * SIDE + k;
        const Row row = load<SIDE>(b + k * SIDE);
        if constexpr (out == Out::A) *a_k += total<Element, SIDE>(sum * row);
        if constexpr (out == Out::B) store<SIDE>(b + k * SIDE, row + *a_k * sum);
        if constexpr (out == Out::C) sum += *a_k * row;
      }
      if constexpr (out == Out::C) store<SIDE>(c + r * SIDE, sum);
    }
    return;
  }
  const int64_t S = SIDE ? SIDE : B;
  for (int64_t r = 0; r < S; ++r) {
    for (int64_t k = 0; k < S; ++k) {
      Element sum{};
      for (int64_t j = 0; j < S; ++j) {
        if constexpr (out == Out::A) sum += c[r * S + j] * b[k * S + j];
        if constexpr (out == Out::B) b[k * S + j] += a[r * S + k] * c[r * S + j];
        if constexpr (out == Out::C) c[r * S + j] += a[r * S + k] * b[k * S + j];
      }
      if constexpr (out == Out::A) a[r * S + k] += sum;
    }
  }
}

// `row` has a block for each column, zeros before and after.
template <Out out, int SIDE>
void multiply_rows(const Spgemm& p, Element* a, Element* b, Element* c, int64_t begin, int64_t end,
                   Element* row) {
  const int64_t n = SIDE ? SIDE * SIDE : p.B * p.B, n_a = p.a_indptr[p.R];
  const bool fetches = p.b_indptr[p.K] * n > MANY;
  for (int64_t r = begin; r < end; ++r) {
    if constexpr (out != Out::C) {
      for (int32_t i = p.c_indptr[r]; i < p.c_indptr[r + 1]; ++i) {
        std::copy(c + i * n, c + (i + 1) * n, row + p.c_indices[i] * n);
      }
    }
    for (int32_t i = p.a_indptr[r]; i < p.a_indptr[r + 1]; ++i) {
      const int32_t k = p.a_indices[i];
      if (fetches && i + AHEAD < n_a) __builtin_prefetch(p.b_indptr + p.a_indices[i + AHEAD]);
      if (fetches && i + AHEAD / 2 < n_a) {
        const int32_t j = p.b_indptr[p.a_indices[i + AHEAD / 2]];
        __builtin_prefetch(p.b_indices + j);
        __builtin_prefetch(b + j * n);
      }
      for (int32_t j = p.b_indptr[k]; j < p.b_indptr[k + 1]; ++j) {
        multiply<out, SIDE>(a + i * n, b + j * n, row + p.b_indices[j] * n, p.B);
      }
    }
    for (int32_t i = p.c_indptr[r]; i < p.c_indptr[r + 1]; ++i) {
      Element* from = row + p.c_indices[i] * n;
      if constexpr (out == Out::C) std::copy(from, from + n, c + i * n);
      std::fill(from, from + n, Element{});
    }
  }
}

// What the work is worth, in multiply-adds, by the entries of the longest of the three.
template <Out out>
double work_of(const Spgemm& p) {
  if (out == Out::B) return 0;
  return double(p.c_indptr[p.R]) * p.B * p.B * p.B;
}

template <Out out, int SIDE>
void compute(const Spgemm& p) {
  const int64_t n = p.B * p.B, n_row = p.C * n;
  const int64_t n_a = p.a_indptr[p.R] * n, n_b = p.b_indptr[p.K] * n, n_c = p.c_indptr[p.R] * n;
  for (int64_t v = 0; v < p.V; ++v) {
    Element* a = static_cast<Element*>(p.a) + v * n_a;
    Element* b = static_cast<Element*>(p.b) + v * n_b;
    Element* c = static_cast<Element*>(p.c) + v * n_c;
    if (out == Out::A) std::fill(a, a + n_a, Element{});
    if (out == Out::B) std::fill(b, b + n_b, Element{});
    share_rows(p.crew, p.a_indptr, p.R, work_of<out>(p), [&](int64_t begin, int64_t end, int w) {
      multiply_rows<out, SIDE>(p, a, b, c, begin, end,
                               static_cast<Element*>(p.scratch) + w * n_row);
    });
  }
}

template <Out out>
void compute_any(const Spgemm* p) {
  const size_t bytes = sizeof(Element) * p->C * p->B * p->B;
  memset(p->scratch, 0, bytes * workers(p->crew, p->R, work_of<out>(*p)));
  switch (p->B) {
    case 1:
      return compute<out, 1>(*p);
    case 2:
      return compute<out, 2>(*p);
    case 4:
      return compute<out, 4>(*p);
    case 8:
      return compute<out, 8>(*p);
    case 16:
      return compute<out, 16>(*p);
    default:
      return compute<out, 0>(*p);
  }
}

template <Out out>
size_t scratch(const Spgemm* p) {
  return sizeof(Element) * p->C * p->B * p->B * workers(p->crew, p->R, work_of<out>(*p));
}

}  // namespace

MLX_SPARSE_EXPORT void spgemm(const Spgemm* p) { compute_any<Out::C>(p); }
MLX_SPARSE_EXPORT size_t spgemm_scratch(const Spgemm* p) { return scratch<Out::C>(p); }
MLX_SPARSE_EXPORT void spgemm_a(const Spgemm* p) { compute_any<Out::A>(p); }
MLX_SPARSE_EXPORT size_t spgemm_a_scratch(const Spgemm* p) { return scratch<Out::A>(p); }
MLX_SPARSE_EXPORT void spgemm_b(const Spgemm* p) { compute_any<Out::B>(p); }
MLX_SPARSE_EXPORT size_t spgemm_b_scratch(const Spgemm* p) { return scratch<Out::B>(p); }

}  // namespace mlx_sparse_nn
