// Products of matrices of square blocks. ELEMENT is the type of all arrays; BLOCK the side of a
// block, or 0 for any side at run time. Letters as in ../metal/README.md.
//
// spmm     y[v, n, r B + o] = bias[r B + o] + sum of W_j[o, k] x[v, n, indices[j] B + k] over the
//          blocks j of block-row r and k < B. W_j is data[v, j], or the transpose of
//          data[v, perm[j]].
// sddmm    out[v, j, i, k] = sum over n of y[v, n, r B + i] x[v, n, indices[j] B + k]
//
// spmm takes rows of x CHUNK at a time, packed to panels: the lanes of vectors are rows of x, and
// stored values are broadcast. So one kernel serves every B, and A as well as its transpose. A few
// rows that remain have kernels of their own, whose vectors are of stored values, read once.
// Block-rows are shared over the crew.
//
// Sums in float32, or in float64 of float64. In panels: the bias, blocks in stored order, k
// ascending. Which rows are in panels follows from N alone.

#include "copy.h"
#include "kernels.h"
#include "share.h"
#include "vectors.h"

namespace mlx_sparse_nn {
namespace {

using E = ELEMENT;
using A = accumulator<E>;
constexpr bool WIDENED = sizeof(E) != sizeof(A);

constexpr int W = LANES<A>;
constexpr int PANEL = 2 * W;                   // rows of x in a panel
constexpr int TALL = REGISTERS == 32 ? 8 : 4;  // rows of A in a tile of registers
constexpr int I = BLOCK && BLOCK < TALL ? BLOCK : TALL;
constexpr int64_t CHUNK = 256;           // rows of x packed at once
constexpr int64_t DEPTH = 128;           // columns whose x stays in the first cache
constexpr int64_t STRIP = 16;            // outputs that are written together, at least
constexpr int SIDE = BLOCK ? BLOCK : W;  // for kernels of fixed sides
constexpr int MAX_GROUP = BLOCK == 0 ? DEPTH : SIDE < DEPTH ? DEPTH / SIDE : 1;
constexpr int FEW = 4;

INLINE int64_t side(const Csr& a) { return BLOCK ? BLOCK : a.B; }
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Blocks of one block-row that are multiplied together.
struct Group {
  int n;
  const E* stored[MAX_GROUP];
  const A* values[MAX_GROUP];
  int64_t column[MAX_GROUP];
};

// ---------------------------------------------------------------- panels of x

// How the rows of a chunk are computed: in panels of decreasing lanes, and the last few alone.
struct Plan {
  int n = 0;
  int64_t few = 0;
  int lanes[CHUNK / PANEL + 4];
  int64_t first[CHUNK / PANEL + 4];
  int64_t width = 0;  // lanes of all panels

