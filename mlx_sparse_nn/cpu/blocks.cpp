// Products of matrices of square blocks. ELEMENT is the type of all arrays; BLOCK the side of a
// block, or 0: any side, known at run time. Letters as in ../metal/README.md.
//
// spmm     y[v, n, r B + o] = bias[r B + o] + sum of W_j[o, k] x[v, n, indices[j] B + k] over the
//          blocks j of block-row r and k < B. W_j is data[v, j], or the transpose of
//          data[v, perm[j]].
// sddmm    out[v, j, i, k] = sum over n of y[v, n, r B + i] x[v, n, indices[j] B + k]
//
// Work is shared by block-rows. spmm takes CHUNK rows of x at a time, and a block-row's blocks in
// groups, whose x and values stay in the caches near: panels.h multiplies a group by many rows,
// few_rows.h by the few that are left. sddmm is in sampled.h.
//
// Sums are in float32, or in float64 of float64, and rounded once. Their order follows from sizes
// alone. spmm in panels: bias, then blocks in stored order, k ascending. Few rows: lanes apart, the
// bias last. sddmm: n ascending.
//
// Blocks are computed whole. Where they reach past the matrix, packed operands are zero, and
// results are dropped, or of sddmm cleared. In spmm a block past the last column is multiplied from
// a copy that has zeros there.

#include "blocks.h"
#include "copy.h"
#include "few_rows.h"
#include "panels.h"
#include "sampled.h"
#include "share.h"

namespace mlx_sparse_nn {
namespace {

constexpr int64_t DEPTH = 128;  // columns of a group, whose x of a panel stays in the first cache
constexpr int64_t STRIP = 128;  // outputs that are written together, about
constexpr int64_t SLICE = 64;   // columns of a panel that are packed together

// Scratch, in accumulators: x in panels and of the few rows, then what each thread has.
struct Layout {
  int64_t height;  // of a strip
  int64_t panels;
  int64_t few;
  int64_t start;   // bias of a block-row
  int64_t values;  // of a group, widened
  int64_t sums;    // of a strip in panels
  int64_t sums_few;
  int64_t out_few;  // of a strip
  int64_t edge;     // a block that reaches past the last column

  explicit Layout(const Product& p) {
    const int64_t B = side(p.a), most = most_few(B, p.a.perm);
    const Plan whole(std::min(p.N, CHUNK), most), last(p.N % CHUNK, most);  // chunks
    const int64_t lanes = std::max(whole.width(), last.width());
    const int64_t n = few_width(std::max(whole.few, last.few));
    height = std::max(B, std::min(STRIP / B, p.a.R) * B);
    panels = round_up(lanes * p.a.C * B, 64);
    few = round_up(n * p.a.C * x_step(B), 64);
    start = round_up(B, 64);
    values = WIDENED && lanes ? round_up(std::max(B, DEPTH) * B, 64) : 0;
    sums = round_up(height * lanes, 64);
    sums_few = round_up(n * few_sums(B) * V, 64);
    out_few = round_up(n * height, 64);
    edge = p.a.n_cols < p.a.C * B ? round_up(B * B, 64) : 0;
  }
  int64_t mine() const { return start + values + sums + sums_few + out_few + edge; }
};

// Multiply-adds of some rows of x.
double work_of(const Csr& a, int64_t rows) { return double(a.n_blocks) * side(a) * side(a) * rows; }

// One chunk of rows of one matrix.
class Chunk {
 public:
  Chunk(const Product& p, const Layout& layout, int64_t v, int64_t n, int64_t rows)
      : p(p),
        a(p.a),
        layout(layout),
        plan(rows, most_few(side(p.a), p.a.perm)),
        rows(rows),
        B(side(p.a)),
        last_cols(inside(p.a.n_cols, p.a.C - 1, B)),
        data(static_cast<const E*>(p.data) + v * a.n_blocks * B * B),
        x(static_cast<const E*>(p.x.values) + v * p.x.v_step + n * p.x.n_step),
        y(static_cast<E*>(p.y.values) + v * p.y.v_step + n * p.y.n_step),
        panels(static_cast<A*>(p.scratch)),
        few(panels + layout.panels) {}

  void run() {
    pack_panels();
    if (plan.few) pack_few();
    const double work = work_of(a, rows);
    const int64_t height = layout.height / B;  // of a strip, in block-rows
    share_rows(p.crew, a.indptr, a.R, work, [&](int64_t begin, int64_t end, int worker) {
      const Own own(layout, few + layout.few + worker * layout.mine());
      clear_outside(own.edge);
      for (int64_t r = begin; r < end; r += height) {
        multiply_strip(r, std::min(end, r + height), own);
      }
    });
  }

