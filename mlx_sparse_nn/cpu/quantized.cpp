// Products of matrices of quantized blocks. ELEMENT is the type of x, y, scales and biases; BITS of
// a packed integer. The side B of a block is a multiple of 32, and a group has 32, 64 or 128
// values. Letters as in ../metal/README.md.
//
// qspmm    y[v, n, r B + o] = bias[r B + o] + sum of W_j[o, k] x[v, n, indices[j] B + k] over the
//          blocks j of block-row r and k < B. W_j is block [v, j], or the transpose of block
//          [v, perm[j]]; its values are scale * q + bias, by the scale and bias of their group.
//
// Packed integers are read once for each CHUNK rows of x. Many rows are multiplied in panels, as in
// blocks.cpp, by values that were dequantized into scratch, a few blocks at a time. Up to FEW rows
// are multiplied by vectors of values, which are unpacked in registers; or, of the transpose, into
// scratch. Block-rows are shared over the crew.
//
// Values and sums are float32. In panels: the bias, blocks in stored order, k ascending. Which rows
// are in panels follows from N alone.
//
// Blocks are computed whole. Where they reach past the matrix, packed x is zero and y is dropped; a
// block past the last column is multiplied from a copy that has zeros there, or of the transpose,
// whose blocks are dequantized anyway, from values that are zero.

// Vectors that are wider than a register are passed to nobody but inlined functions.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "copy.h"
#include "kernels.h"
#include "share.h"
#include "vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mlx_sparse_nn {
namespace {

using E = ELEMENT;
constexpr bool WIDENED = sizeof(E) != sizeof(float);

constexpr int W = LANES<float>;
constexpr int PANEL = 2 * W;                   // rows of x in a panel
constexpr int TALL = REGISTERS == 32 ? 8 : 4;  // rows of A in a tile of registers
constexpr int64_t CHUNK = 128;                 // rows of x packed at once
constexpr int64_t DEPTH = 128;      // columns whose values and x stay in the first cache,
constexpr int64_t FEW_DEPTH = 512;  // or their integers and a few rows of x
constexpr int FEW = 8;
constexpr int UNIT = 32;  // values that lie in whole words
constexpr int UNIT_BYTES = UNIT * BITS / 8;
constexpr int MAX_GROUP = FEW_DEPTH / UNIT;

// Of loops that are bound by registers: inlined into one function, they leave each other too few.
#define NOINLINE __attribute__((noinline))

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---------------------------------------------------------------- integers

// Integers of 2, 4 and 8 bits lie within bytes: with one byte a lane they take least to unpack, but
// come out of order. All others, and all that have to be in order, take two bytes a lane.
constexpr bool IN_BYTES = 8 % BITS == 0;
constexpr int PER_BYTE = IN_BYTES ? 8 / BITS : 1;
constexpr int ORDERED = W < 8 ? 8 : W;      // lanes of integers in order
constexpr int L = BITS == 2 ? 8 : ORDERED;  // and of those that few rows are multiplied by
constexpr int VECTORS = UNIT / L;           // of a unit
constexpr int MASK = (1 << BITS) - 1;

// N bytes from memory, widened.
template <int N>
INLINE vec<int32_t, N> load_bytes(const uint8_t* from) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    const __m128i bytes = *reinterpret_cast<const __m128i_u*>(from);
    return bit_cast<vec<int32_t, 16>>(_mm512_maskz_cvtepu8_epi32(0xFFFF, bytes));
  }
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i_u*>(from));
    return bit_cast<vec<int32_t, 8>>(_mm256_cvtepu8_epi32(bytes));
  }
#endif
  const auto bytes = *reinterpret_cast<const loose_vec<uint8_t, N>*>(from);
  return __builtin_convertvector(__builtin_convertvector(bytes, vec<uint16_t, N>), vec<int32_t, N>);
}

