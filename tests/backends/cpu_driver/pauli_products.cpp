// Runs sums of Pauli strings, and their moments, on drawn cases, and compares them with loops over
// places and strings. Values are whole numbers, so that sums are exact. Crews of one and of four
// have to give the same bits. Linked with pauli.cpp, and compiled for the same ELEMENT.
//
//   pauli_products CASES SEED

#include "drawn.h"

namespace mlx_sparse_nn {

extern "C" {
size_t pauli_product_scratch(const PauliProduct* p);
void pauli_product(const PauliProduct* p);
size_t pauli_moments_scratch(const PauliMoments* p);
void pauli_moments(const PauliMoments* p);
}

}  // namespace mlx_sparse_nn

namespace drawn {
namespace {

using E = ELEMENT;

constexpr int64_t MOST_WORK = 400000;  // multiply-adds of a case

struct Case {
  int64_t n_bits, n_terms, V, N;
  bool is_signed;

  explicit Case(Chance& chance) {
    n_bits = chance.one_in(4) ? chance.from(10, 15) : chance.from(1, 9);
    V = chance.one_in(3) ? 3 : 1;
    N = chance.one_in(3) ? chance.from(2, 5) : 1;
    const int64_t most = MOST_WORK / (V * N << n_bits);
    n_terms = chance.from(1, most < 1 ? 1 : most < 40 ? most : 40);
    is_signed = chance.one_in(2);
  }
  int64_t size() const { return int64_t(1) << n_bits; }
};

void fail(const char* what, const Case& c) {
  printf("%s: n_bits = %d, n_terms = %d, V = %d, N = %d, signed = %d\n", what, int(c.n_bits),
         int(c.n_terms), int(c.V), int(c.N), int(c.is_signed));
  exit(1);
}

void fill(Chance& chance, Array<E>& values) {
  for (size_t i = 0; i < values.size; ++i) values[i] = chance.small<E>();
}

// Computes with one thread and with four, and asks for the same bits.
template <class Arguments>
void compute(void (*kernel)(const Arguments*), size_t (*bytes)(const Arguments*), Arguments p,
             Array<E>& out, const Case& c) {
  Array<E> alone(out.size);
  for (const Crew& crew : {Threads<1>::crew(), Threads<4>::crew()}) {
    p.crew = crew;
    Array<char> scratch(bytes(&p));
    p.scratch = scratch.values;
    out.clear();
    kernel(&p);
    if (crew.size == 1) memcpy(alone.values, out.values, out.size * sizeof(E));
  }
  if (memcmp(alone.values, out.values, out.size * sizeof(E))) {
    fail("a crew of four gave other bits than one thread", c);
  }
}

void same(E got, double expected, const char* what, const Case& c) {
  if (got == expected) return;
  printf("%s is %g, not %g\n", what, double(got), expected);
  fail(what, c);
}

void check(Chance& chance) {
  const Case c(chance);
  const int64_t size = c.size(), n_states = c.V * c.N;
  const int64_t parts = c.n_bits > 1 && chance.one_in(3) ? 2 : 1;
  Array<int32_t> terms(2 * c.n_terms);
  for (int64_t t = 0; t < c.n_terms; ++t) {
    const int64_t drawn = chance.from(1, size - 1), bit = chance.from(0, c.n_bits - 1);
    terms[2 * t] = int32_t(chance.one_in(2) ? drawn : int64_t(1) << bit);
    terms[2 * t + 1] = int32_t(c.is_signed ? chance.from(0, size - 1) : 0);
  }
  auto sign = [&](int64_t j, int64_t t) {
    return __builtin_popcountll(~j & terms[2 * t + 1]) % 2 ? -1 : 1;
  };
  Array<E> coefficients(c.V * c.n_terms), diagonal(c.V * size / parts);
  Array<E> x(n_states * size), u(n_states * size), out(n_states * size), sums(c.V * c.n_terms);
  for (Array<E>* values : {&coefficients, &diagonal, &x, &u}) fill(chance, *values);
  const bool has_diagonal = chance.one_in(2);

  PauliProduct p{};
  p.terms = terms.values;
  p.coefficients = coefficients.values;
  p.diagonal = has_diagonal ? diagonal.values : nullptr;
  p.x = x.values;
  p.out = out.values;
  p.n_terms = c.n_terms;
  p.V = c.V;
  p.N = c.N;
  p.size = size;
  p.parts = parts;
  compute(pauli_product, pauli_product_scratch, p, out, c);
  for (int64_t state = 0; state < n_states; ++state) {
    const int64_t v = state / c.N;
    for (int64_t i = 0; i < size; ++i) {
      double sum = has_diagonal ? diagonal[(v * size + i) / parts] * x[state * size + i] : 0;
      for (int64_t t = 0; t < c.n_terms; ++t) {
        const int64_t j = i ^ terms[2 * t];
        sum += coefficients[v * c.n_terms + t] * sign(j, t) * x[state * size + j];
      }
      same(out[state * size + i], sum, "a place of a product", c);
    }
  }

  PauliMoments m{};
  m.terms = terms.values;
  m.u = u.values;
  m.x = x.values;
  m.out = sums.values;
  m.n_terms = c.n_terms;
  m.V = c.V;
  m.N = c.N;
  m.size = size;
  compute(pauli_moments, pauli_moments_scratch, m, sums, c);
  for (int64_t v = 0; v < c.V; ++v) {
    for (int64_t t = 0; t < c.n_terms; ++t) {
      double sum = 0;
      for (int64_t state = v * c.N; state < (v + 1) * c.N; ++state) {
        for (int64_t i = 0; i < size; ++i) {
          const int64_t j = i ^ terms[2 * t];
          sum += u[state * size + i] * sign(j, t) * x[state * size + j];
        }
      }
      same(sums[v * c.n_terms + t], sum, "a moment", c);
    }
  }
}

}  // namespace
}  // namespace drawn

int main(int, char** arguments) {
  drawn::Chance chance{strtoull(arguments[2], nullptr, 10)};
  for (int i = atoi(arguments[1]); i > 0; --i) drawn::check(chance);
}
