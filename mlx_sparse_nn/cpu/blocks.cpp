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
    constexpr int AT_ONCE = K * N * CHAINS <= 16 ? K : K * N * CHAINS <= 32 ? K / 2 : K / 4;
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

constexpr int64_t STEP = 128;  // rows of x and y that are packed, and summed, at once

// A block's row of x is packed to pieces of P lanes, so that W / P of them fill a vector.
INLINE int64_t piece_lanes(int64_t B) {
  int64_t lanes = 2;
  while (lanes < W && lanes < B) lanes *= 2;
  return lanes;
}

template <int P, int PARTS>
INLINE vec<A, P * PARTS> join_parts(const A* const* parts, int64_t at) {
  if constexpr (PARTS == 1) {
    return load<P>(parts[0] + at);
  } else {
    return join<A, P * PARTS / 2>(join_parts<P, PARTS / 2>(parts, at),
                                  join_parts<P, PARTS / 2>(parts + PARTS / 2, at));
  }
}

// sums[i] = start + sum over n of y[n][i] x[n], Q vectors of x.
template <int P, int ROWS, int Q>
void sample_tile(const A* y, int64_t y_step, const A* const* x, int64_t x_step, int64_t n_rows,
                 A* sums) {
  vec<A, W> acc[ROWS][Q];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int q = 0; q < Q; ++q) acc[i][q] = load<W>(sums + (i * Q + q) * W);
  }
  const A* parts[Q * W / P];
  for (int i = 0; i < Q * W / P; ++i) parts[i] = x[i];
#pragma GCC unroll 4
  for (int64_t n = 0; n < n_rows; ++n) {
    vec<A, W> xv[Q];
#pragma GCC unroll 2
    for (int q = 0; q < Q; ++q) xv[q] = join_parts<P, W / P>(parts + q * (W / P), n * x_step);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const A value = y[n * y_step + i];
#pragma GCC unroll 2
      for (int q = 0; q < Q; ++q) acc[i][q] += value * xv[q];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 2
    for (int q = 0; q < Q; ++q) store<W>(sums + (i * Q + q) * W, acc[i][q]);
  }
}

// What a step of rows adds to out. Sums between steps are kept in `sums`, blocks as in out.
struct Sampling {
  const Csr& a;
  const A* y;  // (R, step, B)
  const A* x;  // (C, step, padded)
  int64_t step;
  int64_t padded;
  int64_t rows;
  bool first;
  bool last;
  A* sums;
  E* out;
};

template <int P>
void sample_rows(const Sampling& s, int64_t begin, int64_t end) {
  constexpr int Q = BLOCK == W ? 1 : 2, LANES_X = Q * W, PIECES = LANES_X / P;
  constexpr int TALLEST = Q == 1 ? 2 * TALL : TALL,
                ROWS = BLOCK && BLOCK < TALLEST ? BLOCK : TALLEST;
  const int64_t B = side(s.a), per_block = s.padded / P;
  A tile[TALLEST * LANES_X] __attribute__((aligned(64)));
  for (int64_t r = begin; r < end; ++r) {
    const int64_t n_pieces = (s.a.indptr[r + 1] - s.a.indptr[r]) * per_block;
    for (int64_t p0 = 0; p0 < n_pieces; p0 += PIECES) {
      const int n = static_cast<int>(std::min<int64_t>(PIECES, n_pieces - p0));
      const A* x[PIECES];
      int64_t place[PIECES], width[PIECES];
      for (int i = 0; i < PIECES; ++i) {
        const int64_t piece = p0 + std::min(i, n - 1), k = piece % per_block * P;
        const int64_t j = s.a.indptr[r] + piece / per_block;
        x[i] = s.x + s.a.indices[j] * (s.step * s.padded) + k;
        place[i] = j * B * B + k;
        width[i] = std::min<int64_t>(P, B - k);
      }
      const A* y = s.y + r * s.step * B;
      for (int64_t i0 = 0; i0 < B;) {
        int rows = ROWS;
        if constexpr (BLOCK == 0) {
          while (rows > B - i0) rows /= 2;
        }
        for (int i = 0; i < rows; ++i) {
          for (int e = 0; e < PIECES; ++e) {
            A* to = tile + i * LANES_X + e * P;
            if (s.first || e >= n) {
              store<P>(to, vec<A, P>{});
            } else {
              copy_run(s.sums + place[e] + (i0 + i) * B, to, width[e]);
            }
          }
        }
        if (rows == ROWS) sample_tile<P, ROWS, Q>(y + i0, B, x, s.padded, s.rows, tile);
        if constexpr (BLOCK == 0) {
          if (rows == 4 && ROWS > 4) sample_tile<P, 4, Q>(y + i0, B, x, s.padded, s.rows, tile);
          if (rows == 2) sample_tile<P, 2, Q>(y + i0, B, x, s.padded, s.rows, tile);
          if (rows == 1) sample_tile<P, 1, Q>(y + i0, B, x, s.padded, s.rows, tile);
        }
        for (int i = 0; i < rows; ++i) {
          for (int e = 0; e < n; ++e) {
            const A* from = tile + i * LANES_X + e * P;
            const int64_t to = place[e] + (i0 + i) * B;
            if (s.last) {
              copy_run(from, s.out + to, width[e]);
            } else {
              copy_run(from, s.sums + to, width[e]);
            }
          }
        }
        i0 += rows;
      }
    }
  }
}