  Plan(int64_t rows, bool has_few) {
    int64_t done = 0;
    for (int l = PANEL; l >= 4; l /= 2) {
      while (rows - done > (l > 8 ? l * 3 / 4 : FEW) || (l == 4 && !has_few && done < rows)) {
        lanes[n] = l;
        first[n++] = done;
        width += l;
        done = std::min(rows, done + l);
      }
    }
    few = rows - done;
  }
};

// sums[i] += values of rows i of the blocks times x, of ROWS rows.
template <int ROWS, int L>
INLINE void multiply_tile(const Group& g, int64_t i, int64_t i_step, int64_t k_step, int64_t B,
                          const A* x, A* sums) {
  constexpr int V = L < W ? L : W, Q = L / V;
  vec<A, V> acc[ROWS][Q];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 2
    for (int q = 0; q < Q; ++q) acc[m][q] = load<V>(sums + (i + m) * L + q * V);
  }
  for (int e = 0; e < g.n; ++e) {
    const A* w = g.values[e] + i * i_step;
    const A* xs = x + g.column[e] * L;
#pragma GCC unroll 4
    for (int64_t k = 0; k < B; ++k) {
      vec<A, V> xv[Q];
#pragma GCC unroll 2
      for (int q = 0; q < Q; ++q) xv[q] = load<V>(xs + k * L + q * V);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) {
        const A value = w[m * i_step + k * k_step];
#pragma GCC unroll 2
        for (int q = 0; q < Q; ++q) acc[m][q] += value * xv[q];
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 2
    for (int q = 0; q < Q; ++q) store<V>(sums + (i + m) * L + q * V, acc[m][q]);
  }
}

template <int L>
INLINE void multiply_panel_by(const Group& g, int64_t i_step, int64_t k_step, int64_t B, const A* x,
                              A* sums) {
  int64_t i = 0;
  for (; i + I <= B; i += I) multiply_tile<I, L>(g, i, i_step, k_step, B, x, sums);
  if constexpr (BLOCK == 0) {
    if (TALL > 4 && B - i >= 4) {
      multiply_tile<4, L>(g, i, i_step, k_step, B, x, sums);
      i += 4;
    }
    if (B - i >= 2) {
      multiply_tile<2, L>(g, i, i_step, k_step, B, x, sums);
      i += 2;
    }
    if (B - i >= 1) multiply_tile<1, L>(g, i, i_step, k_step, B, x, sums);
  }
}

template <int L>
void multiply_panel(const Group& g, bool transposed, int64_t B, const A* x, A* sums) {
  if constexpr (BLOCK == 0) {
    multiply_panel_by<L>(g, transposed ? 1 : B, transposed ? B : 1, B, x, sums);
  } else if (transposed) {
    multiply_panel_by<L>(g, 1, BLOCK, BLOCK, x, sums);
  } else {
    multiply_panel_by<L>(g, BLOCK, 1, BLOCK, x, sums);
  }
}

void multiply_lanes(int lanes, const Group& g, bool transposed, int64_t B, const A* x, A* sums) {
  if (lanes == PANEL) return multiply_panel<PANEL>(g, transposed, B, x, sums);
  if constexpr (PANEL > 16) {
    if (lanes == 16) return multiply_panel<16>(g, transposed, B, x, sums);
  }
  if constexpr (PANEL > 8) {
    if (lanes == 8) return multiply_panel<8>(g, transposed, B, x, sums);
  }
  multiply_panel<4>(g, transposed, B, x, sums);
}

// ---------------------------------------------------------------- few rows of x

// Vectors of stored values: a row of a block, or several rows of a small one.
constexpr int V = SIDE * SIDE < W ? SIDE * SIDE : W;
constexpr int K = SIDE > V ? SIDE / V : 1;   // vectors of a row of a block
constexpr int RUN = SIDE < V ? SIDE : V;     // values of a vector in one row
constexpr int X_STEP = SIDE > V ? SIDE : V;  // x of a block, repeated to fill a vector
constexpr int SUMS = SIDE * SIDE / V / K;    // vectors of sums of a block-row
constexpr int CHAINS = K >= 4 ? 1 : 4 / K < SUMS ? 4 / K : SUMS;  // transposed: sums side by side

// sums[n][i] += the products of row (or rows) i, lane by lane.
template <int N>
void multiply_few(const Group& g, const A* x, A* sums) {
  constexpr int I_FEW = N == 1 ? 16 : N == 2 ? 8 : 4, ROWS = SUMS < I_FEW ? SUMS : I_FEW;
  for (int i = 0; i < SUMS; i += ROWS) {
    vec<A, V> acc[ROWS][N];
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[m][n] = load<V>(sums + (n * SUMS + i + m) * V);
    }
    for (int e = 0; e < g.n; ++e) {
      const E* w = g.stored[e] + i * K * V;
      const A* xs = x + g.column[e] / SIDE * (N * X_STEP);
      for (int k = 0; k < K; ++k) {
        vec<A, V> xv[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) xv[n] = load<V>(xs + n * X_STEP + k * V);
#pragma GCC unroll 16
        for (int m = 0; m < ROWS; ++m) {
          const vec<A, V> value = load<V>(w + (m * K + k) * V);
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) acc[m][n] += value * xv[n];
        }
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) store<V>(sums + (n * SUMS + i + m) * V, acc[m][n]);
    }
  }
}