// 16 bytes from memory, or 8 twice, in each quarter of a register.
template <int BYTES, int... I>
INLINE vec<uint8_t, 4 * ORDERED> load_repeated(const uint8_t* from,
                                               std::integer_sequence<int, I...>) {
  typedef vec<uint64_t, ORDERED / 2> words;
  uint64_t word[BYTES / 8];
  memcpy(word, from, sizeof word);
  words all = words{} + word[0];
  if constexpr (BYTES == 16) {
    constexpr words odd = {(I % 2 ? ~uint64_t(0) : 0)...};
    all = (all & ~odd) | ((words{} + word[1]) & odd);
  }
  return bit_cast<vec<uint8_t, 4 * ORDERED>>(all);
}

template <int... LANE>
INLINE vec<int32_t, ORDERED> shifts(std::integer_sequence<int, LANE...>) {
  return vec<int32_t, ORDERED>{(LANE * BITS % 8)...};
}

// In each lane, first the two bytes that hold its integer, of those from FIRST on.
template <int FIRST, int... I>
INLINE vec<int32_t, ORDERED> pairs(const uint8_t* from, std::integer_sequence<int, I...>) {
  constexpr int BEGIN = FIRST * BITS / 8;
  constexpr int BYTES = ORDERED * BITS <= 64 ? 8 : 16;  // that are loaded, none beyond the unit
  constexpr int AT = BEGIN + BYTES <= UNIT_BYTES ? BEGIN : UNIT_BYTES - BYTES;
  const auto bytes =
      load_repeated<BYTES>(from + AT, std::make_integer_sequence<int, ORDERED / 2>{});
// Byte i of a register is byte i % 4 of lane i / 4, and comes from the same quarter.
#define SOURCE(i) (i / 16 * 16 + (BEGIN - AT + i / 4 * BITS / 8 + i % 2) % 16)
#if defined(__clang__) || __GNUC__ >= 12
  const auto found = __builtin_shufflevector(bytes, bytes, SOURCE(I)...);
#else
  const auto found = __builtin_shuffle(bytes, vec<uint8_t, 4 * ORDERED>{SOURCE(I)...});
#endif
#undef SOURCE
  return bit_cast<vec<int32_t, ORDERED>>(found);
}

// Integers from FIRST on.
template <int FIRST>
INLINE vec<float, ORDERED> unpack_run(const uint8_t* from) {
  const auto wide = pairs<FIRST>(from, std::make_integer_sequence<int, 4 * ORDERED>{});
  const auto shift = shifts(std::make_integer_sequence<int, ORDERED>{});
  return __builtin_convertvector((wide >> shift) & MASK, vec<float, ORDERED>);
}

// The integers of a unit, in order.
template <int FIRST = 0>
INLINE void unpack_in_order(const uint8_t* from, vec<float, ORDERED>* to) {
  if constexpr (FIRST < UNIT) {
    to[FIRST / ORDERED] = unpack_run<FIRST>(from);
    unpack_in_order<FIRST + ORDERED>(from, to);
  }
}

// The integers of a unit, where place() says.
template <int L>
INLINE void unpack(const uint8_t* from, vec<float, L>* to) {
  if constexpr (IN_BYTES) {
#pragma GCC unroll 4
    for (int run = 0; run < UNIT / L / PER_BYTE; ++run) {
      const auto wide = load_bytes<L>(from + run * L);
#pragma GCC unroll 4
      for (int i = 0; i < PER_BYTE; ++i) {
        const auto integers = i + 1 < PER_BYTE ? (wide >> (i * BITS)) & MASK : wide >> (i * BITS);
        to[run * PER_BYTE + i] = __builtin_convertvector(integers, vec<float, L>);
      }
    }
  } else {
    unpack_in_order(from, to);
  }
}

