// The products of scalars (B = 1), compiled with -DELEMENT=float, float16, bfloat16, double or
// complex64. Letters as in ../metal/README.md.
//
// spmm     y[v, n, r] = bias[r] + sum of data[v, j] x[v, n, indices[j]] over the entries j of row
//          r; data[v, perm[j]] of the transpose
// spmm_t   y[v, 0, indices[j]] += data[v, j] x[v, 0, r] over all entries, r the row of j
// sddmm    out[v, j] = sum over n of y[v, n, r] x[v, n, indices[j]]
//
// The lanes of vectors are rows of x. An entry takes from a panel, (n_cols, lanes), the row of its
// column. Where neighbours in a column of x are neighbours in memory, x is a panel as it lies;
// else it is packed, widened, some rows at a time. A single row of x is gathered from, G values at
// once. A complex number is two lanes, and not conjugated.
//
// Sums in float32, or in float64 of float64. In spmm each lane adds its entries in stored order,
// to two sums in turn where vectors are few, and a single row to G of them; rows of more than LONG
// entries are cut, and the sums of the cuts added in order; the bias comes last. In spmm_t parts of
// all entries are summed apart, and their sums added in order. The cuts and the parts follow from
// the pattern alone. In sddmm each lane adds its products in order, then lanes are added by halves.

#include <type_traits>

#include "copy.h"
#include "share.h"