// Lane l takes lane F V / RUN + l / RUN of x: what value l of vector F of a block is multiplied by.
template <int F, int... LANE>
INLINE vec<A, V> spread(vec<A, V> x, std::integer_sequence<int, LANE...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, x, (F * (V / RUN) + LANE / RUN)...);
#else
  typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> index;
  return __builtin_shuffle(x, vec<index, V>{(F * (V / RUN) + LANE / RUN)...});
#endif
}

template <int N, int F>
INLINE void multiply_spread(const E* w, const A* x, vec<A, V> (&acc)[CHAINS][N]) {
  if constexpr (F < SUMS) {
    const vec<A, V> value = load<V>(w + F * V);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const vec<A, V> xv = load<V>(x + n * X_STEP);
      acc[F % CHAINS][n] += value * spread<F>(xv, std::make_integer_sequence<int, V>{});
    }
    multiply_spread<N, F + 1>(w, x, acc);
  }
}

// The same of the transpose: sums[n][chain][vector of outputs].
template <int N>
void multiply_few_t(const Group& g, const A* x, A* sums) {
  if constexpr (SIDE < V) {
    vec<A, V> acc[CHAINS][N];
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[c][n] = load<V>(sums + (n * CHAINS + c) * V);
    }
    for (int e = 0; e < g.n; ++e) {
      multiply_spread<N, 0>(g.stored[e], x + g.column[e] / SIDE * (N * X_STEP), acc);
    }
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) {
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) store<V>(sums + (n * CHAINS + c) * V, acc[c][n]);
    }
  } else {
    constexpr int AT_ONCE = K * N * CHAINS <= 16 ? K : 16 / (N * CHAINS);
    for (int k = 0; k < K; k += AT_ONCE) {
      vec<A, V> acc[CHAINS][AT_ONCE][N];
#pragma GCC unroll 4
      for (int c = 0; c < CHAINS; ++c) {
#pragma GCC unroll 16
        for (int o = 0; o < AT_ONCE; ++o) {
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) {
            acc[c][o][n] = load<V>(sums + ((n * CHAINS + c) * K + k + o) * V);
          }
        }
      }
      for (int e = 0; e < g.n; ++e) {
        const E* w = g.stored[e] + k * V;
        const A* xs = x + g.column[e] / SIDE * (N * X_STEP);
        for (int i = 0; i < SUMS; i += CHAINS) {
#pragma GCC unroll 4
          for (int c = 0; c < CHAINS; ++c) {
#pragma GCC unroll 16
            for (int o = 0; o < AT_ONCE; ++o) {
              const vec<A, V> value = load<V>(w + (i + c) * SIDE + o * V);
#pragma GCC unroll 4
              for (int n = 0; n < N; ++n) acc[c][o][n] += value * xs[n * X_STEP + i + c];
            }
          }
        }
      }
#pragma GCC unroll 4
      for (int c = 0; c < CHAINS; ++c) {
#pragma GCC unroll 16
        for (int o = 0; o < AT_ONCE; ++o) {
#pragma GCC unroll 4
          for (int n = 0; n < N; ++n) {
            store<V>(sums + ((n * CHAINS + c) * K + k + o) * V, acc[c][o][n]);
          }
        }
      }
    }
  }
}

template <int N>
void multiply_few_of(const Group& g, bool transposed, const A* x, A* sums) {
  transposed ? multiply_few_t<N>(g, x, sums) : multiply_few<N>(g, x, sums);
}

// out[o] = the sum that the lanes in sums make.
void finish_few(bool transposed, const A* sums, A* out) {
  {
    constexpr int PARTS = CHAINS * V / RUN;
    for (int o = 0; o < SIDE; ++o) {
      if (transposed) {
        A sum = sums[o];
        constexpr int STEP = SIDE < V ? RUN : SIDE;
        for (int part = 1; part < (SIDE < V ? PARTS : CHAINS); ++part) sum += sums[part * STEP + o];
        out[o] = sum;
      } else {
        out[o] = total<A, RUN>(load<RUN>(sums + o * RUN));
      }
    }
  }
}

