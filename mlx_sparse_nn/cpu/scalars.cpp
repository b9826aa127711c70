// The products of scalars (B = 1), also by the transpose.
//
// Compiled with -DELEMENT=float, float16, bfloat16, double or complex64. What is multiplied is
// widened before: x becomes a panel, (n_cols, width) in float32 or double, of which a stored value
// takes one row of `width` lanes. x whose rows of x are neighbours in memory is a panel as it is.
// A complex number is two lanes, and not conjugated.
//
// Sums: each lane adds its values in stored order, alternately to SUMS sums. Rows of more than
// LONG values are cut, and the sums of the cuts are added in order. The bias comes last.

#include <type_traits>

#include "share.h"
#include "vectors.h"

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
constexpr int MAX_VECTORS = REGISTERS / 4;  // of a panel's row: the sums stay in registers
constexpr int TILE = LANES<Wide> < 8 ? LANES<Wide> : 8;
constexpr int ROWS = 16;  // of A whose sums are written together
constexpr int64_t LONG = 8192;
constexpr int64_t MAX_WIDTH = MAX_VECTORS * W;

// ---- panels

// Rows [begin, end) of a panel from N rows of x, of which some lanes may be past the last.
void pack(const Item* x, int64_t n_step, int64_t c_step, int64_t N, int64_t begin, int64_t end,
          Wide* panel) {
  for (int64_t c = begin; c < end; c += TILE) {
    const int64_t n_c = std::min<int64_t>(TILE, end - c);
    for (int64_t n = 0; n < N; n += TILE) {
      const int64_t n_n = std::min<int64_t>(TILE, N - n);
      const Item* from = x + n * n_step + c * c_step;
      Wide* to = panel + c * N + n;
      if (n_c == TILE && n_n == TILE && c_step == 1) {
        vec<Wide, TILE> tile[TILE];
        for (int i = 0; i < TILE; ++i) tile[i] = load<TILE>(from + i * n_step);
        transpose<Wide, TILE>(tile);
        for (int i = 0; i < TILE; ++i) store<TILE>(to + i * N, tile[i]);
      } else if (n_n == TILE && n_step == 1) {
        for (int i = 0; i < n_c; ++i) store<TILE>(to + i * N, load<TILE>(from + i * c_step));
      } else {
        for (int i = 0; i < n_c; ++i) {
          for (int k = 0; k < n_n; ++k) to[i * N + k] = widen(from[i * c_step + k * n_step]);
        }
      }
    }
  }
}

// The other way: rows [0, n_rows) of sums, each of N numbers, to y, rounded.
void unpack(const Wide* sums, int64_t N, int64_t n_rows, Item* y, int64_t n_step, int64_t c_step) {
  for (int64_t r = 0; r < n_rows; r += TILE) {
    const int64_t n_r = std::min<int64_t>(TILE, n_rows - r);
    for (int64_t n = 0; n < N; n += TILE) {
      const int64_t n_n = std::min<int64_t>(TILE, N - n);
      const Wide* from = sums + r * N + n;
      Item* to = y + n * n_step + r * c_step;
      if (n_r == TILE && n_n == TILE && c_step == 1) {
        vec<Wide, TILE> tile[TILE];
        for (int i = 0; i < TILE; ++i) tile[i] = load<TILE>(from + i * N);
        transpose<Wide, TILE>(tile);
        for (int i = 0; i < TILE; ++i) store<TILE>(to + i * n_step, tile[i]);
      } else if (n_n == TILE && n_step == 1) {
        for (int i = 0; i < n_r; ++i) store<TILE>(to + i * c_step, load<TILE>(from + i * N));
      } else {
        for (int i = 0; i < n_r; ++i) {
          for (int k = 0; k < n_n; ++k) put(to + i * c_step + k * n_step, from[i * N + k]);
        }
      }
    }
  }
}

bool is_panel(const Rows& x, int64_t N) { return !NARROW && (N == 1 || x.n_step == 1); }
// Where a single row of x is gathered from, its values lie side by side.
bool is_row(const Rows& x) { return !NARROW && x.c_step == 1; }

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
          pack(from, x.n_step, x.c_step, N, begin * TILE, std::min(end * TILE, n_cols), scratch);
        });
  return {reinterpret_cast<const Lane*>(scratch), N * PARTS};
}

// ---- spmm

struct Cut {
  int64_t row;
  int64_t begin;
  int64_t end;
};

// Cuts of the rows in [begin, end) with more than LONG values, in order; returns past the last.
Cut* cut_long_rows(const int32_t* indptr, int64_t begin, int64_t end, Cut* cuts) {
  const int64_t first = indptr[begin], last = indptr[end];
  if (last - first <= LONG) return cuts;
  if (end - begin > 1) {
    const int64_t middle = (begin + end) / 2;
    return cut_long_rows(indptr, middle, end, cut_long_rows(indptr, begin, middle, cuts));
  }
  for (int64_t j = first; j < last; j += LONG) *cuts++ = {begin, j, std::min(j + LONG, last)};
  return cuts;
}
int64_t max_cuts(int64_t n_blocks) { return 2 * (n_blocks / LONG); }