namespace mlx_sparse_nn {
namespace {

using Element = ELEMENT;
constexpr bool COMPLEX = std::is_same_v<Element, complex64>;
constexpr int PARTS = COMPLEX ? 2 : 1;  // lanes of a number
using Lane = std::conditional_t<std::is_same_v<Element, double>, double, float>;

// A number as it is moved: complex ones whole, in the type that has their size.
using Item = std::conditional_t<COMPLEX, double, Element>;
using Wide = std::conditional_t<COMPLEX, double, Lane>;
constexpr bool NARROW = sizeof(Item) < sizeof(Wide);

constexpr int W = LANES<Lane>;
constexpr int MAX_VECTORS = REGISTERS / 4;  // whose sums stay in registers
constexpr int TILE = LANES<Wide>;
constexpr int ROWS = 16;  // of A whose sums are written together
constexpr int64_t LONG = 8192;
constexpr int64_t MAX_PARTS = 16;
// Terms from what is computed to what is fetched: of their own arrays, and of wide rows of x.
constexpr int64_t AHEAD = 512;
constexpr int64_t LINE = 16;  // indices of a cache line
constexpr int64_t ROWS_AHEAD = 4;
constexpr int64_t IN_CACHE = 1 << 21;        // terms up to which their arrays are not fetched ahead
constexpr int64_t MAX_ROWS = 4 * W / PARTS;  // of x that are packed

// ---- lanes

using Bits = std::conditional_t<sizeof(Lane) == 4, int32_t, int64_t>;
template <int L>
INLINE vec<Bits, L> lane_numbers() {
  vec<Bits, L> lane;
  for (int l = 0; l < L; ++l) lane[l] = l;
  return lane;
}
// The lanes where `kept` has ones, and zeros.
template <int L>
INLINE vec<Lane, L> keep(vec<Lane, L> value, vec<Bits, L> kept) {
  return bit_cast<vec<Lane, L>>(bit_cast<vec<Bits, L>>(value) & kept);
}

// i x of the complex numbers in x.
template <int L>
INLINE vec<Lane, L> times_i(vec<Lane, L> x) {
  vec<Lane, L> re = x, im = x;
  swap_lanes<Lane, L, 1>(re, im, std::make_integer_sequence<int, L>{});
  im = -im;
  swap_lanes<Lane, L, 1>(im, re, std::make_integer_sequence<int, L>{});
  return im;
}

// The conjugates of the complex numbers in x.
template <int L>
INLINE vec<Lane, L> conjugates(vec<Lane, L> x) {
  const vec<Bits, L> sign = (lane_numbers<L>() & 1) << 31;
  return bit_cast<vec<Lane, L>>(bit_cast<vec<Bits, L>>(x) ^ sign);
}

// Adds lanes l and l + S of each 2 S lanes of a, and of b: of a to the lower S, of b to the upper.
template <int S, int L>
INLINE vec<Lane, L> fold(vec<Lane, L> a, vec<Lane, L> b) {
  swap_lanes<Lane, L, S>(a, b, std::make_integer_sequence<int, L>{});
  return a + b;
}

// ---- panels

bool is_panel(const Rows& x, int64_t N) { return !NARROW && (N == 1 || x.n_step == 1); }
// The same of x, where the values of a single row have to lie side by side.
bool x_is_panel(const Rows& x, int64_t N) {
  return is_panel(x, N) && (N > 1 || COMPLEX || x.c_step == 1);
}

// N rows of x from n0 on, as a panel: in place, or packed into scratch.
struct Panel {
  const Lane* values;
  int64_t step;
};
Panel panel_of(const Crew& crew, const Rows& x, int64_t v, int64_t n0, int64_t N, int64_t n_cols,
               bool in_place, Wide* scratch) {
  const Item* from = static_cast<const Item*>(x.values) + v * x.v_step + n0 * x.n_step;
  if (in_place) return {reinterpret_cast<const Lane*>(from), x.c_step * PARTS};
  share(crew, (n_cols + TILE - 1) / TILE, double(N) * double(n_cols),
        [&](int64_t begin, int64_t end, int) {
          const int64_t c = begin * TILE, n_c = std::min(end * TILE, n_cols) - c;
          const Item* x_c = from + c * x.c_step;
          if (N == 1) {
            gather(x_c, 0, x.c_step, 1, n_c, scratch + c, 0, n_c);
          } else {
            gather(x_c, x.c_step, x.n_step, n_c, N, scratch + c * N, N, N);
          }
        });
  return {reinterpret_cast<const Lane*>(scratch), N * PARTS};
}

// ---- spmm

// Calls f with n as a type, of I to MAX.
template <int I, int MAX, class F>
void with_count(int64_t n, const F& f) {
  if constexpr (I < MAX) {
    if (n > I) return with_count<I + 1, MAX>(n, f);
  }
  f(std::integral_constant<int, I>());
}
// Calls f with the lanes of a vector as a type: at most W, and at most `width`.
template <int L = W, class F>
void with_lanes(int64_t width, const F& f) {
  if constexpr (L > PARTS) {
    if (width < L) return with_lanes<L / 2>(width, f);
  }
  f(std::integral_constant<int, L>());
}
// And with the vectors of a part, all of which cover `width` lanes.
template <class F>
void with_vectors(int64_t width, const F& f) {
  with_lanes(width, [&](auto lanes) {
    constexpr int L = decltype(lanes)::value, MAX = L == W ? MAX_VECTORS : L > PARTS ? 2 : 1;
    const int64_t vectors = (width + L - 1) / L, parts = (vectors + MAX - 1) / MAX;
    with_count<1, MAX>((vectors + parts - 1) / parts, [&](auto count) { f(lanes, count); });
  });
}

// A stored value or a bias as one lane or two.
struct Parts {
  Lane of[PARTS];
};
template <class E>
INLINE Parts parts_of(const E& value) {
  if constexpr (COMPLEX) {
    return {{value.re, value.im}};
  } else {
    return {{widen(value)}};
  }
}

// What sums are made of: sum of data[j] x[indices[j]][l], j of the transpose at perm[j].
struct Terms {
  const Element* data;
  const int32_t* indices;
  const int32_t* perm;  // or null
  int64_t n_blocks;
  Panel x;
  int64_t width;  // lanes of x
};

// Sums of n rows of A, row i over the terms [begins[i], ends[i]), plus bias[i]; `step` lies between
// their sums. Rows of more than LONG terms are left out.
using SumRows = void(const Terms& t, const int32_t* begins, const int32_t* ends, int64_t n,
                     const Element* bias, Lane* sums, int64_t step);

// In parts of Q vectors of L lanes. The last part ends with the lanes, as does the last vector of a
// part that is alone: lanes that they have in common with those before are computed again.
template <int L, int Q>
void sum_rows(const Terms& t, const int32_t* begins, const int32_t* ends, int64_t n,
              const Element* bias, Lane* sums, int64_t step) {
  constexpr int SUMS = Q * PARTS < 4 ? 2 : 1;
  constexpr bool IS_WIDE = Q >= 4;
  const Element* data = t.data;
  const int32_t *indices = t.indices, *perm = t.perm;
  const int64_t x_step = t.x.step, last_part = std::max<int64_t>(0, t.width - Q * L);
  const int64_t last = std::min<int64_t>((Q - 1) * L, t.width - L);
  for (int64_t r = 0; r < n; ++r, sums += step) {
    const int64_t begin = begins[r], end = ends[r];
    if (end - begin > LONG) continue;
    for (int64_t part = 0; part < t.width; part += Q * L) {
      const int64_t first = std::min(part, last_part);
      const Lane* x = t.x.values + first;
      vec<Lane, L> acc[SUMS][PARTS][Q] = {};
      auto add = [&](int64_t j, vec<Lane, L>(&to)[PARTS][Q]) __attribute__((always_inline)) {
        const Lane* row = x + int64_t(indices[j]) * x_step;
        const Parts w = parts_of(data[perm ? perm[j] : j]);
        const int64_t ahead = std::min(j + ROWS_AHEAD, t.n_blocks - 1);
        const Lane* next = x + int64_t(indices[ahead]) * x_step;
#pragma GCC unroll 8
        for (int q = 0; q < Q; ++q) {
          if (IS_WIDE) __builtin_prefetch(next + q * L);
          const vec<Lane, L> values = load<L>(row + (q + 1 < Q ? q * L : last));
#pragma GCC unroll 2
          for (int i = 0; i < PARTS; ++i) to[i][q] += w.of[i] * values;
        }
      };
      int64_t j = begin;
      for (; j + SUMS <= end; j += SUMS) {
#pragma GCC unroll 4
        for (int s = 0; s < SUMS; ++s) add(j + s, acc[s]);
      }
      for (; j < end; ++j) add(j, acc[0]);
#pragma GCC unroll 8
      for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 4
        for (int s = 1; s < SUMS; ++s) {
#pragma GCC unroll 2
          for (int i = 0; i < PARTS; ++i) acc[0][i][q] += acc[s][i][q];
        }
        vec<Lane, L> sum = acc[0][0][q];
        if constexpr (COMPLEX && L > 1) sum += times_i<L>(acc[0][PARTS - 1][q]);
        if (bias) {
          const Parts add = parts_of(bias[r]);
          vec<Lane, L> lanes;
          for (int l = 0; l < L; ++l) lanes[l] = add.of[l % PARTS];
          sum += lanes;
        }
        store<L>(sums + first + (q + 1 < Q ? q * L : last), sum);
      }
    }
  }
}

// G values from their places, which are read in pairs, because loads are what there are most of.
constexpr int G = W < 4 ? W : 4;
template <class E>
INLINE vec<Lane, G> values_at(const E* from, const int32_t* places) {
  uint64_t pairs[G / 2];
  memcpy(pairs, places, sizeof pairs);
  vec<Lane, G> values = {};
#pragma GCC unroll 4
  for (int i = 0; i < G / 2; ++i) {
    values[2 * i] = widen(from[uint32_t(pairs[i])]);
    values[2 * i + 1] = widen(from[pairs[i] >> 32]);
  }
  return values;
}

// The totals of G vectors, each as by total().
INLINE vec<Lane, G> totals_of(const vec<Lane, G> (&sums)[G]) {
  if constexpr (G == 4) {
    return fold<1, G>(fold<2, G>(sums[0], sums[2]), fold<2, G>(sums[1], sums[3]));
  } else {
    return fold<1, G>(sums[0], sums[1]);
  }
}

// G products of stored values, from j on, with a single row of x.
template <bool PERM, class E>
INLINE vec<Lane, G> products_at(const E* data, const int32_t* indices, const int32_t* perm,
                                const Lane* x, int64_t j) {
  if constexpr (PERM) {
    return values_at(data, perm + j) * values_at(x, indices + j);
  } else {
    return load<G>(data + j) * values_at(x, indices + j);
  }
}

// Their sums over [j, end), lane by lane. The end is not a loop of its own, which would be
// mispredicted: a whole step is computed, and what is past the end dropped.
template <bool PERM, class E>
INLINE vec<Lane, G> sum_products(const E* data, const int32_t* indices, const int32_t* perm,
                                 const Lane* x, int64_t j, int64_t end) {
  vec<Lane, G> acc = {};
  for (; j + G < end; j += G) acc += products_at<PERM>(data, indices, perm, x, j);
  return acc +
         keep<G>(products_at<PERM>(data, indices, perm, x, j), lane_numbers<G>() < Bits(end - j));
}

// Sums of the first rows of [0, n), as below and without bias: of G rows at a time, which are
// totalled together, while there are as many, short ones, whose last steps may be read. Returns how
// many rows that were.
template <bool PERM, bool FETCHES, class E>
__attribute__((noinline)) int64_t sum_groups(const Terms& t, const int32_t* begins,
                                             const int32_t* ends, int64_t n, Lane* sums) {
  const E* data = t.data;
  const int32_t *indices = t.indices, *perm = t.perm;
  const Lane* x = t.x.values;
  const int64_t last = t.n_blocks - G;
  int64_t r = 0;
  for (; r + G <= n; r += G) {
    if (ends[r + G - 1] > last || ends[r + G - 1] - begins[r] > LONG) break;
    vec<Lane, G> acc[G];
#pragma GCC unroll 4
    for (int i = 0; i < G; ++i) {
      if (const int64_t j = begins[r] + i * LINE; FETCHES && j < ends[r + G - 1]) {
        __builtin_prefetch(indices + j + AHEAD);
        __builtin_prefetch(PERM ? static_cast<const void*>(perm + j + AHEAD) : data + j + AHEAD);
      }
      acc[i] = sum_products<PERM>(data, indices, perm, x, begins[r + i], ends[r + i]);
    }
    store<G>(sums + r, totals_of(acc));
  }
  return r;
}

// The same as sum_rows for a single row of x, of numbers of one lane.
template <bool PERM, class E>
void sum_rows_of_one(const Terms& t, const int32_t* begins, const int32_t* ends, int64_t n,
                     const E* bias, Lane* sums, int64_t step) {
  const E* data = t.data;
  const int32_t *indices = t.indices, *perm = t.perm;
  const Lane* x = t.x.values;
  const auto groups =
      t.n_blocks > IN_CACHE ? sum_groups<PERM, true, E> : sum_groups<PERM, false, E>;
  for (int64_t r = 0; r < n;) {
    if (step == 1) {
      const int64_t n_rows = groups(t, begins + r, ends + r, n - r, sums + r);
      if (bias) {
        for (int64_t i = r; i < r + n_rows; ++i) sums[i] += widen(bias[i]);
      }
      r += n_rows;
    }
    for (const int64_t last = std::min(r + G, n); r < last; ++r) {
      int64_t j = begins[r];
      const int64_t end = ends[r];
      if (end - j > LONG) continue;
      Lane sum = 0;
      if (end + G <= t.n_blocks) {
        sum = total<Lane, G>(sum_products<PERM>(data, indices, perm, x, j, end));
      } else {
        vec<Lane, G> acc = {};
        for (; j + G < end; j += G) {
          acc += products_at<PERM>(data, indices, perm, x, j);
        }
        for (; j < end; ++j) sum += widen(data[PERM ? perm[j] : j]) * x[indices[j]];
        sum += total<Lane, G>(acc);
      }
      sums[r * step] = bias ? sum + widen(bias[r]) : sum;
    }
  }
}

// Where rows of more than LONG terms are cut: cut i is [begins[i], ends[i]) of `rows[i]`.
struct Cuts {
  int64_t n = 0;
  int32_t* rows;
  int32_t* begins;
  int32_t* ends;