// The values of a block.
NOINLINE void dequantize(const uint8_t* packed, const float* scales, const float* biases,
                         int64_t n_groups, int64_t units, float* to) {
  for (int64_t i = 0; i < n_groups; ++i) {
    for (int64_t u = 0; u < units; ++u) {
      vec<float, ORDERED> q[UNIT / ORDERED];
      unpack_in_order(packed, q);
#pragma GCC unroll 4
      for (int k = 0; k < UNIT / ORDERED; ++k) {
        store<ORDERED>(to + k * ORDERED, q[k] * scales[i] + biases[i]);
      }
      packed += UNIT_BYTES;
      to += UNIT;
    }
  }
}

// ---------------------------------------------------------------- products of a few blocks

// Blocks of one block-row that are multiplied together.
struct Group {
  int n;
  const uint8_t* packed[MAX_GROUP];
  const float* scales[MAX_GROUP];
  const float* biases[MAX_GROUP];
  const float* values[MAX_GROUP];  // dequantized
  int64_t column[MAX_GROUP];
  bool is_first;  // of its block-row: sums of few rows begin here
};

// sums[i] += rows i of the blocks times a panel x of X rows.
template <int X, bool TRANSPOSED>
NOINLINE void multiply_panel(const Group& g, int64_t B, const float* x, float* sums) {
  constexpr int Q = X / W;
  const int64_t i_step = TRANSPOSED ? 1 : B, k_step = TRANSPOSED ? B : 1;
  for (int64_t i = 0; i < B; i += TALL) {
    vec<float, W> acc[TALL][Q];
#pragma GCC unroll 8
    for (int m = 0; m < TALL; ++m) {
#pragma GCC unroll 2
      for (int p = 0; p < Q; ++p) acc[m][p] = load<W>(sums + (i + m) * X + p * W);
    }
    for (int e = 0; e < g.n; ++e) {
      const float* w = g.values[e] + i * i_step;
      const float* xs = x + g.column[e] * X;
#pragma GCC unroll 4
      for (int64_t k = 0; k < B; ++k) {
        vec<float, W> xv[Q];
#pragma GCC unroll 2
        for (int p = 0; p < Q; ++p) xv[p] = load<W>(xs + k * X + p * W);
#pragma GCC unroll 8
        for (int m = 0; m < TALL; ++m) {
          const float value = w[m * i_step + k * k_step];
#pragma GCC unroll 2
          for (int p = 0; p < Q; ++p) acc[m][p] += value * xv[p];
        }
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < TALL; ++m) {
#pragma GCC unroll 2
      for (int p = 0; p < Q; ++p) store<W>(sums + (i + m) * X + p * W, acc[m][p]);
    }
  }
}

// sums[i][n] += the products of row i and row n of x, lane by lane. x is that of pack_few.
template <int N>
NOINLINE void multiply_few(const Group& g, int64_t B, int64_t group, const float* x, float* sums) {
  constexpr int ROWS = N <= 2 ? 4 : REGISTERS / 2 / N < 1 ? 1 : REGISTERS / 2 / N;
  constexpr bool GROUPED = N == 1;
  const int64_t row_bytes = B * BITS / 8, n_groups = B / group, units = group / UNIT;
  const int n_blocks = g.n;
  const bool is_first = g.is_first;
  const int64_t next = n_blocks * B * row_bytes;  // from a block to that of the next group
  for (int64_t i = 0; i < B; i += ROWS) {
    vec<float, L> acc[ROWS][N];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        acc[m][n] = is_first ? vec<float, L>{} : load<L>(sums + ((i + m) * N + n) * L);
      }
    }
    for (int e = 0; e < n_blocks; ++e) {
      const uint8_t* packed = g.packed[e] + i * row_bytes;
      for (int64_t b = 0; b < ROWS * row_bytes; b += 64) {
        __builtin_prefetch(packed + b + next);
      }
      const float* scales = g.scales[e] + i * n_groups;
      const float* biases = g.biases[e] + i * n_groups;
      const float* xs = x + g.column[e] * N;
      for (int64_t j = 0; j < n_groups; ++j) {
        vec<float, L> part[ROWS][N] = {}, total_x[N] = {};
        for (int64_t u = 0; u < units; ++u) {
          vec<float, L> values[ROWS][VECTORS];
#pragma GCC unroll 4
          for (int m = 0; m < ROWS; ++m) {
            unpack<L>(packed + m * row_bytes, values[m]);
            if constexpr (!GROUPED) {
              const float scale = scales[m * n_groups + j], shift = biases[m * n_groups + j];
#pragma GCC unroll 4
              for (int k = 0; k < VECTORS; ++k) values[m][k] = values[m][k] * scale + shift;
            }
          }
#pragma GCC unroll 4
          for (int k = 0; k < VECTORS; ++k) {
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
              const vec<float, L> xv = load<L>(xs + (k * N + n) * L);
              if (GROUPED) total_x[n] += xv;
#pragma GCC unroll 4
              for (int m = 0; m < ROWS; ++m) (GROUPED ? part : acc)[m][n] += values[m][k] * xv;
            }
          }
          packed += UNIT_BYTES;
          xs += UNIT * N;
        }
#pragma GCC unroll 4
        for (int m = 0; m < ROWS && GROUPED; ++m) {
          const float scale = scales[m * n_groups + j], shift = biases[m * n_groups + j];
#pragma GCC unroll 8
          for (int n = 0; n < N; ++n) {
            acc[m][n] += part[m][n] * scale;
            acc[m][n] += total_x[n] * shift;
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) store<L>(sums + ((i + m) * N + n) * L, acc[m][n]);
    }
  }
}