// ---------------------------------------------------------------- spmm
// n stored values as accumulators: where they lie, or widened to `to`.
INLINE const A* widened(const E* from, A* to, int64_t n) {
  if (WIDENED) {
    copy_run(from, to, n);
    return to;
  }
  return reinterpret_cast<const A*>(from);
}

// Scratch of a product, in accumulators: x in panels, x of the few rows, and each thread's own.
struct Layout {
  int64_t panels = 0;
  int64_t few = 0;
  int64_t sums = 0;    // of a strip, in panels
  int64_t values = 0;  // of a group, widened
  int64_t mine = 0;

  explicit Layout(const Product& p) {
    const int64_t B = side(p.a), height = round_up(std::max(B, STRIP), B);
    panels = std::min(round_up(p.N, PANEL), CHUNK) * p.a.C * B;
    few = BLOCK ? round_up(FEW * p.a.C * X_STEP, 64) : 0;
    panels = round_up(panels, 64);
    sums = round_up(height * std::min(round_up(p.N, PANEL), CHUNK), 64);
    values = WIDENED ? round_up(std::max(B, DEPTH) * B, 64) : 0;
    mine = sums + values + (BLOCK ? FEW * std::max(SUMS, CHAINS * K) * V + FEW * height : 0);
    mine = round_up(mine, 64);
  }
  int64_t total(int workers) const { return panels + few + workers * mine; }
};