  // Cuts the long ones of the rows in [begin, end).
  void add(const int32_t* indptr, int64_t begin, int64_t end) {
    if (indptr[end] - indptr[begin] <= LONG) return;
    if (end - begin > 1) {
      const int64_t middle = (begin + end) / 2;
      add(indptr, begin, middle);
      add(indptr, middle, end);
      return;
    }
    for (int64_t j = indptr[begin]; j < indptr[end]; j += LONG, ++n) {
      rows[n] = int32_t(begin);
      begins[n] = int32_t(j);
      ends[n] = int32_t(std::min<int64_t>(j + LONG, indptr[end]));
    }
  }
};

// Rows of x that are taken at once: at most `most`, and about as many each time.
int64_t rows_at_once(int64_t N, int64_t most) {
  const int64_t times = (N + most - 1) / most, n_lanes = W / PARTS;
  return std::min(N, (N + times * n_lanes - 1) / (times * n_lanes) * n_lanes);
}

// Rows of x in a panel: all where neither x nor y is copied.
bool in_place(const Rows& y, int64_t N) { return !NARROW && (N == 1 || y.n_step == 1); }
int64_t panel_rows(const Product& p) {
  const bool as_they_are = x_is_panel(p.x, p.N) && in_place(p.y, p.N);
  return as_they_are ? p.N : rows_at_once(p.N, MAX_ROWS);
}

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }
struct Scratch {
  size_t packed;   // bytes of a packed panel
  size_t cuts;     // of each array of Cuts: a row that is cut has two at least
  size_t partial;  // of the sums of cuts
};
Scratch scratch_of(const Product& p) {
  const size_t rows = panel_rows(p), n_cuts = 2 * (p.a.n_blocks / LONG);
  return {x_is_panel(p.x, p.N) ? 0 : aligned(p.a.C * rows * sizeof(Wide)),
          aligned(n_cuts * sizeof(int32_t)), aligned(n_cuts * rows * sizeof(Wide))};
}