// The sums of the lanes of L vectors.
template <int S = 1>
INLINE vec<float, L> add_up(vec<float, L>* v) {
  if constexpr (S < L) {
#pragma GCC unroll 8
    for (int i = 0; i < L / (2 * S); ++i) {
      swap_lanes<float, L, S>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, L>{});
      v[i] = v[2 * i] + v[2 * i + 1];
    }
    return add_up<2 * S>(v);
  }
  return v[0];
}

INLINE vec<float, L> totals(const float* sums, int64_t step) {
  vec<float, L> v[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) v[i] = load<L>(sums + i * step);
  return add_up(v);
}

// sums[n][k] += column k of the blocks times row n of x, (N, x_step).
template <int N>
NOINLINE void multiply_few_t(const Group& g, int64_t B, const float* x, int64_t x_step,
                             float* sums) {
  constexpr int AT_ONCE = UNIT / W * N <= REGISTERS / 2 ? UNIT / W : 1;  // vectors
  constexpr int CHAINS = AT_ONCE * N >= 8 ? 1 : AT_ONCE * N >= 4 ? 2 : 4;
  for (int64_t k = 0; k < B; k += AT_ONCE * W) {
    vec<float, W> acc[CHAINS][AT_ONCE][N] = {};
    for (int e = 0; e < g.n; ++e) {
      const float* w = g.values[e] + k;
      const float* xs = x + g.column[e];
      for (int64_t i = 0; i < B; i += CHAINS) {
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; ++c) {
#pragma GCC unroll 8
          for (int o = 0; o < AT_ONCE; ++o) {
            const vec<float, W> value = load<W>(w + (i + c) * B + o * W);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) acc[c][o][n] += value * xs[n * x_step + i + c];
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int o = 0; o < AT_ONCE; ++o) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        float* to = sums + n * B + k + o * W;
        vec<float, W> sum = g.is_first ? vec<float, W>{} : load<W>(to);
#pragma GCC unroll 4
        for (int c = 0; c < CHAINS; ++c) sum += acc[c][o][n];
        store<W>(to, sum);
      }
    }
  }
}

// ---------------------------------------------------------------- the product

