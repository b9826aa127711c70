// What a driver of the CPU's kernels draws, and how it compares: patterns, matrices with any steps,
// small whole numbers, and a crew of threads. Plain C beneath: no C++ library has to be built for a
// processor that is emulated.

#pragma once

#include <pthread.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <type_traits>

#include "kernels.h"
#include "vectors.h"

namespace drawn {

using namespace mlx_sparse_nn;

// ---- numbers

struct Number {
  double re;
  double im;
};
inline Number operator+(Number a, Number b) { return {a.re + b.re, a.im + b.im}; }
inline Number operator*(Number a, Number b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}

// Bits of the significand, and the exponent of the smallest step.
template <class E>
constexpr int DIGITS = 53;
template <>
constexpr int DIGITS<float> = 24;
template <>
constexpr int DIGITS<complex64> = 24;
template <>
constexpr int DIGITS<bfloat16> = 8;
template <>
constexpr int DIGITS<float16> = 11;

// To nearest even. Numbers here are neither subnormal nor too large.
template <class E>
double rounded(double value) {
  if (value == 0) return 0;
  int exponent;
  frexp(value, &exponent);
  const double step = ldexp(1, exponent - DIGITS<E>);
  return nearbyint(value / step) * step;
}

inline Number number(float a) { return {a, 0}; }
inline Number number(double a) { return {a, 0}; }
inline Number number(complex64 a) { return {a.re, a.im}; }
inline Number number(bfloat16 a) { return {bit_cast<float>(uint32_t(a.bits) << 16), 0}; }
inline Number number(float16 a) {
  const int exponent = a.bits >> 10 & 31, fraction = a.bits & 1023;
  if (exponent == 31) return {fraction ? NAN : INFINITY, 0};
  const double size = exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24);
  return {a.bits & 0x8000 ? -size : size, 0};
}

// A number that E can hold.
template <class E>
E element(Number a) {
  if constexpr (std::is_same_v<E, complex64>) {
    return {float(a.re), float(a.im)};
  } else if constexpr (std::is_same_v<E, bfloat16>) {
    return {uint16_t(bit_cast<uint32_t>(float(a.re)) >> 16)};
  } else if constexpr (std::is_same_v<E, float16>) {
    if (a.re == 0) return {0};
    int exponent;
    const double fraction = frexp(fabs(a.re), &exponent);
    return {uint16_t((a.re < 0) << 15 | (exponent + 14) << 10 | (int(fraction * 2048) & 1023))};
  } else {
    return E(a.re);
  }
}

// ---- chance

struct Chance {
  uint64_t state;

  uint64_t next() {  // splitmix64
    uint64_t z = state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
  }
  int64_t from(int64_t low, int64_t high) { return low + int64_t(next() % (high - low + 1)); }
  bool one_in(int64_t n) { return from(1, n) == 1; }
  template <int N>
  int64_t of(const int64_t (&choices)[N]) {
    return choices[from(0, N - 1)];
  }
  template <class E>
  E small() {
    const double im = std::is_same_v<E, complex64> ? double(from(-3, 3)) : 0;
    return element<E>({double(from(-3, 3)), im});
  }
};

// ---- memory

// An array of its exact size, in which every element is no number.
template <class E>
struct Array {
  size_t size;
  E* values;

  explicit Array(size_t n) : size(n), values(nullptr) {
    if (posix_memalign(reinterpret_cast<void**>(&values), 64, n * sizeof(E) + !n)) abort();
    clear();
  }
  Array(const Array&) = delete;
  ~Array() { free(values); }
  void clear() {
    if (size) memset(values, 0xFF, size * sizeof(E));
  }
  E& operator[](size_t i) { return values[i]; }
};

// Where V matrices of N rows lie in an array: rows or columns are neighbours, with gaps, backwards,
// or all one. Of results, rows or columns are neighbours without gaps.
struct Steps {
  int64_t length;
  int64_t first;
  int64_t v, n, c;

  Steps(Chance& chance, int64_t V, int64_t N, int64_t n_c, bool is_result) {
    auto gap = [&] { return chance.one_in(3) ? chance.from(1, 3) : 0; };
    const bool by_columns = chance.one_in(2);
    const int64_t inner = is_result || chance.one_in(2) ? 1 : 1 + gap();
    const int64_t outer = inner * (by_columns ? N : n_c) + gap();
    v = outer * (by_columns ? n_c : N) + gap();
    n = by_columns ? inner : outer;
    c = by_columns ? outer : inner;
    first = gap();
    length = first + v * V;
    if (is_result) return;
    for (auto [step, count] : {Axis{&v, V}, Axis{&n, N}, Axis{&c, n_c}}) {
      if (chance.one_in(8)) {
        first += (count - 1) * *step;
        *step = -*step;
      } else if (chance.one_in(12)) {
        *step = 0;
      }
    }
  }