// Rows of y from a panel of N rows of x: `y` is where the first of them begins.
void multiply_panel(const Product& p, const Terms& t, int64_t N, Item* y, SumRows* sum,
                    const Cuts& cuts, Lane* partial) {
  const int32_t* indptr = p.a.indptr;
  const int64_t width = t.width, y_step = p.y.c_step;
  const Element* bias = static_cast<const Element*>(p.bias);
  const double work = double(t.n_blocks) * double(width + 3);
  auto write = [&](const Lane* sums, int64_t r, int64_t n_rows) {
    const Wide* from = reinterpret_cast<const Wide*>(sums);
    if (N == 1) {
      scatter(from, 0, 1, n_rows, y + r * y_step, 0, y_step);
    } else {
      scatter(from, N, n_rows, N, y + r * y_step, y_step, p.y.n_step);
    }
  };
  share_rows(p.crew, indptr, p.a.R, work, [&](int64_t first, int64_t last, int) {
    auto rows = [&](int64_t r, int64_t n_rows, Lane* sums, int64_t step) {
      sum(t, indptr + r, indptr + r + 1, n_rows, bias ? bias + r : nullptr, sums, step);
    };
    if (in_place(p.y, N)) {
      return rows(first, last - first, reinterpret_cast<Lane*>(y + first * y_step), y_step * PARTS);
    }
    alignas(64) Lane sums[ROWS * MAX_ROWS * PARTS] = {};
    for (int64_t r = first; r < last; r += ROWS) {
      const int64_t n_rows = std::min<int64_t>(ROWS, last - r);
      rows(r, n_rows, sums, width);
      write(sums, r, n_rows);
    }
  });
  if (cuts.n == 0) return;
  share(p.crew, cuts.n, work, [&](int64_t first, int64_t last, int) {
    sum(t, cuts.begins + first, cuts.ends + first, last - first, nullptr, partial + first * width,
        width);
  });
  for (int64_t i = 0; i < cuts.n;) {
    const int64_t r = cuts.rows[i];
    Lane* sums = partial + i * width;
    for (++i; i < cuts.n && cuts.rows[i] == r; ++i) {
      for (int64_t l = 0; l < width; ++l) sums[l] += partial[i * width + l];
    }
    if (bias) {
      for (int64_t l = 0; l < width; ++l) sums[l] += parts_of(bias[r]).of[l % PARTS];
    }
    write(sums, r, 1);
  }
}