// How the rows of a chunk are computed: in panels of PANEL or W rows, and the last few by
// themselves, with as many more of zeros as make a power of two.
struct Plan {
  int n = 0;
  int64_t few = 0;
  int padded = 0;
  int lanes[CHUNK / PANEL + 2];
  int64_t first[CHUNK / PANEL + 2];
  int64_t width = 0;  // rows of all panels

  explicit Plan(int64_t rows) {
    int64_t done = 0;
    while (rows - done > FEW) {
      lanes[n] = rows - done > W + W / 2 ? PANEL : W;
      first[n] = done;
      width += lanes[n];
      done = std::min(rows, done + lanes[n++]);
    }
    few = rows - done;
    padded = few > 4 ? 8 : few > 2 ? 4 : static_cast<int>(few);
  }
};

// Scratch of a product, in floats: x in panels, x of the few rows, and each thread's own.
struct Layout {
  int64_t panels;
  int64_t few;
  int64_t sums;    // in panels
  int64_t values;  // of a group
  int64_t affine;  // scales or biases of a group, widened
  int64_t few_sums;
  int64_t edge;  // a block that reaches past the last column: its integers, scales and biases
  int64_t mine;

  explicit Layout(const QuantizedProduct& q) {
    const Product& p = q.product;
    const int64_t B = p.a.B, n_cols = p.a.C * B;
    const bool transposed = p.a.perm != nullptr;
    // No more than is used: every page of it is new to the process.
    const Plan whole(std::min(p.N, CHUNK)), rest(p.N % CHUNK);
    const int64_t width = std::max(whole.width, rest.width);
    const int64_t padded = std::max(whole.padded, rest.padded);
    const int64_t depth = std::max(B, width || transposed ? DEPTH : FEW_DEPTH);
    panels = round_up(width * n_cols, 64);
    few = round_up(padded * n_cols, 64);
    sums = width * B;
    values = width || transposed ? depth * B : 0;
    affine = WIDENED ? round_up(std::max(B, FEW_DEPTH) * B / q.group, 64) : 0;
    few_sums = padded * B * (transposed ? 1 : L);
    edge = !transposed && p.a.n_cols < n_cols ? B * B * BITS / 32 + 2 * B * B / q.group : 0;
    mine = round_up(sums + values + 2 * affine + few_sums + padded * B + B + edge, 64);
  }
  int64_t total(int workers) const { return panels + few + workers * mine; }
};

// Lanes ODD, ODD + 2 and so on of two vectors.
template <int ODD, int... LANE>
INLINE vec<float, L> every_second(vec<float, L> low, vec<float, L> high,
                                  std::integer_sequence<int, LANE...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(low, high, (2 * LANE + ODD)...);
#else
  return __builtin_shuffle(low, high, vec<int32_t, L>{(2 * LANE + ODD)...});
#endif
}

// Value PER_BYTE l + i of each L PER_BYTE to lane l of vector i.
template <int N = PER_BYTE>
INLINE void deinterleave(vec<float, L>* v) {
  if constexpr (N > 1) {
    constexpr auto lanes = std::make_integer_sequence<int, L>{};
    vec<float, L> even[N / 2], odd[N / 2];
    for (int i = 0; i < N / 2; ++i) {
      even[i] = every_second<0>(v[2 * i], v[2 * i + 1], lanes);
      odd[i] = every_second<1>(v[2 * i], v[2 * i + 1], lanes);
    }
    deinterleave<N / 2>(even);
    deinterleave<N / 2>(odd);
    for (int i = 0; i < N / 2; ++i) {
      v[2 * i] = even[i];
      v[2 * i + 1] = odd[i];
    }
  }
}

