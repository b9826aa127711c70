// Runs the product by quantized blocks on drawn cases, and compares it with naive loops that read
// packed integers bit by bit. Values are whole numbers, so that sums are exact and only their
// rounding is left. Crews of one and of four have to give the same bits. Linked with quantized.cpp,
// and compiled for the same ELEMENT and BITS.
//
//   quantized_products CASES SEED

#include "drawn.h"

namespace mlx_sparse_nn {

extern "C" {
size_t qspmm_scratch(const QuantizedProduct* q);
void qspmm(const QuantizedProduct* q);
}

}  // namespace mlx_sparse_nn

namespace drawn {
namespace {

using E = ELEMENT;

constexpr int64_t MOST_WORK = 1000000;  // multiply-adds of a case

struct Sizes {
  int64_t B, group, R, C, V, N;

  explicit Sizes(Chance& chance) {
    B = chance.of({32, 32, 64, 96, 128, 160});
    do group = chance.of({32, 64, 128});
    while (B % group);
    R = chance.from(1, 1 + 256 / B);
    C = chance.from(1, 1 + 256 / B);
    V = chance.one_in(3) ? 3 : 1;
    N = chance.one_in(2) ? chance.from(1, 10) : chance.from(1, 70);
    if (chance.one_in(10)) N = chance.from(125, 140);
  }
  int64_t most_blocks() const { return 4 + MOST_WORK / (B * B * V * N); }
};

// Integer i of packed ones that begin at a word.
int64_t integer(const uint32_t* packed, int64_t i) {
  int64_t value = 0;
  for (int64_t bit = 0; bit < BITS; ++bit) {
    const int64_t at = i * BITS + bit;
    value |= int64_t(packed[at / 32] >> at % 32 & 1) << bit;
  }
  return value;
}

void fail(const char* what, const Sizes& s) {
  printf("%s: B = %d, group = %d, R = %d, C = %d, V = %d, N = %d\n", what, int(s.B), int(s.group),
         int(s.R), int(s.C), int(s.V), int(s.N));
  exit(1);
}

void check(Chance& chance) {
  const Sizes s(chance);
  const bool transposed = chance.one_in(2), has_bias = chance.one_in(2);
  Pattern pattern(chance, s.R, s.C, s.B, s.most_blocks(), 0);
  const int64_t n_blocks = pattern.n_blocks, size = s.B * s.B, groups = size / s.group;
  const int64_t n_rows = pattern.n_rows;
  Array<uint32_t> packed(s.V * n_blocks * size * BITS / 32);
  Array<E> scales(s.V * n_blocks * groups), biases(scales.size), bias(n_rows);
  for (size_t i = 0; i < packed.size; ++i) packed[i] = uint32_t(chance.next());
  for (int64_t v = 0; v < s.V; ++v) {
    for (int64_t r = 0; r < s.R; ++r) {
      for (int64_t j = pattern.indptr[r]; j < pattern.indptr[r + 1]; ++j) {
        const int64_t height = pattern.height(r), width = pattern.width(j);
        const int64_t block = v * n_blocks + (transposed ? pattern.perm[j] : j);
        // Groups that lie past the matrix have no numbers.
        for (int64_t i = 0; i < (transposed ? width : height); ++i) {
          for (int64_t k = 0; k < (transposed ? height : width); k += s.group) {
            const int64_t at = block * groups + (i * s.B + k) / s.group;
            scales[at] = element<E>({double(chance.from(-1, 1)), 0});
            biases[at] = chance.small<E>();
          }
        }
      }
    }
  }
  for (size_t i = 0; i < bias.size; ++i) bias[i] = chance.small<E>();
  Matrices<E> x(chance, s.V, s.N, pattern.n_cols, false), y(chance, s.V, s.N, n_rows, true);
  x.fill(chance);

  const Csr a = pattern.csr(transposed);
  const Product p = {
      a, packed.values, has_bias ? bias.values : nullptr, x.rows, y.rows, s.V, s.N, nullptr, {}};
  QuantizedProduct q = {p, scales.values, biases.values, BITS, s.group};
  Array<E> alone(y.array.size);
  for (const Crew& crew : {Threads<1>::crew(), Threads<4>::crew()}) {
    q.product.crew = crew;
    Array<char> scratch(qspmm_scratch(&q));
    q.product.scratch = scratch.values;
    y.array.clear();
    qspmm(&q);
    if (crew.size == 1) memcpy(alone.values, y.array.values, alone.size * sizeof(E));
  }
  if (memcmp(alone.values, y.array.values, alone.size * sizeof(E))) {
    fail("a crew of four gave other bits than one thread", s);
  }

  Array<double> values(s.V * n_blocks * size);
  for (size_t i = 0; i < values.size; ++i) {
    const int64_t at = i / s.group;
    values[i] = number(scales[at]).re * integer(packed.values, i) + number(biases[at]).re;
  }
  for (int64_t v = 0; v < s.V; ++v) {
    for (int64_t n = 0; n < s.N; ++n) {
      for (int64_t row = 0; row < n_rows; ++row) {
        const int64_t r = row / s.B, o = row % s.B;
        double sum = has_bias ? number(bias[row]).re : 0;
        for (int64_t j = pattern.indptr[r]; j < pattern.indptr[r + 1]; ++j) {
          const int64_t place = v * n_blocks + (transposed ? pattern.perm[j] : j);
          for (int64_t k = 0; k < pattern.width(j); ++k) {
            const int64_t at = place * size + (transposed ? k * s.B + o : o * s.B + k);
            sum += values[at] * number(x.at(v, n, pattern.indices[j] * s.B + k)).re;
          }
        }
        E& got = y.at(v, n, row);
        if (number(got).re != rounded<E>(sum)) {
          printf("[%d, %d, %d] is %g, not %g\n", int(v), int(n), int(row), number(got).re, sum);
          fail(transposed ? "transposed" : "not transposed", s);
        }
        memset(&got, 0xFF, sizeof got);
      }
    }
  }
  Array<E> nothing(y.array.size);
  if (memcmp(nothing.values, y.array.values, nothing.size * sizeof(E))) {
    fail("written outside of the result", s);
  }
}

}  // namespace
}  // namespace drawn

int main(int, char** arguments) {
  drawn::Chance chance{strtoull(arguments[2], nullptr, 10)};
  for (int i = atoi(arguments[1]); i > 0; --i) drawn::check(chance);
}