SumRows* kernel_of(const Product& p, int64_t width) {
  SumRows* kernel = nullptr;
  with_vectors(width, [&](auto lanes, auto vectors) {
    constexpr int L = decltype(lanes)::value;
    kernel = sum_rows<L, decltype(vectors)::value>;
    if constexpr (L == 1) {
      if (p.N == 1) {
        kernel = p.a.perm ? sum_rows_of_one<true, Element> : sum_rows_of_one<false, Element>;
      }
    }
  });
  return kernel;
}

void multiply(const Product& p) {
  const Csr& a = p.a;
  const Scratch sizes = scratch_of(p);
  char* scratch = static_cast<char*>(p.scratch);
  auto take = [&](size_t bytes) {
    char* taken = scratch;
    scratch += bytes;
    return taken;
  };
  Wide* packed = reinterpret_cast<Wide*>(take(sizes.packed));
  Cuts cuts;
  for (int32_t** array : {&cuts.rows, &cuts.begins, &cuts.ends}) {
    *array = reinterpret_cast<int32_t*>(take(sizes.cuts));
  }
  Lane* partial = reinterpret_cast<Lane*>(take(sizes.partial));
  cuts.add(a.indptr, 0, a.R);
  const int64_t step = panel_rows(p);
  for (int64_t v = 0; v < p.V; ++v) {
    const Element* data = static_cast<const Element*>(p.data) + v * a.n_blocks;
    for (int64_t n0 = 0; n0 < p.N; n0 += step) {
      const int64_t N = std::min(step, p.N - n0);
      const Panel x = panel_of(p.crew, p.x, v, n0, N, a.C, sizes.packed == 0, packed);
      Item* y = static_cast<Item*>(p.y.values) + v * p.y.v_step + n0 * p.y.n_step;
      const Terms t{data, a.indices, a.perm, a.n_blocks, x, N * PARTS};
      multiply_panel(p, t, N, y, kernel_of(p, t.width), cuts, partial);
    }
  }
}