 private:
  // What a thread has of the scratch.
  struct Own {
    A* start;
    A* values;
    A* sums;
    A* sums_few;
    A* out_few;
    E* edge;  // zeros past the matrix

    Own(const Layout& layout, A* scratch)
        : start(scratch),
          values(start + layout.start),
          sums(values + layout.values),
          sums_few(sums + layout.sums),
          out_few(sums_few + layout.sums_few),
          edge(reinterpret_cast<E*>(out_few + layout.out_few)) {}
  };

  void pack_panels() const {
    const int64_t n_cols = a.n_cols, whole = a.C * B, few0 = rows - plan.few;
    // Slices begin where cache lines do.
    const int64_t shift = reinterpret_cast<uintptr_t>(x) / sizeof(E) % W;
    const int64_t slices = (n_cols + shift + SLICE - 1) / SLICE;
    share(p.crew, plan.n * slices, double(few0) * n_cols, [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t q = i / slices, s = i % slices * SLICE - shift;
        const int64_t c = std::max<int64_t>(0, s), c_end = std::min(s + SLICE, n_cols);
        const int64_t first = plan.first[q], lanes = plan.lanes[q];
        A* const to = panels + first * whole;
        gather(x + first * p.x.n_step + c * p.x.c_step, p.x.c_step, p.x.n_step, c_end - c,
               std::min(lanes, few0 - first), to + c * lanes, lanes, lanes);
        if (c_end == n_cols) std::fill_n(to + n_cols * lanes, (whole - n_cols) * lanes, A(0));
      }
    });
  }

  void pack_few() const {
    const int64_t width = few_width(plan.few), step = width * x_step(B);
    for (int64_t n = 0; n < width; ++n) {
      A* const to = few + n * x_step(B);
      // A row of x that is missing is some other; what it gives is not written.
      const E* const row = x + (rows - plan.few + std::min(n, plan.few - 1)) * p.x.n_step;
      const int64_t whole = a.n_cols / B;  // block-columns
      int64_t c = 0;
      if (RUN < V && p.x.c_step == 1) {
        for (; c < whole; ++c) {
          const vec<A, RUN> values = load<RUN>(row + c * B);
          for (int k = 0; k < V; k += RUN) store<RUN>(to + c * step + k, values);
        }
      }
      gather(row + c * B * p.x.c_step, B * p.x.c_step, p.x.c_step, whole - c, B, to + c * step,
             step, B);
      gather(row + whole * B * p.x.c_step, 0, p.x.c_step, a.C - whole, last_cols, to + whole * step,
             step, B);
      for (; c < a.C; ++c) {
        for (int64_t k = B; k < x_step(B); ++k) to[c * step + k] = to[c * step + k - B];
      }
    }
  }

  // y of block-rows r0 to r1.
  void multiply_strip(int64_t r0, int64_t r1, const Own& own) const {
    const int64_t n_cols = a.C * B, height = (r1 - r0) * B, few0 = rows - plan.few;
    const auto [start, values, sums, sums_few, out_few, edge] = own;
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t top = (r - r0) * B, end = a.indptr[r + 1];
      const int64_t n_bias = p.bias ? inside(a.n_rows, r, B) : 0;
      if (p.bias) copy_run<W>(static_cast<const E*>(p.bias) + r * B, start, n_bias);
      std::fill(start + n_bias, start + B, A(0));
      int64_t j = a.indptr[r];
      do {
        Group g = group(r, j, values, edge);
        for (int q = 0; q < plan.n; ++q) {
          const int64_t first = plan.first[q], lanes = plan.lanes[q];
          multiply_panel(plan.lanes[q], g, panels + first * n_cols, start,
                         sums + first * height + top * lanes);
        }
        j += g.n;
        few_rows(few_width(plan.few), g, few, sums_few, j == end, out_few + top, height);
      } while (j < end);
      for (int64_t n = 0; n < plan.few; ++n) {
        for (int64_t o = 0; o < B; ++o) out_few[n * height + top + o] += start[o];
      }
    }
    const int64_t height_inside = std::min(height, a.n_rows - r0 * B);
    E* const to = y + r0 * B * p.y.c_step;
    for (int q = 0; q < plan.n; ++q) {
      const int64_t first = plan.first[q], lanes = plan.lanes[q];
      scatter(sums + first * height, lanes, height_inside, std::min(lanes, few0 - first),
              to + first * p.y.n_step, p.y.c_step, p.y.n_step);
    }
    scatter(out_few, height, plan.few, height_inside, to + few0 * p.y.n_step, p.y.n_step,
            p.y.c_step);
  }

