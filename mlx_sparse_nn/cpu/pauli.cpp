// Sums of Pauli strings times states, and the moments of strings, without a matrix; see kernels.h.
// ELEMENT is float or double.
//
// A span is U vectors of W lanes, one after the other: as many sums as registers hold. A string
// takes it from another span of x, with vectors and lanes in another order. So a product reads x
// once for each string, from the cache nearest for most bits, and writes each sum once.
//
// Order of sums: of a product, the diagonal first, then the strings by the lanes that they flip, in
// order. Of moments, lanes and vectors of a chunk of CHUNK places, then chunks, in double. Neither
// depends on the number of threads.

#include <algorithm>
#include <utility>

#include "kernels.h"
#include "share.h"
#include "vectors.h"

#define INLINED __attribute__((always_inline))  // of a lambda

namespace mlx_sparse_nn {
namespace {

typedef ELEMENT Element;
constexpr int W = LANES<Element>;
constexpr int U = REGISTERS / 2;
constexpr int64_t SPAN = W * U;
constexpr int64_t CHUNK = 4096;
constexpr int SUMS = 4;  // that additions of moments take turns in
typedef vec<Element, W> Vector;

INLINE bool is_odd(int64_t bits) { return __builtin_popcountll(bits) & 1; }

// A string, as it acts on spans.
struct String {
  int64_t flips;          // spans: bits of m_t above SPAN
  int64_t signs;          // likewise of z_t
  int32_t vectors;        // bits of m_t that flip vectors of a span
  uint32_t odd;           // bit u: whether z_t gives -1 to what comes to vector u, by its number
  Element weights[2][W];  // c_t times the sign of each lane; and -1 times that
};

// Strings of a sum that flip the same lanes.
struct Group {
  int64_t end;  // the first string that is of another one
  int32_t lanes;
  bool is_signed;
};

// A sum of strings: in groups, in one order for all sums of the same strings.
struct Sum {
  const String* strings;
  const Group* groups;
  int64_t n_groups;
};

String string_of(int32_t m, int32_t z, Element c) {
  String s{};
  s.flips = m & ~(SPAN - 1);
  s.signs = z & ~(SPAN - 1);
  s.vectors = m / W % U;
  const int lanes = m % W;
  for (int u = 0; u < U; ++u) s.odd |= uint32_t(is_odd(~(u ^ s.vectors) & (z / W % U))) << u;
  for (int lane = 0; lane < W; ++lane) {
    s.weights[0][lane] = is_odd(~(lane ^ lanes) & (z % W)) ? -c : c;
    s.weights[1][lane] = -s.weights[0][lane];
  }
  return s;
}

// Writes strings by groups, and where each one was before.
int64_t group(const int32_t* terms, int64_t n_terms, int64_t* order, Group* groups) {
  int64_t n_groups = 0, n = 0;
  for (int key = 0; key < 2 * W; ++key) {
    const int64_t before = n;
    for (int64_t t = 0; t < n_terms; ++t) {
      if (terms[2 * t] % W * 2 + (terms[2 * t + 1] != 0) == key) order[n++] = t;
    }
    if (n > before) groups[n_groups++] = {n, key / 2, key % 2 != 0};
  }
  return n_groups;
}

// Elements that fill whole lines of the cache.
template <class T>
constexpr int64_t lines(int64_t n) {
  return (n * int64_t(sizeof(T)) + 63) / 64 * 64 / int64_t(sizeof(T));
}

// What a product notes of its strings.
struct Scratch {
  Group* groups;
  int64_t* order;
  String* strings;