// ---- sddmm

// Rows of y and x that are taken at once: all where neither is copied.
int64_t sampled_rows(const SampledProduct& p) {
  const bool as_they_are = is_panel(p.y, p.N) && x_is_panel(p.x, p.N);
  return as_they_are ? p.N : rows_at_once(p.N, MAX_ROWS);
}

struct Sampling {
  size_t y;     // bytes of packed rows of y
  size_t x;     // of x
  size_t sums;  // of sums that `out` is too narrow for
};
Sampling sampling_of(const SampledProduct& p) {
  const size_t rows = sampled_rows(p);
  return {is_panel(p.y, p.N) ? 0 : aligned(p.a.R * rows * sizeof(Wide)),
          x_is_panel(p.x, p.N) ? 0 : aligned(p.a.C * rows * sizeof(Wide)),
          NARROW && p.N > 1 ? aligned(p.a.n_blocks * sizeof(Lane)) : 0};
}

// One lane of y and of x, which is all of N: out[j] = y x[indices[j]] for the entries [begin, end)
// of one row. Writes whole vectors, up to `last`: what is past `end` is written again.
template <class E>
void multiply_row(const int32_t* indices, int64_t begin, int64_t end, int64_t last, Lane y,
                  const Lane* x, E* out) {
  int64_t j = begin;
  for (; j < end && j + G <= last; j += G) store<G>(out + j, y * values_at(x, indices + j));
  for (; j < end; ++j) put(out + j, y * x[indices[j]]);
}

template <int S, int L>
INLINE vec<Lane, L> fold_rest(vec<Lane, L> a) {
  if constexpr (S == 0) {
    return a;
  } else {
    return fold_rest<S / 2, L>(fold<S, L>(a, a));
  }
}
// The totals of four vectors.
template <int L>
INLINE void totals(const vec<Lane, L> (&acc)[4][PARTS], Lane* sums) {
#pragma GCC unroll 2
  for (int i = 0; i < PARTS; ++i) {
    if constexpr (L >= 4) {
      const vec<Lane, L> even = fold<L / 2, L>(acc[0][i], acc[2][i]);
      const vec<Lane, L> odd = fold<L / 2, L>(acc[1][i], acc[3][i]);
      const vec<Lane, L> all = fold_rest<L / 8, L>(fold<L / 4, L>(even, odd));
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sums[k * PARTS + i] = all[k * L / 4];
    } else {
      for (int k = 0; k < 4; ++k) sums[k * PARTS + i] = total<Lane, L>(acc[k][i]);
    }
  }
}