void sample(const Sampling& s, int64_t begin, int64_t end) {
  if constexpr (BLOCK > 0) {
    sample_rows<(BLOCK < W ? BLOCK : W)>(s, begin, end);
  } else {
    const int64_t lanes = piece_lanes(s.a.B);
    if (lanes == W) return sample_rows<W>(s, begin, end);
    if constexpr (W > 8) {
      if (lanes == 8) return sample_rows<8>(s, begin, end);
    }
    if constexpr (W > 4) {
      if (lanes == 4) return sample_rows<4>(s, begin, end);
    }
    if constexpr (W > 2) return sample_rows<2>(s, begin, end);
  }
}

// (N, across * B) as (across, step, padded)
void pack_steps(const Crew& crew, const E* from, const Rows& steps, int64_t across, int64_t B,
                int64_t step, int64_t padded, int64_t rows, A* to) {
  share(crew, across, double(across) * B * rows, [&](int64_t begin, int64_t end, int) {
    for (int64_t c = begin; c < end; ++c) {
      gather(from + c * B * steps.c_step, steps.n_step, steps.c_step, rows, B,
             to + c * step * padded, padded, padded);
    }
  });
}

// Scratch: y and x packed, and sums of 16-bit results between steps.
struct SampleLayout {
  int64_t step;
  int64_t padded;
  int64_t y;
  int64_t x;
  int64_t group;  // blocks whose sums are kept at once
  int64_t sums;

  explicit SampleLayout(const SampledProduct& p) {
    const int64_t B = side(p.a);
    step = std::min(STEP, p.N);
    padded = round_up(B, piece_lanes(B));
    y = round_up(p.a.R * step * B, 64);
    x = round_up(p.a.C * step * padded, 64);
    group = WIDENED && p.N > STEP ? std::max<int64_t>(1, (1 << 18) / (B * B)) : p.a.n_blocks;
    sums = 0;
    for (int64_t r = 0; r < p.a.R && WIDENED && p.N > STEP; ++r) {
      sums = std::max(sums, std::max<int64_t>(group, p.a.indptr[r + 1] - p.a.indptr[r]) * B * B);
    }
  }
};

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
  const SampleLayout l(*p);
  return (l.y + l.x + l.sums) * sizeof(A);
}

MLX_SPARSE_EXPORT void sddmm(const SampledProduct* p) {
  const Csr& a = p->a;
  const int64_t B = side(a);
  const SampleLayout l(*p);
  A* const ys = static_cast<A*>(p->scratch);
  A* const xs = ys + l.y;
  A* const sums = xs + l.x;
  for (int64_t v = 0; v < p->V; ++v) {
    const E* y = static_cast<const E*>(p->y.values) + v * p->y.v_step;
    const E* x = static_cast<const E*>(p->x.values) + v * p->x.v_step;
    E* out = static_cast<E*>(p->out) + v * a.n_blocks * B * B;
    // Block-rows [r0, r1) hold as many blocks as sums are kept of.
    for (int64_t r0 = 0; r0 < a.R;) {
      int64_t r1 = r0 + 1;
      while (r1 < a.R && a.indptr[r1 + 1] - a.indptr[r0] <= l.group) ++r1;
      for (int64_t n = 0; n < p->N; n += STEP) {
        const int64_t rows = std::min(STEP, p->N - n);
        pack_steps(p->crew, y + n * p->y.n_step, p->y, a.R, B, l.step, B, rows, ys);
        pack_steps(p->crew, x + n * p->x.n_step, p->x, a.C, B, l.step, l.padded, rows, xs);
        // Blocks count from the first of all.
        A* const kept = WIDENED ? sums - a.indptr[r0] * B * B : reinterpret_cast<A*>(out);
        const Sampling s{a, ys, xs, l.step, l.padded, rows, n == 0, n + rows == p->N, kept, out};
        share_rows(p->crew, a.indptr + r0, r1 - r0,
                   double(a.indptr[r1] - a.indptr[r0]) * B * B * rows,
                   [&](int64_t begin, int64_t end, int) { sample(s, r0 + begin, r0 + end); });
      }
      r0 = r1;
    }
  }
}

}  // namespace mlx_sparse_nn