  Scratch(void* start, int64_t n_terms) {
    groups = static_cast<Group*>(start);
    order = reinterpret_cast<int64_t*>(groups + 2 * W);
    strings = reinterpret_cast<String*>(order + lines<int64_t>(n_terms));
  }
  static size_t bytes(int64_t n_terms, int64_t n_strings) {
    return 2 * W * sizeof(Group) + lines<int64_t>(n_terms) * sizeof(int64_t) +
           n_strings * sizeof(String);
  }
};

template <int FLIPPED, int... LANE>
INLINE Vector flip(Vector x, std::integer_sequence<int, LANE...>) {
  return shuffle<Element, W, (LANE ^ FLIPPED)...>(x);
}
template <int FLIPPED>
INLINE Vector flip(Vector x) {
  return flip<FLIPPED>(x, std::make_integer_sequence<int, W>{});
}

// Returns f(lanes), of a constant. FLIPPED and BIT: what is known of it so far, and the bit that is
// asked for next.
template <int FLIPPED = 0, int BIT = W / 2, class F>
INLINE auto by_lanes(int lanes, const F& f) {
  if constexpr (BIT == 0) {
    return f(std::integral_constant<int, FLIPPED>());
  } else {
    if (lanes & BIT) return by_lanes<FLIPPED | BIT, BIT / 2>(lanes, f);
    return by_lanes<FLIPPED, BIT / 2>(lanes, f);
  }
}

// Adds to the sums of a span what strings that flip these lanes give.
template <int FLIPPED, bool SIGNED>
INLINE void add(Vector (&acc)[U], const String* s, const String* end, const Element* x,
                int64_t span) {
  for (; s < end; ++s) {
    const Element* from = x + (span ^ s->flips);
    if constexpr (SIGNED) {
      const uint32_t odd = s->odd ^ -uint32_t(is_odd(~(span ^ s->flips) & s->signs));
#pragma GCC unroll 16
      for (int u = 0; u < U; ++u) {
        const Vector weights = load<W>(s->weights[odd >> u & 1]);
        acc[u] += weights * flip<FLIPPED>(load<W>(from + (u ^ s->vectors) * W));
      }
    } else {
      const Vector weights = load<W>(s->weights[0]);
      if (s->vectors == 0) {
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u) {
          acc[u] += weights * flip<FLIPPED>(load<W>(from + u * W));
        }
      } else {
#pragma GCC unroll 16
        for (int u = 0; u < U; ++u) {
          acc[u] += weights * flip<FLIPPED>(load<W>(from + (u ^ s->vectors) * W));
        }
      }
    }
  }
}

// W / 2 numbers, each for both parts.
template <int... LANE>
INLINE Vector twice(const Element* p, std::integer_sequence<int, LANE...>) {
  const auto half = load<W / 2>(p);
  return shuffle<Element, W, (LANE / 2)...>(join<Element, W / 2>(half, half));
}
INLINE Vector twice(const Element* p) { return twice(p, std::make_integer_sequence<int, W>{}); }

INLINE void multiply_span(const Sum& sum, const Element* diagonal, int64_t parts, const Element* x,
                          int64_t span, Element* out) {
  Vector acc[U] = {};
  if (diagonal) {
#pragma GCC unroll 16
    for (int u = 0; u < U; ++u) {
      const int64_t i = span + u * W;
      const Vector factors = parts == 1 ? load<W>(diagonal + i) : twice(diagonal + i / 2);
      acc[u] = factors * load<W>(x + i);
    }
  }
  const String* s = sum.strings;
  for (const Group* g = sum.groups; g < sum.groups + sum.n_groups; ++g) {
    const String* end = sum.strings + g->end;
    by_lanes(g->lanes, [&](auto lanes) INLINED {
      if (g->is_signed) {
        add<lanes.value, true>(acc, s, end, x, span);
      } else {
        add<lanes.value, false>(acc, s, end, x, span);
      }
    });
    s = end;
  }
#pragma GCC unroll 16
  for (int u = 0; u < U; ++u) store<W>(out + span + u * W, acc[u]);
}

void multiply(const PauliProduct& p) {
  const Element* c = static_cast<const Element*>(p.coefficients);
  Scratch scratch(p.scratch, p.n_terms);
  const int64_t n_groups = group(p.terms, p.n_terms, scratch.order, scratch.groups);
  for (int64_t v = 0; v < p.V; ++v) {
    for (int64_t n = 0; n < p.n_terms; ++n) {
      const int64_t t = scratch.order[n];
      scratch.strings[v * p.n_terms + n] =
          string_of(p.terms[2 * t], p.terms[2 * t + 1], c[v * p.n_terms + t]);
    }
  }
  const int64_t n_spans = std::max<int64_t>(p.size / SPAN, 1), width = p.size / p.parts;
  const int64_t total = p.V * p.N * n_spans;
  const double work = double(total) * SPAN * (p.n_terms + 1);
  share(p.crew, total, work, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t state = i / n_spans, v = state / p.N;
      const Sum sum = {scratch.strings + v * p.n_terms, scratch.groups, n_groups};
      const Element* x = static_cast<const Element*>(p.x) + state * p.size;
      Element* out = static_cast<Element*>(p.out) + state * p.size;
      const Element* diagonal =
          p.diagonal ? static_cast<const Element*>(p.diagonal) + v * width : nullptr;
      if (p.size >= SPAN) {
        multiply_span(sum, diagonal, p.parts, x, i % n_spans * SPAN, out);
      } else {  // a span that is filled up
        alignas(64) Element filled[3][SPAN] = {};
        std::copy(x, x + p.size, filled[0]);
        if (diagonal) std::copy(diagonal, diagonal + width, filled[1]);
        multiply_span(sum, diagonal ? filled[1] : nullptr, p.parts, filled[0], 0, filled[2]);
        std::copy(filled[2], filled[2] + p.size, out);
      }
    }
  });
}