// out[j] = the sum of y[l] x[indices[j]][l] over `width` lanes, for the entries [begin, end) of one
// row; or that more. Four entries share what is read of y. The last vector ends with the lanes: of
// those that it has in common with the last but one it takes none.
template <int L>
void sample_row(const int32_t* indices, int64_t begin, int64_t end, const Lane* y, Panel x,
                int64_t width, bool add, Lane* out) {
  const vec<Bits, L> kept = lane_numbers<L>() >= Bits((width + L - 1) / L * L - width);
  for (int64_t j = begin; j < end; j += 4) {
    const Lane* rows[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      rows[k] = x.values + int64_t(indices[std::min(j + k, end - 1)]) * x.step;
    }
    vec<Lane, L> acc[4][PARTS] = {};
    // For the real parts y is conjugated, for the imaginary ones re and im change places.
    auto add_products = [&](vec<Lane, L> y_lanes, auto x_lanes) __attribute__((always_inline)) {
      vec<Lane, L> of[PARTS] = {y_lanes};
      if constexpr (COMPLEX && L > 1) {
        of[0] = conjugates<L>(y_lanes);
        of[PARTS - 1] = times_i<L>(of[0]);
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const vec<Lane, L> values = x_lanes(rows[k]);
        for (int i = 0; i < PARTS; ++i) acc[k][i] += of[i] * values;
      }
    };
    for (int64_t l = 0; l < width - L; l += L) {
      add_products(load<L>(y + l), [&](const Lane* row) { return load<L>(row + l); });
    }
    add_products(keep<L>(load<L>(y + width - L), kept),
                 [&](const Lane* row) { return keep<L>(load<L>(row + width - L), kept); });
    Lane sums[4 * PARTS];
    totals<L>(acc, sums);
    Lane* to = out + j * PARTS;
    const int64_t n_sums = (end - j) * PARTS;
#pragma GCC unroll 8
    for (int i = 0; i < 4 * PARTS; ++i) {
      if (i < n_sums) to[i] = add ? to[i] + sums[i] : sums[i];
    }
  }
}

// Calls f(r, begin, end) for the entries of each row in [first, last).
template <class F>
void each_row(const Csr& a, int64_t first, int64_t last, const F& f) {
  int64_t r = std::upper_bound(a.indptr, a.indptr + a.R + 1, int32_t(first)) - a.indptr - 1;
  for (int64_t begin = first; begin < last; ++r) {
    const int64_t end = std::min<int64_t>(a.indptr[r + 1], last);
    if (begin < end) f(r, begin, end);
    begin = end;
  }
}

void sample(const SampledProduct& p) {
  const Csr& a = p.a;
  const Sampling sizes = sampling_of(p);
  const int64_t step = sampled_rows(p);
  char* scratch = static_cast<char*>(p.scratch);
  for (int64_t v = 0; v < p.V; ++v) {
    Item* to = static_cast<Item*>(p.out) + v * a.n_blocks;
    Lane* sums =
        reinterpret_cast<Lane*>(NARROW ? scratch + sizes.y + sizes.x : static_cast<void*>(to));
    for (int64_t n0 = 0; n0 < p.N; n0 += step) {
      const int64_t N = std::min(step, p.N - n0), width = N * PARTS;
      const Panel y =
          panel_of(p.crew, p.y, v, n0, N, a.R, sizes.y == 0, reinterpret_cast<Wide*>(scratch));
      const Panel x = panel_of(p.crew, p.x, v, n0, N, a.C, sizes.x == 0,
                               reinterpret_cast<Wide*>(scratch + sizes.y));
      with_lanes(width, [&](auto lanes) {
        constexpr int L = decltype(lanes)::value;
        const double work = double(a.n_blocks) * double(width + 3);
        share(p.crew, a.n_blocks, work, [&](int64_t first, int64_t last, int) {
          each_row(a, first, last, [&](int64_t r, int64_t begin, int64_t end) {
            const Lane* y_row = y.values + r * y.step;
            if constexpr (L == 1) {
              if (p.N == 1) return multiply_row(a.indices, begin, end, last, *y_row, x.values, to);
            }
            sample_row<L>(a.indices, begin, end, y_row, x, width, n0 > 0, sums);
          });
          if constexpr (NARROW) {
            if (p.N > 1 && n0 + N == p.N)
              copy_run<LANES<Lane>>(sums + first, to + first, last - first);
          }
        });
      });
    }
  }
}