// A few rows of x, (C B / UNIT, VECTORS, padded, L), in the order of unpack(); or, for the
// transpose, (padded, C B). x ends after n_cols, of `whole` columns.
void pack_few(const E* x, const Rows& steps, int64_t few, int64_t padded, int64_t n_cols,
              int64_t whole, bool transposed, float* to) {
  if (transposed) {
    gather(x, steps.n_step, steps.c_step, few, n_cols, to, whole, whole);
    std::fill_n(to + few * whole, (padded - few) * whole, 0.0f);
    return;
  }
  for (int64_t c = 0; c < whole; c += UNIT) {
    for (int64_t n = 0; n < padded; ++n) {
      const E* from = x + n * steps.n_step + c * steps.c_step;
      vec<float, L> unit[VECTORS] = {};
      for (int k = 0; k < VECTORS && n < few; ++k) {
        if (steps.c_step == 1 && c + (k + 1) * L <= n_cols) {
          unit[k] = load<L>(from + k * L);
        } else {
          for (int l = 0; l < L && c + k * L + l < n_cols; ++l) {
            unit[k][l] = widen(from[(k * L + l) * steps.c_step]);
          }
        }
      }
      for (int k = 0; k < VECTORS; k += PER_BYTE) deinterleave(unit + k);
      for (int k = 0; k < VECTORS; ++k) {
        store<L>(to + c * padded + (k * padded + n) * L, unit[k]);
      }
    }
  }
}

// n stored scales or biases as floats: where they lie, or widened to `to`.
INLINE const float* widened(const E* from, float* to, int64_t n) {
  if (WIDENED) {
    copy_run<LANES<float>>(from, to, n);
    return to;
  }
  return reinterpret_cast<const float*>(from);
}

void multiply(const Group& g, int lanes, bool transposed, int64_t B, const float* x, float* sums) {
  if (lanes == PANEL) {
    transposed ? multiply_panel<PANEL, true>(g, B, x, sums)
               : multiply_panel<PANEL, false>(g, B, x, sums);
  } else {
    transposed ? multiply_panel<W, true>(g, B, x, sums) : multiply_panel<W, false>(g, B, x, sums);
  }
}

template <int N>
void multiply_few_of(const Group& g, bool transposed, int64_t B, int64_t group, const float* x,
                     int64_t n_cols, float* sums) {
  transposed ? multiply_few_t<N>(g, B, x, n_cols, sums) : multiply_few<N>(g, B, group, x, sums);
}

// A block of which `width` columns lie in the matrix, with zeros in the others. Its integers and
// n_groups scales and biases of each row lie one after the other. The group in which the matrix
// ends keeps its scale and bias: they meet zeros of x there, and integers that are zero.
struct Edge {
  uint8_t* packed;
  float* scales;
  float* biases;

  void copy(const uint8_t* from, const float* scales_from, const float* biases_from, int64_t B,
            int64_t width, int64_t group) const {
    const int64_t row_bytes = B * BITS / 8, n_groups = B / group;
    const int64_t bytes = width * BITS / 8, bits = width * BITS % 8;
    const int64_t groups = (width + group - 1) / group;
    std::fill_n(packed, B * row_bytes, uint8_t(0));
    std::fill_n(scales, B * n_groups, 0.0f);
    std::fill_n(biases, B * n_groups, 0.0f);
    for (int64_t i = 0; i < B; ++i) {
      const uint8_t* row = from + i * row_bytes;
      memcpy(packed + i * row_bytes, row, bytes);
      if (bits) packed[i * row_bytes + bytes] = uint8_t(row[bytes] & ((1 << bits) - 1));
      memcpy(scales + i * n_groups, scales_from + i * n_groups, groups * sizeof(float));
      memcpy(biases + i * n_groups, biases_from + i * n_groups, groups * sizeof(float));
    }
  }
};