  // The next blocks of block-row r, from j on: of DEPTH columns, or one block. A block that reaches
  // past the last column is alone.
  Group group(int64_t r, int64_t j, A* values, E* edge) const {
    Group g;
    g.n = static_cast<int>(std::min(std::max<int64_t>(1, DEPTH / B), a.indptr[r + 1] - j));
    g.first = j == a.indptr[r];
    g.B = B;
    g.column = a.indices + j;
    g.data = a.perm ? data : data + j * g.size();
    g.place = a.perm ? a.perm + j : nullptr;
    if (last_cols < B && g.n) {
      const int64_t before = count_before(g.column, g.n, a.C - 1);
      g.n = static_cast<int>(std::max<int64_t>(1, before));
      if (before == 0) {
        static constexpr int32_t FIRST = 0;
        copy_inside(g.stored(0), edge);
        g.data = edge;
        if (a.perm) g.place = &FIRST;  // still the transpose
      }
    }
    g.next = a.perm && j + 2 * g.n <= a.n_blocks ? a.perm + j + g.n : g.place;
    g.wide = values;
    for (int e = 0; WIDENED && plan.n && e < g.n; ++e) {
      copy_run<W>(g.stored(e), values + e * g.size(), g.size());
    }
    return g;
  }

  // Of a copy of a block in the last block-column: what lies past the matrix, and what lies in it.
  void clear_outside(E* block) const {
    if (last_cols == B) return;
    if (a.perm) {
      std::fill_n(block + last_cols * B, (B - last_cols) * B, E{});
    } else {
      for (int64_t o = 0; o < B; ++o) std::fill_n(block + o * B + last_cols, B - last_cols, E{});
    }
  }
  void copy_inside(const E* block, E* to) const {
    if (a.perm) {
      memcpy(to, block, last_cols * B * sizeof(E));  // its columns are rows of what is stored
    } else {
      for (int64_t o = 0; o < B; ++o) memcpy(to + o * B, block + o * B, last_cols * sizeof(E));
    }
  }

  const Product& p;
  const Csr& a;
  const Layout& layout;
  const Plan plan;
  const int64_t rows;
  const int64_t B;
  const int64_t last_cols;  // of the last block-column that lie in the matrix
  const E* const data;
  const E* const x;
  E* const y;
  A* const panels;
  A* const few;
};

}  // namespace

MLX_SPARSE_EXPORT size_t spmm_scratch(const Product* p) {
  const Layout layout(*p);
  const int64_t n = workers(p->crew, p->a.R, work_of(p->a, std::min(p->N, CHUNK)));
  return (layout.panels + layout.few + n * layout.mine()) * sizeof(A);
}

MLX_SPARSE_EXPORT void spmm(const Product* p) {
  const Layout layout(*p);
  for (int64_t v = 0; v < p->V; ++v) {
    for (int64_t n = 0; n < p->N; n += CHUNK) {
      Chunk(*p, layout, v, n, std::min(CHUNK, p->N - n)).run();
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
        pack_steps(p->crew, y + n * p->y.n_step + r0 * B * p->y.c_step, p->y, r1 - r0,
                   a.n_rows - r0 * B, B, l.step, B, rows, ys + r0 * l.step * B);
        pack_steps(p->crew, x + n * p->x.n_step, p->x, a.C, a.n_cols, B, l.step, l.padded, rows,
                   xs);
        // Blocks count from the first of all.
        A* const kept = WIDENED ? sums - a.indptr[r0] * B * B : reinterpret_cast<A*>(out);
        const Sampling s{a, ys, xs, l.step, l.padded, rows, n == 0, n + rows == p->N, kept, out};
        share_rows(p->crew, a.indptr + r0, r1 - r0,
                   double(a.indptr[r1] - a.indptr[r0]) * B * B * rows,
                   [&](int64_t begin, int64_t end, int) {
                     sample_rows(s, r0 + begin, r0 + end);
                     if (s.last) clear_outside(s, r0 + begin, r0 + end);
                   });
      }
      r0 = r1;
    }
  }
}

}  // namespace mlx_sparse_nn