 private:
  struct Axis {
    int64_t* step;
    int64_t count;
  };
};

template <class E>
struct Matrices {
  int64_t V, N, n_c;
  Array<E> array;
  Rows rows;

  Matrices(Chance& chance, int64_t V, int64_t N, int64_t n_c, bool is_result)
      : Matrices(Steps(chance, V, N, n_c, is_result), V, N, n_c) {}
  Matrices(const Steps& steps, int64_t V, int64_t N, int64_t n_c)
      : V(V),
        N(N),
        n_c(n_c),
        array(steps.length),
        rows{array.values + steps.first, steps.v, steps.n, steps.c} {}

  E& at(int64_t v, int64_t n, int64_t c) {
    E* values = static_cast<E*>(rows.values);
    return values[v * rows.v_step + n * rows.n_step + c * rows.c_step];
  }
  void fill(Chance& chance) {
    for (int64_t v = 0; v < V; ++v) {
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t c = 0; c < n_c; ++c) at(v, n, c) = chance.small<E>();
      }
    }
  }
};

// R block-rows of C block-columns: some rows are empty, columns repeat and are in no order. The
// last blocks may reach past the matrix.
struct Pattern {
  int64_t R, C, B, n_rows, n_cols, n_blocks;
  Array<int32_t> indptr, indices, perm;

  // At most `most` blocks, or one more, but for a row of `longest`, if that is not 0.
  Pattern(Chance& chance, int64_t R, int64_t C, int64_t B, int64_t most, int64_t longest)
      : R(R),
        C(C),
        B(B),
        n_rows(R * B - (chance.one_in(2) ? chance.from(0, B - 1) : 0)),
        n_cols(C * B - (chance.one_in(2) ? chance.from(0, B - 1) : 0)),
        indptr(R + 1),
        indices(most + longest + 1),
        perm(most + longest + 1) {
    const int64_t in_row = chance.of({1, 3, 8, 40}), long_row = chance.from(0, R - 1);
    n_blocks = indptr[0] = 0;
    for (int64_t r = 0; r < R; ++r) {
      const int64_t drawn = chance.one_in(4) ? 0 : chance.from(0, in_row);
      n_blocks += r == long_row && longest ? longest : drawn < most - n_blocks ? drawn : 0;
      indptr[r + 1] = int32_t(n_blocks);
    }
    if (n_blocks == 0) indptr[R] = int32_t(n_blocks = 1);
    for (int64_t j = 0; j < n_blocks; ++j) {
      indices[j] = int32_t(chance.from(0, C - 1));
      perm[j] = int32_t(j);
      const int64_t other = chance.from(0, j);
      perm[j] = perm[other];
      perm[other] = int32_t(j);
    }
  }

  Csr csr(bool transposed) const {
    return {indptr.values, indices.values, transposed ? perm.values : nullptr, R, C, n_blocks, B,
            n_rows,        n_cols};
  }

  // Rows of block-row r, and columns of block j, that lie in the matrix.
  int64_t height(int64_t r) const { return n_rows - r * B < B ? n_rows - r * B : B; }
  int64_t width(int64_t j) const {
    const int64_t c = indices.values[j];
    return n_cols - c * B < B ? n_cols - c * B : B;
  }
};

// ---- threads

// Runs what a crew of `size` shares, on threads made for it.
template <int size>
struct Threads {
  int64_t n;
  void (*f)(const void* context, int64_t i, int worker);
  const void* context;
  int64_t next = 0;
  int started = 0;

  static Crew crew() { return {size, run}; }

 private:
  static void run(int64_t n, void (*f)(const void*, int64_t, int), const void* context) {
    Threads shared{n, f, context};
    pthread_t others[size];
    const int n_others = (n < size ? static_cast<int>(n) : size) - 1;  // one takes each piece
    for (int i = 0; i < n_others; ++i) {
      if (pthread_create(&others[i], nullptr, work, &shared)) abort();
    }
    work(&shared);
    for (int i = 0; i < n_others; ++i) pthread_join(others[i], nullptr);
  }
  static void* work(void* argument) {
    Threads& shared = *static_cast<Threads*>(argument);
    const int worker = __atomic_fetch_add(&shared.started, 1, __ATOMIC_RELAXED);
    int64_t i;
    while ((i = __atomic_fetch_add(&shared.next, 1, __ATOMIC_RELAXED)) < shared.n) {
      shared.f(shared.context, i, worker);
    }
    return nullptr;
  }
};

}  // namespace drawn
