// Runs the products of one kernel source on drawn cases, and compares them with naive loops: small
// whole numbers, so that sums are exact and only their rounding is left. Crews of one and of four
// have to give the same bits. Linked with blocks.cpp or scalars.cpp, and compiled for the same
// ELEMENT and BLOCK; of scalars BLOCK is 1.
//
//   products CASES SEED

#include "drawn.h"

namespace mlx_sparse_nn {

extern "C" {
size_t spmm_scratch(const Product* p);
void spmm(const Product* p);
size_t sddmm_scratch(const SampledProduct* p);
void sddmm(const SampledProduct* p);
size_t spmm_t_scratch(const Product* p);
void spmm_t(const Product* p);
}

}  // namespace mlx_sparse_nn

namespace drawn {
namespace {

using E = ELEMENT;

constexpr int64_t MOST_WORK = 1000000;  // multiply-adds of a case
constexpr int64_t LONG_ROW = 20000;     // of scalars: more than a kernel takes in one piece

struct Sizes {
  int64_t B, R, C, V, N;

  explicit Sizes(Chance& chance) {
    B = BLOCK ? BLOCK : chance.of({3, 6, 48});
    const int64_t rows = chance.one_in(3) ? 12 : 400;
    R = chance.from(1, 1 + rows / B);
    C = chance.from(1, 1 + rows / B);
    V = chance.one_in(3) ? 3 : 1;
    N = chance.one_in(4) ? chance.from(1, 4) : chance.from(1, 70);
    if (chance.one_in(10)) N = chance.from(250, 270);
  }
  int64_t most_blocks() const { return 4 + MOST_WORK / (B * B * V * N); }
};

// Runs a product with both crews; `out` is all that it may write.
template <class P>
void run(P p, size_t (*scratch_of)(const P*), void (*kernel)(const P*), Array<E>& out) {
  Array<E> alone(out.size);
  for (const Crew& crew : {Threads<1>::crew(), Threads<4>::crew()}) {
    p.crew = crew;
    Array<char> scratch(scratch_of(&p));
    p.scratch = scratch.values;
    out.clear();
    kernel(&p);
    if (crew.size == 1) memcpy(alone.values, out.values, out.size * sizeof(E));
  }
  if (memcmp(alone.values, out.values, out.size * sizeof(E))) {
    printf("a crew of four gave other bits than one thread\n");
    exit(1);
  }
}

void compare(const char* what, const Sizes& s, E got, Number expected, int64_t v, int64_t i,
             int64_t k) {
  const Number number_got = number(got);
  const Number wanted = {rounded<E>(expected.re), rounded<E>(expected.im)};
  if (number_got.re == wanted.re && number_got.im == wanted.im) return;
  printf("%s of B = %d, R = %d, C = %d, V = %d, N = %d: [%d, %d, %d] is %g + %g i, not %g + %g i\n",
         what, int(s.B), int(s.R), int(s.C), int(s.V), int(s.N), int(v), int(i), int(k),
         number_got.re, number_got.im, wanted.re, wanted.im);
  exit(1);
}

// Fails if other elements were written than the n that were compared.
void check_gaps(const char* what, const Array<E>& out, int64_t n) {
  Array<E> nothing(1);
  for (size_t i = 0; i < out.size; ++i) {
    n -= memcmp(out.values + i, nothing.values, sizeof(E)) != 0;
  }
  if (n == 0) return;
  printf("%s wrote outside of its result\n", what);
  exit(1);
}

void check_spmm(Chance& chance) {
  const Sizes s(chance);
  const bool transposed = chance.one_in(2);
  const bool has_long_row = s.B == 1 && s.V * s.N < 20 && chance.one_in(2);
  Pattern pattern(chance, s.R, s.C, s.B, s.most_blocks(), has_long_row ? LONG_ROW : 0);
  const int64_t n_blocks = pattern.n_blocks, size = s.B * s.B, n_rows = pattern.n_rows;
  Array<E> data(s.V * n_blocks * size), bias(n_rows);
  // Element (o, k) of block j of the CSR.
  auto place = [&](int64_t v, int64_t j, int64_t o, int64_t k) {
    const int64_t block = v * n_blocks + (transposed ? pattern.perm[j] : j);
    return block * size + (transposed ? k * s.B + o : o * s.B + k);
  };
  for (int64_t v = 0; v < s.V; ++v) {
    for (int64_t r = 0; r < s.R; ++r) {
      for (int64_t j = pattern.indptr[r]; j < pattern.indptr[r + 1]; ++j) {
        // Past the matrix there is no number.
        for (int64_t o = 0; o < pattern.height(r); ++o) {
          for (int64_t k = 0; k < pattern.width(j); ++k) {
            data[place(v, j, o, k)] = chance.small<E>();
          }
        }
      }
    }
  }
  for (size_t i = 0; i < bias.size; ++i) bias[i] = chance.small<E>();
  const bool has_bias = chance.one_in(2);
  Matrices<E> x(chance, s.V, s.N, pattern.n_cols, false), y(chance, s.V, s.N, n_rows, true);
  x.fill(chance);

  const Product p = {pattern.csr(transposed),
                     data.values,
                     has_bias ? bias.values : nullptr,
                     x.rows,
                     y.rows,
                     s.V,
                     s.N,
                     nullptr,
                     {}};
  run(p, spmm_scratch, spmm, y.array);
  const char* what = transposed ? "spmm, transposed," : "spmm";
  for (int64_t v = 0; v < s.V; ++v) {
    for (int64_t n = 0; n < s.N; ++n) {
      for (int64_t row = 0; row < n_rows; ++row) {
        const int64_t r = row / s.B, o = row % s.B;
        Number sum = has_bias ? number(bias[row]) : Number{};
        for (int64_t j = pattern.indptr[r]; j < pattern.indptr[r + 1]; ++j) {
          for (int64_t k = 0; k < pattern.width(j); ++k) {
            const E w = data[place(v, j, o, k)];
            sum = sum + number(w) * number(x.at(v, n, pattern.indices[j] * s.B + k));
          }
        }
        compare(what, s, y.at(v, n, row), sum, v, n, row);
      }
    }
  }
  check_gaps(what, y.array, s.V * s.N * n_rows);
}

void check_sddmm(Chance& chance) {
  const Sizes s(chance);
  Pattern pattern(chance, s.R, s.C, s.B, s.most_blocks(), 0);
  const int64_t n_blocks = pattern.n_blocks, size = s.B * s.B;
  Matrices<E> y(chance, s.V, s.N, pattern.n_rows, false);
  Matrices<E> x(chance, s.V, s.N, pattern.n_cols, false);
  y.fill(chance);
  x.fill(chance);
  Array<E> out(s.V * n_blocks * size);

  const SampledProduct p = {pattern.csr(false), out.values, y.rows, x.rows, s.V, s.N, nullptr, {}};
  run(p, sddmm_scratch, sddmm, out);
  for (int64_t v = 0; v < s.V; ++v) {
    for (int64_t r = 0; r < s.R; ++r) {
      for (int64_t j = pattern.indptr[r]; j < pattern.indptr[r + 1]; ++j) {
        for (int64_t e = 0; e < size; ++e) {
          const int64_t row = r * s.B + e / s.B, col = pattern.indices[j] * s.B + e % s.B;
          const bool is_inside = row < pattern.n_rows && col < pattern.n_cols;
          Number sum = {};
          for (int64_t n = 0; n < s.N && is_inside; ++n) {
            sum = sum + number(y.at(v, n, row)) * number(x.at(v, n, col));
          }
          compare("sddmm", s, out[(v * n_blocks + j) * size + e], sum, v, j, e);
        }
      }
    }
  }
}

#if BLOCK == 1
// The transposed product that scalars have for a single row of x.
void check_spmm_t(Chance& chance) {
  Sizes s(chance);
  s.N = 1;
  Pattern pattern(chance, s.R, s.C, 1, s.most_blocks(), chance.one_in(2) ? LONG_ROW : 0);
  Array<E> data(s.V * pattern.n_blocks);
  for (size_t i = 0; i < data.size; ++i) data[i] = chance.small<E>();
  Matrices<E> x(chance, s.V, 1, s.R, false), y(chance, s.V, 1, s.C, true);
  x.fill(chance);

  const Product p = {pattern.csr(false), data.values, nullptr, x.rows, y.rows, s.V, 1, nullptr, {}};
  run(p, spmm_t_scratch, spmm_t, y.array);
  for (int64_t v = 0; v < s.V; ++v) {
    Array<Number> sums(s.C);
    for (int64_t c = 0; c < s.C; ++c) sums[c] = {};
    for (int64_t r = 0; r < s.R; ++r) {
      for (int64_t j = pattern.indptr[r]; j < pattern.indptr[r + 1]; ++j) {
        Number& sum = sums[pattern.indices[j]];
        sum = sum + number(data[v * pattern.n_blocks + j]) * number(x.at(v, 0, r));
      }
    }
    for (int64_t c = 0; c < s.C; ++c) compare("spmm_t", s, y.at(v, 0, c), sums[c], v, 0, c);
  }
  check_gaps("spmm_t", y.array, s.V * s.C);
}
#endif

}  // namespace
}  // namespace drawn

int main(int, char** arguments) {
  drawn::Chance chance{strtoull(arguments[2], nullptr, 10)};
  for (int i = atoi(arguments[1]); i > 0; --i) {
    drawn::check_spmm(chance);
    drawn::check_sddmm(chance);
#if BLOCK == 1
    drawn::check_spmm_t(chance);
#endif
  }
}