void spmm_chunk(const Product& p, const Layout& layout, int64_t v, int64_t n0, int64_t rows) {
  const Csr& a = p.a;
  const int64_t B = side(a), n_cols = a.C * B;
  const bool transposed = a.perm != nullptr;
  const Plan plan(rows, BLOCK != 0);
  A* const panels = static_cast<A*>(p.scratch);
  A* const few = panels + layout.panels;
  A* const workers = few + layout.few;
  const E* data = static_cast<const E*>(p.data) + v * a.n_blocks * B * B;
  const E* x = static_cast<const E*>(p.x.values) + v * p.x.v_step + n0 * p.x.n_step;
  E* y = static_cast<E*>(p.y.values) + v * p.y.v_step + n0 * p.y.n_step;
  const E* bias = static_cast<const E*>(p.bias);

  constexpr int64_t WIDE = 64;  // columns packed at once
  const int64_t slices = (n_cols + WIDE - 1) / WIDE;
  share(p.crew, plan.n * slices, double(plan.width) * n_cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / slices, c = i % slices * WIDE, first = plan.first[panel];
      const int64_t lanes = plan.lanes[panel];
      A* to = panels + first * n_cols + c * lanes;
      gather(x + first * p.x.n_step + c * p.x.c_step, p.x.c_step, p.x.n_step,
             std::min(WIDE, n_cols - c), std::min(lanes, rows - plan.few - first), to, lanes,
             lanes);
    }
  });
  const int64_t few0 = rows - plan.few;
  if constexpr (BLOCK > 0) {
    for (int64_t c = 0; c < a.C && plan.few; ++c) {
      for (int64_t n = 0; n < plan.few; ++n) {
        A* to = few + (c * plan.few + n) * X_STEP;
        gather(x + (few0 + n) * p.x.n_step + c * B * p.x.c_step, 0, p.x.c_step, 1, B, to, 0, B);
        for (int k = BLOCK; k < X_STEP; ++k) to[k] = to[k - BLOCK];
      }
    }
  }

  const int64_t strip = B < STRIP ? STRIP / B : 1, strips = (a.R + strip - 1) / strip;
  const int group = static_cast<int>(B < DEPTH ? DEPTH / B : 1);
  auto compute = [&](int64_t begin, int64_t end, int worker) {
    A* const sums = workers + worker * layout.mine;
    A* const wide = sums + layout.sums;
    A* const few_sums = wide + layout.values;
    A* const few_out = few_sums + (BLOCK ? FEW * std::max(SUMS, CHAINS * K) * V : 0);
    Group g;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t r0 = s * strip, r1 = std::min(a.R, r0 + strip), height = (r1 - r0) * B;
      for (int64_t r = r0; r < r1; ++r) {
        const int64_t top = (r - r0) * B;
        for (int64_t q = 0; q < plan.n; ++q) {
          A* to = sums + plan.first[q] * height + top * plan.lanes[q];
          for (int64_t i = 0; i < B; ++i) {
            const A start = bias ? widen(bias[r * B + i]) : A(0);
            for (int l = 0; l < plan.lanes[q]; ++l) to[i * plan.lanes[q] + l] = start;
          }
        }
        if (BLOCK && plan.few) {
          std::fill(few_sums, few_sums + FEW * std::max(SUMS, CHAINS * K) * V, A(0));
        }
        for (int64_t j0 = a.indptr[r]; j0 < a.indptr[r + 1]; j0 += group) {
          g.n = static_cast<int>(std::min<int64_t>(group, a.indptr[r + 1] - j0));
          for (int e = 0; e < g.n; ++e) {
            g.stored[e] = data + (transposed ? a.perm[j0 + e] : j0 + e) * B * B;
            g.column[e] = a.indices[j0 + e] * B;
            g.values[e] = plan.n ? widened(g.stored[e], wide + e * B * B, B * B) : nullptr;
          }
          for (int64_t q = 0; q < plan.n; ++q) {
            multiply_lanes(plan.lanes[q], g, transposed, B, panels + plan.first[q] * n_cols,
                           sums + plan.first[q] * height + top * plan.lanes[q]);
          }
          if constexpr (BLOCK > 0) {
            if (plan.few == 1) multiply_few_of<1>(g, transposed, few, few_sums);
            if (plan.few == 2) multiply_few_of<2>(g, transposed, few, few_sums);
            if (plan.few == 3) multiply_few_of<3>(g, transposed, few, few_sums);
            if (plan.few == 4) multiply_few_of<4>(g, transposed, few, few_sums);
          }
        }
        for (int64_t n = 0; n < plan.few; ++n) {
          A* to = few_out + n * height + top;
          finish_few(transposed, few_sums + n * (transposed ? CHAINS * K : SUMS) * V, to);
          for (int64_t i = 0; i < B && bias; ++i) to[i] += widen(bias[r * B + i]);
        }
      }
      E* to = y + r0 * B * p.y.c_step;
      for (int64_t q = 0; q < plan.n; ++q) {
        const int64_t first = plan.first[q], lanes = plan.lanes[q];
        scatter(sums + first * height, lanes, height, std::min(lanes, few0 - first),
                to + first * p.y.n_step, p.y.c_step, p.y.n_step);
      }
      if (plan.few) {
        scatter(few_out, height, plan.few, height, to + few0 * p.y.n_step, p.y.n_step, p.y.c_step);
      }
    }
  };
  const double work = double(a.n_blocks) * B * B * rows;
  if (strip == 1) {
    share_rows(p.crew, a.indptr, a.R, work, compute);
  } else {
    share(p.crew, strips, work, compute);
  }
}

// ---------------------------------------------------------------- sddmm

constexpr int64_t STEP = 128;     // rows summed at once
constexpr int64_t WIDTH = 2 * W;  // columns of blocks, side by side, in a tile

// sums[i] += sum over n of y[n][i] x[n]
template <int ROWS>
INLINE void sample_tile(const A* y, int64_t y_step, const A* x, int64_t n_rows, A* sums) {
  vec<A, W> acc[ROWS][2];
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
    acc[m][0] = load<W>(sums + m * WIDTH);
    acc[m][1] = load<W>(sums + m * WIDTH + W);
  }
#pragma GCC unroll 4
  for (int64_t n = 0; n < n_rows; ++n) {
    const vec<A, W> x0 = load<W>(x + n * WIDTH), x1 = load<W>(x + n * WIDTH + W);
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const A value = y[n * y_step + m];
      acc[m][0] += value * x0;
      acc[m][1] += value * x1;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < ROWS; ++m) {
    store<W>(sums + m * WIDTH, acc[m][0]);
    store<W>(sums + m * WIDTH + W, acc[m][1]);
  }
}