void compute_chunk(const QuantizedProduct& q, const Layout& layout, int64_t v, int64_t n0,
                   int64_t rows) {
  const Product& p = q.product;
  const Csr& a = p.a;
  const int64_t B = a.B, n_cols = a.C * B;
  const int64_t last_cols = std::min(B, a.n_cols - (a.C - 1) * B);
  const int64_t block_bytes = B * B * BITS / 8, affine = B * B / q.group;
  const bool transposed = a.perm != nullptr;
  const Plan plan(rows);
  const int64_t few0 = rows - plan.few;
  float* const panels = static_cast<float*>(p.scratch);
  float* const few = panels + layout.panels;
  float* const workers = few + layout.few;
  const uint8_t* packed = static_cast<const uint8_t*>(p.data) + v * a.n_blocks * block_bytes;
  const E* scales = static_cast<const E*>(q.scales) + v * a.n_blocks * affine;
  const E* biases = static_cast<const E*>(q.biases) + v * a.n_blocks * affine;
  const E* x = static_cast<const E*>(p.x.values) + v * p.x.v_step + n0 * p.x.n_step;
  E* y = static_cast<E*>(p.y.values) + v * p.y.v_step + n0 * p.y.n_step;
  const E* bias = static_cast<const E*>(p.bias);

  constexpr int64_t WIDE = 64;  // columns packed at once
  const int64_t slices = (a.n_cols + WIDE - 1) / WIDE;
  share(p.crew, plan.n * slices, double(plan.width) * n_cols, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = i / slices, c = i % slices * WIDE, first = plan.first[panel];
      const int64_t lanes = plan.lanes[panel], c_end = std::min(c + WIDE, a.n_cols);
      float* const to = panels + first * n_cols;
      gather(x + first * p.x.n_step + c * p.x.c_step, p.x.c_step, p.x.n_step, c_end - c,
             std::min(lanes, few0 - first), to + c * lanes, lanes, lanes);
      if (c_end == a.n_cols) std::fill_n(to + c_end * lanes, (n_cols - c_end) * lanes, 0.0f);
    }
  });
  if (plan.few) {
    pack_few(x + few0 * p.x.n_step, p.x, plan.few, plan.padded, a.n_cols, n_cols, transposed, few);
  }

  const bool dequantizes = plan.n || transposed;
  const int64_t depth = dequantizes ? DEPTH : FEW_DEPTH;
  const int group = static_cast<int>(B < depth ? depth / B : 1);
  const double work = double(a.n_blocks) * B * B * rows;
  share_rows(p.crew, a.indptr, a.R, work, [&](int64_t begin, int64_t end, int worker) {
    float* const sums = workers + worker * layout.mine;
    float* const values = sums + layout.sums;
    float* const wide_scales = values + layout.values;
    float* const wide_biases = wide_scales + layout.affine;
    float* const few_sums = wide_biases + layout.affine;
    float* const few_out = few_sums + layout.few_sums;
    E* const last_bias = reinterpret_cast<E*>(few_out + plan.padded * B);
    std::fill_n(last_bias, B, E{});
    float* const edge_scales = few_out + (plan.padded + 1) * B;
    float* const edge_biases = edge_scales + affine;
    const Edge edge{reinterpret_cast<uint8_t*>(edge_biases + affine), edge_scales, edge_biases};
    Group g;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t height = std::min(B, a.n_rows - r * B);
      const E* bias_r = bias ? bias + r * B : nullptr;
      if (bias && height < B) {
        memcpy(last_bias, bias_r, height * sizeof(E));
        bias_r = last_bias;
      }
      for (int s = 0; s < plan.n; ++s) {
        float* to = sums + plan.first[s] * B;
        for (int64_t i = 0; i < B; ++i) {
          for (int64_t l = 0; l < plan.lanes[s]; l += W, to += W) {
            store<W>(to, vec<float, W>{} + (bias_r ? widen(bias_r[i]) : 0.0f));
          }
        }
      }
      if (a.indptr[r] == a.indptr[r + 1]) std::fill_n(few_sums, layout.few_sums, 0.0f);
      for (int64_t j0 = a.indptr[r]; j0 < a.indptr[r + 1]; j0 += g.n) {
        g.n = static_cast<int>(std::min<int64_t>(group, a.indptr[r + 1] - j0));
        g.is_first = j0 == a.indptr[r];
        for (int e = 0; e < g.n; ++e) {
          const bool is_edge = last_cols < B && a.indices[j0 + e] == a.C - 1;
          const int64_t j = transposed ? a.perm[j0 + e] : j0 + e;
          g.packed[e] = packed + j * block_bytes;
          g.scales[e] = widened(scales + j * affine, wide_scales + e * affine, affine);
          g.biases[e] = widened(biases + j * affine, wide_biases + e * affine, affine);
          g.column[e] = a.indices[j0 + e] * B;
          g.values[e] = values + e * B * B;
          if (is_edge && !transposed) {
            edge.copy(g.packed[e], g.scales[e], g.biases[e], B, last_cols, q.group);
            g.packed[e] = edge.packed;
            g.scales[e] = edge.scales;
            g.biases[e] = edge.biases;
            g.n = e + 1;  // there is one copy
          }
          if (dequantizes) {
            // Of the transpose, columns are rows of what is stored.
            const int64_t rows_stored = is_edge && transposed ? last_cols : B;
            dequantize(g.packed[e], g.scales[e], g.biases[e], rows_stored * B / q.group,
                       q.group / UNIT, values + e * B * B);
            std::fill_n(values + (e * B + rows_stored) * B, (B - rows_stored) * B, 0.0f);
          }
        }
        for (int s = 0; s < plan.n; ++s) {
          multiply(g, plan.lanes[s], transposed, B, panels + plan.first[s] * n_cols,
                   sums + plan.first[s] * B);
        }
        if (plan.padded == 1) multiply_few_of<1>(g, transposed, B, q.group, few, n_cols, few_sums);
        if (plan.padded == 2) multiply_few_of<2>(g, transposed, B, q.group, few, n_cols, few_sums);
        if (plan.padded == 4) multiply_few_of<4>(g, transposed, B, q.group, few, n_cols, few_sums);
        if (plan.padded == 8) multiply_few_of<8>(g, transposed, B, q.group, few, n_cols, few_sums);
      }
      E* to = y + r * B * p.y.c_step;
      for (int s = 0; s < plan.n; ++s) {
        const int64_t first = plan.first[s], lanes = plan.lanes[s];
        scatter(sums + first * B, lanes, height, std::min(lanes, few0 - first),
                to + first * p.y.n_step, p.y.c_step, p.y.n_step);
      }
      for (int64_t n = 0; n < plan.few; ++n) {
        for (int64_t i = 0; i < B; i += L) {
          vec<float, L> sum = bias_r ? load<L>(bias_r + i) : vec<float, L>{};
          sum += transposed ? load<L>(few_sums + n * B + i)
                            : totals(few_sums + (i * plan.padded + n) * L, plan.padded * L);
          store<L>(few_out + n * B + i, sum);
        }
      }
      if (plan.few) {
        scatter(few_out, B, plan.few, height, to + few0 * p.y.n_step, p.y.n_step, p.y.c_step);
      }
    }
  });
}

}  // namespace

MLX_SPARSE_EXPORT size_t qspmm_scratch(const QuantizedProduct* q) {
  const Product& p = q->product;
  const double work = double(p.a.n_blocks) * p.a.B * p.a.B * std::min(p.N, CHUNK);
  return Layout(*q).total(workers(p.crew, p.a.R, work)) * sizeof(float);
}

MLX_SPARSE_EXPORT void qspmm(const QuantizedProduct* q) {
  const Layout layout(*q);
  for (int64_t v = 0; v < q->product.V; ++v) {
    for (int64_t n = 0; n < q->product.N; n += CHUNK) {
      compute_chunk(*q, layout, v, n, std::min(CHUNK, q->product.N - n));
    }
  }
}

}  // namespace mlx_sparse_nn