// Calls f with lanes L and vectors Q as types. They cover `width` lanes: the last vector ends with
// them, and may begin among those of the last but one.
template <int Q, class F>
void with_vectors(int64_t width, const F& f) {
  if constexpr (Q > 1) {
    if (width <= (Q - 1) * W) return with_vectors<Q - 1>(width, f);
  }
  f(std::integral_constant<int, W>(), std::integral_constant<int, Q>());
}
template <int L = W, class F>
void with_lanes(int64_t width, const F& f) {
  if constexpr (L == W) {
    if (width >= W) return with_vectors<MAX_VECTORS>(width, f);
  } else {
    const std::integral_constant<int, L> lanes;
    if (width == L) return f(lanes, std::integral_constant<int, 1>());
    if (width > L) return f(lanes, std::integral_constant<int, 2>());
  }
  if constexpr (L > PARTS) with_lanes<L / 2>(width, f);
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

// i x of the complex numbers in x.
template <int L>
INLINE vec<Lane, L> times_i(vec<Lane, L> x) {
  vec<Lane, L> re = x, im = x;
  swap_lanes<Lane, L, 1>(re, im, std::make_integer_sequence<int, L>{});
  im = -im;
  swap_lanes<Lane, L, 1>(im, re, std::make_integer_sequence<int, L>{});
  return im;
}

// sums[l] = sum of data[j] x[indices[j]][l] over [begin, end), + bias
template <int L, int Q>
INLINE void sum_row(const Csr& a, const Element* data, Panel x, int64_t begin, int64_t end,
                    int64_t last, const Element* bias, Lane* sums) {
  constexpr int SUMS = Q * PARTS < 4 ? 2 : 1;
  vec<Lane, L> acc[SUMS][PARTS][Q] = {};
  auto add = [&](int64_t j, vec<Lane, L>(&to)[PARTS][Q]) __attribute__((always_inline)) {
    const Lane* row = x.values + int64_t(a.indices[j]) * x.step;
    const Parts w = parts_of(data[a.perm ? a.perm[j] : j]);
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
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
      const Parts add = parts_of(*bias);
      vec<Lane, L> lanes;
      for (int l = 0; l < L; ++l) lanes[l] = add.of[l % PARTS];
      sum += lanes;
    }
    store<L>(sums + (q + 1 < Q ? q * L : last), sum);
  }
}

// The same of a single row of x, for numbers of one lane.
template <bool PERM>
INLINE Lane dot(const Csr& a, const Element* data, const Lane* x, int64_t begin, int64_t end) {
  constexpr int SUMS = 4;
  Lane acc[SUMS] = {};
  auto add = [&](int64_t j, Lane& to) __attribute__((always_inline)) {
    to += parts_of(data[PERM ? a.perm[j] : j]).of[0] * x[a.indices[j]];
  };
  int64_t j = begin;
  for (; j + SUMS <= end; j += SUMS) {
#pragma GCC unroll 4
    for (int s = 0; s < SUMS; ++s) add(j + s, acc[s]);
  }
  for (; j < end; ++j) add(j, acc[0]);
  return (acc[0] + acc[2]) + (acc[1] + acc[3]);
}

// Rows of y from a panel of N rows of x; `y` is where the first of them begins.
struct Pass {
  const Product& p;
  const Element* data;
  Panel x;
  int64_t N;
  Item* y;
  const Cut* cuts;
  int64_t n_cuts;
  Lane* partial;  // (n_cuts, N PARTS)

  // sums_of(begin, end, bias, sums) computes N sums of stored values [begin, end).
  template <class F>
  void run(const F& sums_of) const {
    const Csr& a = p.a;
    const int64_t width = N * PARTS;
    const double work = double(a.n_blocks) * double(width + 3);
    const bool in_place = !NARROW && (p.y.n_step == 1 || N == 1);
    share_rows(p.crew, a.indptr, a.R, work, [&](int64_t first, int64_t last, int) {
      alignas(64) Lane sums[ROWS * MAX_WIDTH];
      for (int64_t r0 = first; r0 < last; r0 += ROWS) {
        const int64_t r1 = std::min(r0 + ROWS, last);
        for (int64_t r = r0; r < r1; ++r) {
          const int64_t begin = a.indptr[r], end = a.indptr[r + 1];
          Lane* to =
              in_place ? reinterpret_cast<Lane*>(y + r * p.y.c_step) : sums + (r - r0) * width;
          sums_of(begin, end - begin > LONG ? begin : end, bias_of(r), to);
        }
        if (!in_place) write(sums, r0, r1);
      }
    });
    if (n_cuts == 0) return;
    share(p.crew, n_cuts, work, [&](int64_t first, int64_t last, int) {
      for (int64_t i = first; i < last; ++i) {
        // The bias is added to the first of the cuts.
        const bool is_first = i == 0 || cuts[i - 1].row != cuts[i].row;
        sums_of(cuts[i].begin, cuts[i].end, is_first ? bias_of(cuts[i].row) : nullptr,
                partial + i * width);
      }
    });
    for (int64_t i = 0; i < n_cuts;) {
      const int64_t row = cuts[i].row;
      Lane* sums = partial + i * width;
      for (++i; i < n_cuts && cuts[i].row == row; ++i) {
        for (int64_t l = 0; l < width; ++l) sums[l] += partial[i * width + l];
      }
      write(sums, row, row + 1);
    }
  }