// Chunks of a state.
int64_t chunks(const PauliMoments& p) { return std::max<int64_t>(p.size / CHUNK, 1); }

// The sum of u[i] s(i ^ m) x[i ^ m] over the spans of [begin, end).
template <int FLIPPED, bool SIGNED>
INLINE double moment(const String& s, const Element* u, const Element* x, int64_t begin,
                     int64_t end) {
  Vector acc[SUMS] = {};
  for (int64_t span = begin; span < end; span += SPAN) {
    const Element* from = x + (span ^ s.flips);
    const uint32_t odd = s.odd ^ -uint32_t(is_odd(~(span ^ s.flips) & s.signs));
#pragma GCC unroll 16
    for (int i = 0; i < U; ++i) {
      Vector factor = load<W>(u + span + i * W);
      if constexpr (SIGNED) factor *= load<W>(s.weights[odd >> i & 1]);
      acc[i % SUMS] += factor * flip<FLIPPED>(load<W>(from + (i ^ s.vectors) * W));
    }
  }
  return total<Element, W>((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

void take_moments(const PauliMoments& p) {
  const int64_t n_chunks = chunks(p), n_terms = p.n_terms;
  const int64_t chunk = std::max(p.size / n_chunks, SPAN), total = p.V * p.N * n_chunks;
  double* partial = static_cast<double*>(p.scratch);
  String* strings = reinterpret_cast<String*>(partial + lines<double>(total * n_terms));
  for (int64_t t = 0; t < n_terms; ++t) {
    strings[t] = string_of(p.terms[2 * t], p.terms[2 * t + 1], 1);
  }
  const double work = double(total) * chunk * n_terms;
  share(p.crew, total, work, [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % n_chunks * chunk;
      const Element* u = static_cast<const Element*>(p.u) + i / n_chunks * p.size;
      const Element* x = static_cast<const Element*>(p.x) + i / n_chunks * p.size;
      alignas(64) Element filled[2][SPAN] = {};
      if (p.size < SPAN) {
        u = std::copy(u, u + p.size, filled[0]) - p.size;
        x = std::copy(x, x + p.size, filled[1]) - p.size;
      }
      for (int64_t t = 0; t < n_terms; ++t) {
        const bool is_signed = p.terms[2 * t + 1] != 0;
        partial[i * n_terms + t] = by_lanes(p.terms[2 * t] % W, [&](auto lanes) INLINED {
          const String& s = strings[t];
          return is_signed ? moment<lanes.value, true>(s, u, x, begin, begin + chunk)
                           : moment<lanes.value, false>(s, u, x, begin, begin + chunk);
        });
      }
    }
  });
  Element* out = static_cast<Element*>(p.out);
  for (int64_t v = 0; v < p.V; ++v) {
    for (int64_t t = 0; t < n_terms; ++t) {
      double sum = 0;
      for (int64_t i = v * p.N * n_chunks; i < (v + 1) * p.N * n_chunks; ++i) {
        sum += partial[i * n_terms + t];
      }
      out[v * n_terms + t] = Element(sum);
    }
  }
}

}  // namespace

MLX_SPARSE_EXPORT size_t pauli_product_scratch(const PauliProduct* p) {
  return Scratch::bytes(p->n_terms, p->V * p->n_terms);
}
MLX_SPARSE_EXPORT void pauli_product(const PauliProduct* p) { multiply(*p); }

MLX_SPARSE_EXPORT size_t pauli_moments_scratch(const PauliMoments* p) {
  return lines<double>(p->V * p->N * chunks(*p) * p->n_terms) * sizeof(double) +
         p->n_terms * sizeof(String);
}
MLX_SPARSE_EXPORT void pauli_moments(const PauliMoments* p) { take_moments(*p); }

}  // namespace mlx_sparse_nn