// ---- spmm_t of a single row of x; of several, one after the other

// Parts of the stored values that are summed apart: few, where adding their sums is not little
// work.
int64_t spread_parts(const Csr& a) {
  return std::clamp<int64_t>(a.n_blocks / (4 * a.C), 1, MAX_PARTS);
}

// sums[indices[j]] += data[j] x for the entries [begin, end) of one row
INLINE void spread_row(const Element* data, const int32_t* indices, int64_t begin, int64_t end,
                       Parts x, Lane* sums) {
  for (int64_t j = begin; j < end; ++j) {
    const Parts w = parts_of(data[j]);
    Lane* to = sums + int64_t(indices[j]) * PARTS;
    if (COMPLEX) {
      to[0] += w.of[0] * x.of[0] - w.of[PARTS - 1] * x.of[PARTS - 1];
      to[PARTS - 1] += w.of[0] * x.of[PARTS - 1] + w.of[PARTS - 1] * x.of[0];
    } else {
      to[0] += w.of[0] * x.of[0];
    }
  }
}

void spread(const Product& p) {
  const Csr& a = p.a;
  const int64_t n_parts = spread_parts(a), width = a.C * PARTS;
  Lane* sums = static_cast<Lane*>(p.scratch);  // (n_parts, width)
  for (int64_t i = 0; i < p.V * p.N; ++i) {
    const int64_t v = i / p.N, n = i % p.N;
    const Element* data = static_cast<const Element*>(p.data) + v * a.n_blocks;
    const Element* x = static_cast<const Element*>(p.x.values) + v * p.x.v_step + n * p.x.n_step;
    Item* y = static_cast<Item*>(p.y.values) + v * p.y.v_step + n * p.y.n_step;
    share(p.crew, n_parts, 4 * double(a.n_blocks), [&](int64_t first, int64_t last, int) {
      for (int64_t part = first; part < last; ++part) {
        Lane* to = sums + part * width;
        std::fill(to, to + width, Lane(0));
        each_row(a, a.n_blocks * part / n_parts, a.n_blocks * (part + 1) / n_parts,
                 [&](int64_t r, int64_t begin, int64_t end) {
                   spread_row(data, a.indices, begin, end, parts_of(x[r * p.x.c_step]), to);
                 });
      }
    });
    share(p.crew, a.C, double(n_parts * width), [&](int64_t first, int64_t last, int) {
      for (int64_t part = 1; part < n_parts; ++part) {
        for (int64_t l = first * PARTS; l < last * PARTS; ++l) sums[l] += sums[part * width + l];
      }
      const Wide* from = reinterpret_cast<const Wide*>(sums) + first;
      scatter(from, 0, 1, last - first, y + first * p.y.c_step, 0, p.y.c_step);
    });
  }
}

}  // namespace

MLX_SPARSE_EXPORT size_t spmm_scratch(const Product* p) {
  const Scratch sizes = scratch_of(*p);
  return sizes.packed + 3 * sizes.cuts + sizes.partial;
}
MLX_SPARSE_EXPORT void spmm(const Product* p) { multiply(*p); }

// The transposed product by the CSR of A itself, made for a single row of x; a graph compiled
// without shapes may bring several. y[v, n, c] = sum over r of A_v[r, c] x[v, n, r]. a.perm and
// bias are null.
MLX_SPARSE_EXPORT size_t spmm_t_scratch(const Product* p) {
  return spread_parts(p->a) * p->a.C * sizeof(Wide);
}
MLX_SPARSE_EXPORT void spmm_t(const Product* p) { spread(*p); }

MLX_SPARSE_EXPORT size_t sddmm_scratch(const SampledProduct* p) {
  const Sampling sizes = sampling_of(*p);
  return sizes.y + sizes.x + sizes.sums;
}
MLX_SPARSE_EXPORT void sddmm(const SampledProduct* p) { sample(*p); }

}  // namespace mlx_sparse_nn