  const Element* bias_of(int64_t r) const {
    return p.bias ? static_cast<const Element*>(p.bias) + r : nullptr;
  }
  void write(const Lane* sums, int64_t begin, int64_t end) const {
    unpack(reinterpret_cast<const Wide*>(sums), N, end - begin, y + begin * p.y.c_step, p.y.n_step,
           p.y.c_step);
  }
};

// Rows of x in a panel.
int64_t panel_rows(int64_t N) {
  const int64_t width = N * PARTS;
  const int64_t panels = (width + MAX_WIDTH - 1) / MAX_WIDTH;
  const int64_t vectors = (width + panels * W - 1) / (panels * W);
  return std::min(N, vectors * W / PARTS);
}

struct Scratch {
  size_t packed;   // bytes of a packed panel
  size_t cuts;     // of the cuts
  size_t partial;  // of their sums
};
size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }
Scratch scratch_of(const Product& p) {
  const size_t rows = panel_rows(p.N), n_cuts = max_cuts(p.a.n_blocks);
  const bool in_place = p.N == 1 && !COMPLEX ? is_row(p.x) : is_panel(p.x, p.N);
  return {in_place ? 0 : aligned(p.a.C * rows * sizeof(Wide)), aligned(n_cuts * sizeof(Cut)),
          aligned(n_cuts * rows * sizeof(Wide))};
}

void multiply(const Product& p) {
  const Csr& a = p.a;
  const Scratch sizes = scratch_of(p);
  char* scratch = static_cast<char*>(p.scratch);
  Wide* packed = reinterpret_cast<Wide*>(scratch);
  Cut* cuts = reinterpret_cast<Cut*>(scratch + sizes.packed);
  Lane* partial = reinterpret_cast<Lane*>(scratch + sizes.packed + sizes.cuts);
  const int64_t n_cuts = cut_long_rows(a.indptr, 0, a.R, cuts) - cuts;
  const int64_t step = panel_rows(p.N);
  for (int64_t v = 0; v < p.V; ++v) {
    const Element* data = static_cast<const Element*>(p.data) + v * a.n_blocks;
    for (int64_t n0 = 0; n0 < p.N; n0 += step) {
      const int64_t N = std::min(step, p.N - n0), width = N * PARTS;
      const Panel x = panel_of(p.crew, p.x, v, n0, N, a.C, sizes.packed == 0, packed);
      Item* y = static_cast<Item*>(p.y.values) + v * p.y.v_step + n0 * p.y.n_step;
      const Pass pass{p, data, x, N, y, cuts, n_cuts, partial};
      if constexpr (!COMPLEX) {
        if (p.N == 1) {
          auto run = [&](auto transposed) {
            pass.run([&](int64_t begin, int64_t end, const Element* bias, Lane* sum) {
              const Lane s = dot<decltype(transposed)::value>(a, data, x.values, begin, end);
              *sum = bias ? s + parts_of(*bias).of[0] : s;
            });
          };
          a.perm ? run(std::true_type()) : run(std::false_type());
          continue;
        }
      }
      with_lanes(width, [&](auto lanes, auto vectors) {
        constexpr int L = decltype(lanes)::value, Q = decltype(vectors)::value;
        pass.run([&](int64_t begin, int64_t end, const Element* bias, Lane* sums) {
          sum_row<L, Q>(a, data, x, begin, end, width - L, bias, sums);
        });
      });
    }
  }
}

// ---- sddmm

// Lanes of a chunk of N: what a row of y and those of x take at once.
constexpr int64_t CHUNK = 64;