void sample_rows(const SampledProduct& p, const E* y, const E* x, E* out, int64_t begin,
                 int64_t end, A* mine) {
  const Csr& a = p.a;
  const int64_t B = side(a), steps = (p.N + STEP - 1) / STEP;
  A* const xs = mine;
  A* const ys = xs + STEP * WIDTH;
  A* const sums = ys + STEP * B;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t j0 = a.indptr[r], flat = (a.indptr[r + 1] - j0) * B;
    // f counts the columns of the block-row's blocks, side by side.
    for (int64_t f0 = 0; f0 < flat; f0 += WIDTH) {
      const int64_t f1 = std::min(flat, f0 + WIDTH);
      auto each_run = [&](const auto& f) {
        for (int64_t c = f0; c < f1;) {
          const int64_t e = c / B, k = c % B, n = std::min(f1 - c, B - k);
          f(c - f0, j0 + e, k, n);
          c += n;
        }
      };
      std::fill(sums, sums + B * WIDTH, A(0));
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t n0 = step * STEP, rows = std::min(STEP, p.N - n0);
        if (steps > 1 || f0 == 0) {
          gather(y + n0 * p.y.n_step + r * B * p.y.c_step, p.y.n_step, p.y.c_step, rows, B, ys, B,
                 B);
        }
        each_run([&](int64_t at, int64_t j, int64_t k, int64_t n) {
          gather(x + n0 * p.x.n_step + (a.indices[j] * B + k) * p.x.c_step, p.x.n_step, p.x.c_step,
                 rows, n, xs + at, WIDTH, n);
        });
        if (f1 - f0 < WIDTH) {
          for (int64_t n = 0; n < rows; ++n) {
            std::fill(xs + n * WIDTH + f1 - f0, xs + (n + 1) * WIDTH, A(0));
          }
        }
        int64_t i = 0;
        for (; i + I <= B; i += I) sample_tile<I>(ys + i, B, xs, rows, sums + i * WIDTH);
        if constexpr (BLOCK == 0) {
          if (TALL > 4 && B - i >= 4) {
            sample_tile<4>(ys + i, B, xs, rows, sums + i * WIDTH);
            i += 4;
          }
          for (; i < B; ++i) sample_tile<1>(ys + i, B, xs, rows, sums + i * WIDTH);
        }
      }
      each_run([&](int64_t at, int64_t j, int64_t k, int64_t n) {
        scatter(sums + at, WIDTH, B, n, out + j * B * B + k, B, 1);
      });
    }
  }
}

int64_t sampled_scratch(const SampledProduct& p) {
  const int64_t B = side(p.a);
  return round_up(STEP * WIDTH + STEP * B + B * WIDTH, 64);
}

}  // namespace

MLX_SPARSE_EXPORT size_t spmm_scratch(const Product* p) {
  return Layout(*p).total(p->crew.size) * sizeof(A);
}

MLX_SPARSE_EXPORT void spmm(const Product* p) {
  const Layout layout(*p);
  for (int64_t v = 0; v < p->V; ++v) {
    for (int64_t n = 0; n < p->N; n += CHUNK) {
      spmm_chunk(*p, layout, v, n, std::min(CHUNK, p->N - n));
    }
  }
}

MLX_SPARSE_EXPORT size_t sddmm_scratch(const SampledProduct* p) {
  return sampled_scratch(*p) * p->crew.size * sizeof(A);
}

MLX_SPARSE_EXPORT void sddmm(const SampledProduct* p) {
  const int64_t B = side(p->a);
  for (int64_t v = 0; v < p->V; ++v) {
    const E* y = static_cast<const E*>(p->y.values) + v * p->y.v_step;
    const E* x = static_cast<const E*>(p->x.values) + v * p->x.v_step;
    E* out = static_cast<E*>(p->out) + v * p->a.n_blocks * B * B;
    share_rows(p->crew, p->a.indptr, p->a.R, double(p->a.n_blocks) * B * B * p->N,
               [&](int64_t begin, int64_t end, int worker) {
                 A* mine = static_cast<A*>(p->scratch) + worker * sampled_scratch(*p);
                 sample_rows(*p, y, x, out, begin, end, mine);
               });
  }
}

}  // namespace mlx_sparse_nn