// out[j] = the sum of y[row of j][l] x[indices[j]][l] over `width` lanes, for the entries
// [begin, end) of one row; with ADD to what is there. The last vector of y is zero where the last
// but one has the same lanes.
template <int L>
INLINE void sample_row(const int32_t* indices, int64_t begin, int64_t end, const Lane* y, Panel x,
                       int64_t width, bool add, Lane* out) {
  const int64_t n_full = width / L * L, rest = width - n_full;
  for (int64_t j = begin; j < end; ++j) {
    const Lane* row = x.values + int64_t(indices[j]) * x.step;
    vec<Lane, L> acc[2][PARTS] = {};
    int64_t l = 0;
    for (; l + 2 * L <= width; l += 2 * L) {
      for (int k = 0; k < 2; ++k) {
        const vec<Lane, L> values = load<L>(row + l + k * L);
        for (int i = 0; i < PARTS; ++i) acc[k][i] += load<L>(y + i * CHUNK + l + k * L) * values;
      }
    }
    if (l < n_full) {
      const vec<Lane, L> values = load<L>(row + l);
      for (int i = 0; i < PARTS; ++i) acc[0][i] += load<L>(y + i * CHUNK + l) * values;
    }
    Lane sums[PARTS];
    for (int i = 0; i < PARTS; ++i) {
      sums[i] = total<Lane, L>(acc[0][i] + acc[1][i]);
      for (l = n_full; l < n_full + rest; ++l) sums[i] += y[i * CHUNK + l] * row[l];
      out[j * PARTS + i] = add ? out[j * PARTS + i] + sums[i] : sums[i];
    }
  }
}

void sample(const SampledProduct& p) {
  const Csr& a = p.a;
  const int64_t step = CHUNK / PARTS;
  const bool y_in_place = is_panel(p.y, p.N), x_in_place = is_panel(p.x, p.N);
  char* scratch = static_cast<char*>(p.scratch);
  Wide* packed_y = reinterpret_cast<Wide*>(scratch);
  Wide* packed_x = packed_y + (y_in_place ? 0 : a.R * std::min(step, p.N));
  Wide* wide_out = packed_x + (x_in_place ? 0 : a.C * std::min(step, p.N));
  for (int64_t v = 0; v < p.V; ++v) {
    Item* to = static_cast<Item*>(p.out) + v * a.n_blocks;
    Lane* out = NARROW ? reinterpret_cast<Lane*>(wide_out) : reinterpret_cast<Lane*>(to);
    for (int64_t n0 = 0; n0 < p.N; n0 += step) {
      const int64_t N = std::min(step, p.N - n0), width = N * PARTS;
      const Panel y = panel_of(p.crew, p.y, v, n0, N, a.R, y_in_place, packed_y);
      const Panel x = panel_of(p.crew, p.x, v, n0, N, a.C, x_in_place, packed_x);
      const double work = double(a.n_blocks) * double(width + 3);
      share(p.crew, a.n_blocks, work, [&](int64_t first, int64_t last, int) {
        int64_t r = std::upper_bound(a.indptr, a.indptr + a.R + 1, int32_t(first)) - a.indptr - 1;
        for (int64_t begin = first; begin < last; ++r) {
          const int64_t end = std::min<int64_t>(a.indptr[r + 1], last);
          if (begin == end) continue;
          // Of complex numbers x + i y: x, -y for the real part and y, x for the imaginary one.
          alignas(64) Lane rows[PARTS * CHUNK];
          const Lane* from = y.values + r * y.step;
          for (int64_t l = 0; l < width; ++l) {
            rows[l] = l % PARTS ? -from[l] : from[l];
            if (COMPLEX) rows[(PARTS - 1) * CHUNK + l] = from[l ^ 1];
          }
          if (width >= W) {
            sample_row<W>(a.indices, begin, end, rows, x, width, n0 > 0, out);
          } else if (W > 4 && width >= 4) {
            sample_row<(W < 4 ? W : 4)>(a.indices, begin, end, rows, x, width, n0 > 0, out);
          } else {
            sample_row<1>(a.indices, begin, end, rows, x, width, n0 > 0, out);
          }
          begin = end;
        }
        if constexpr (NARROW) {
          if (n0 + N == p.N) {
            for (int64_t j = first; j < last; ++j) put(to + j, wide_out[j]);
          }
        }
      });
    }
  }
}

}  // namespace

MLX_SPARSE_EXPORT size_t spmm_scratch(const Product* p) {
  const Scratch sizes = scratch_of(*p);
  return sizes.packed + sizes.cuts + sizes.partial;
}
MLX_SPARSE_EXPORT void spmm(const Product* p) { multiply(*p); }

MLX_SPARSE_EXPORT size_t sddmm_scratch(const SampledProduct* p) {
  const int64_t step = std::min(CHUNK / PARTS, p->N);
  return sizeof(Wide) * ((is_panel(p->y, p->N) ? 0 : p->a.R * step) +
                         (is_panel(p->x, p->N) ? 0 : p->a.C * step) + (NARROW ? p->a.n_blocks : 0));
}
MLX_SPARSE_EXPORT void sddmm(const SampledProduct* p) { sample(*p); }

}  // namespace mlx_sparse_nn
