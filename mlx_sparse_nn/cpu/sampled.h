// sddmm of blocks. Rows of y and x are packed STEP at a time, to (R, step, B) and (C, step,
// padded). A vector is a part of a row of out, or parts of rows of small neighbouring blocks; y is
// broadcast.

#pragma once

#include "blocks.h"
#include "copy.h"
#include "share.h"

namespace mlx_sparse_nn {
namespace {

constexpr int64_t STEP = 128;
constexpr int64_t KEPT = 1 << 19;  // sums of 16-bit results that are kept between steps, about

// A row of a block is padded to pieces of a power of two lanes, W / P of which make a vector.
INLINE int64_t piece_lanes(int64_t B) {
  int64_t lanes = BLOCK ? 2 : std::min(4, W);
  while (lanes < W && lanes < B) lanes *= 2;
  return lanes;
}

// One step of rows. Blocks lie in sums as in out.
struct Sampling {
  const Csr& a;
  const A* y;
  const A* x;
  int64_t step;
  int64_t padded;
  int64_t rows;
  bool first;
  bool last;
  A* sums;  // out itself, where it is not rounded
  E* out;
};

// What a tile reads and writes: pieces of x, and for each its place in out and its width there.
template <int PIECES>
struct Pieces {
  const A* x[PIECES];
  int64_t place[PIECES];
  int width[PIECES];
};

template <int P, int PARTS>
INLINE vec<A, P * PARTS> join_pieces(const A* const* pieces, int64_t at) {
  if constexpr (PARTS == 1) {
    return load<P>(pieces[0] + at);
  } else {
    return join<A, P * PARTS / 2>(join_pieces<P, PARTS / 2>(pieces, at),
                                  join_pieces<P, PARTS / 2>(pieces + PARTS / 2, at));
  }
}

// Pieces of a tile from rows of blocks, which are B apart, or to them.
template <int P, bool TO_BLOCKS, class T>
void copy_pieces(T* tile, T* blocks, int rows, int across, int64_t B, const int64_t* place,
                 const int* width) {
  for (int m = 0; m < rows; ++m) {
    for (int piece = 0; piece < across; ++piece, tile += P) {
      T* const at = blocks + m * B + place[piece];
      const size_t bytes = (BLOCK ? P : width[piece]) * sizeof(T);
      TO_BLOCKS ? memcpy(at, tile, bytes) : memcpy(tile, at, bytes);
    }
  }
}

// ROWS rows of blocks from row i on, Q vectors wide. y begins at row i too.
template <int P, int ROWS, int Q>
void sample_tile(const Sampling& s, const A* y, int64_t i, int64_t B,
                 const Pieces<Q * W / P>& pieces) {
  constexpr int PARTS = W / P, ACROSS = Q * PARTS;
  constexpr bool WHOLE = BLOCK && P == W;  // vectors lie in blocks as in registers
  A tile[ROWS * Q * W] __attribute__((aligned(64)));
  vec<A, W> acc[ROWS * Q] = {};
  A* const sums = s.sums + i * B;
  if (!s.first) {
    if constexpr (WHOLE) {
#pragma GCC unroll 16
      for (int m = 0; m < ROWS * Q; ++m) {
        acc[m] = load<W>(sums + m / Q * B + pieces.place[m % Q]);
      }
    } else {
      copy_pieces<P, false>(tile, sums, ROWS, ACROSS, B, pieces.place, pieces.width);
      load_all<W>(tile, acc);
    }
  }
  const A* x[ACROSS];
  for (int piece = 0; piece < ACROSS; ++piece) x[piece] = pieces.x[piece];
#pragma GCC unroll 4
  for (int64_t n = 0; n < s.rows; ++n) {
    vec<A, W> xv[Q];
#pragma GCC unroll 2
    for (int q = 0; q < Q; ++q) xv[q] = join_pieces<P, PARTS>(x + q * PARTS, n * s.padded);
#pragma GCC unroll 16
    for (int m = 0; m < ROWS; ++m) {
      const A value = y[n * B + m];
#pragma GCC unroll 2
      for (int q = 0; q < Q; ++q) acc[m * Q + q] += value * xv[q];
    }
  }
  E* const out = s.out + i * B;
  if constexpr (WHOLE) {
#pragma GCC unroll 16
    for (int m = 0; m < ROWS * Q; ++m) {
      const int64_t at = m / Q * B + pieces.place[m % Q];
      s.last&& WIDENED ? store<W>(out + at, acc[m]) : store<W>(sums + at, acc[m]);
    }
  } else if (WIDENED && s.last) {
    E rounded[ROWS * Q * W];
    store_all<W>(tile, acc);
    for (int m = 0; m < ROWS * Q; ++m) store<W>(rounded + m * W, load<W>(tile + m * W));
    copy_pieces<P, true>(rounded, out, ROWS, ACROSS, B, pieces.place, pieces.width);
  } else {
    store_all<W>(tile, acc);
    copy_pieces<P, true>(tile, sums, ROWS, ACROSS, B, pieces.place, pieces.width);
  }
}

// The rows of blocks from i on, ROWS at a time while there are as many.
template <int P, int ROWS, int Q>
INLINE void sample_tiles(const Sampling& s, const A* y, int64_t i, int64_t B,
                         const Pieces<Q * W / P>& pieces) {
  for (; i + ROWS <= B; i += ROWS) sample_tile<P, ROWS, Q>(s, y + i, i, B, pieces);
  if constexpr (BLOCK == 0 && ROWS > 1) sample_tiles<P, ROWS / 2, Q>(s, y, i, B, pieces);
}

// Q vectors of block-row r, from piece p on.
template <int P, int Q>
INLINE void sample_across(const Sampling& s, int64_t r, int64_t p, int64_t n_pieces) {
  constexpr int PIECES = Q * W / P, MOST = BLOCK == W ? 2 * TALL : TALL;
  constexpr int ROWS = BLOCK && BLOCK < MOST ? BLOCK : MOST;
  const int64_t B = side(s.a), per_block = s.padded / P;
  Pieces<PIECES> pieces;
  for (int i = 0; i < PIECES; ++i) {
    // Where pieces are missing at the end, the last is computed several times.
    const int64_t piece = std::min(p + i, n_pieces - 1), k = piece % per_block * P;
    const int64_t j = s.a.indptr[r] + piece / per_block;
    pieces.x[i] = s.x + s.a.indices[j] * (s.step * s.padded) + k;
    pieces.place[i] = j * B * B + k;
    pieces.width[i] = static_cast<int>(std::min<int64_t>(P, B - k));
  }
  sample_tiles<P, ROWS, Q>(s, s.y + r * s.step * B, 0, B, pieces);
}

template <int P>
void sample_rows(const Sampling& s, int64_t begin, int64_t end) {
  constexpr int Q = BLOCK == W ? 1 : 2, PIECES = Q * W / P;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t n_pieces = (s.a.indptr[r + 1] - s.a.indptr[r]) * (s.padded / P);
    for (int64_t p = 0; p < n_pieces; p += PIECES) {
      if constexpr (BLOCK > 0 && BLOCK < W) {
        if (n_pieces - p <= W / P) {
          sample_across<P, 1>(s, r, p, n_pieces);
          break;
        }
      }
      sample_across<P, Q>(s, r, p, n_pieces);
    }
  }
}

void sample_rows(const Sampling& s, int64_t begin, int64_t end) {
  if constexpr (BLOCK > 0) {
    return sample_rows<(BLOCK < W ? BLOCK : W)>(s, begin, end);
  } else {
    const int64_t lanes = piece_lanes(s.a.B);
    if (lanes == W) return sample_rows<W>(s, begin, end);
    if constexpr (W > 8) {
      if (lanes == 8) return sample_rows<8>(s, begin, end);
    }
    if constexpr (W > 4) return sample_rows<4>(s, begin, end);
  }
}

// Writes zeros where blocks of block-rows reach past the matrix: the sums there are of zeros times
// anything, and need not be zero.
void clear_outside(const Sampling& s, int64_t begin, int64_t end) {
  const Csr& a = s.a;
  const int64_t B = side(a);
  if (a.n_rows == a.R * B && a.n_cols == a.C * B) return;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t height = inside(a.n_rows, r, B), j_end = a.indptr[r + 1];
    for (int64_t j = a.indptr[r]; j < j_end; ++j) {
      if (height == B) j += count_before(a.indices + j, j_end - j, a.C - 1);
      if (j == j_end) break;
      const int64_t width = inside(a.n_cols, a.indices[j], B);
      E* const block = s.out + j * B * B;
      for (int64_t i = 0; i < height; ++i) std::fill_n(block + i * B + width, B - width, E{});
      std::fill_n(block + height * B, (B - height) * B, E{});
    }
  }
}

// Rows of (N, n) as (across, step, padded), SLICE rows after SLICE, so that memory is read in
// order. The last of the blocks across may have fewer than B columns: zeros follow them.
void pack_steps(const Crew& crew, const E* from, const Rows& steps, int64_t across, int64_t n_cols,
                int64_t B, int64_t step, int64_t padded, int64_t rows, A* to) {
  constexpr int64_t SLICE = 16;
  const int64_t slices = (rows + SLICE - 1) / SLICE;
  share(crew, slices, double(across) * B * rows, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i * SLICE, height = std::min(SLICE, rows - n);
      for (int64_t c = 0; c < across; ++c) {
        gather(from + n * steps.n_step + c * B * steps.c_step, steps.n_step, steps.c_step, height,
               inside(n_cols, c, B), to + (c * step + n) * padded, padded, padded);
      }
    }
  });
}

// Scratch: y and x packed, and sums of 16-bit results between steps.
struct SampleLayout {
  int64_t step;
  int64_t padded;
  int64_t y;
  int64_t x;
  int64_t group;  // blocks whose sums are kept at once, but for longer rows
  int64_t sums = 0;

  explicit SampleLayout(const SampledProduct& p) {
    const int64_t B = side(p.a);
    step = std::min(STEP, p.N);
    padded = round_up(B, piece_lanes(B));
    y = round_up(p.a.R * step * B, 64);
    x = round_up(p.a.C * step * padded, 64);
    group = p.a.n_blocks;
    if (WIDENED && p.N > STEP) {
      group = std::min(group, std::max<int64_t>(1, KEPT / (B * B)));
      int64_t longest = group;
      for (int64_t r = 0; r < p.a.R; ++r) {
        longest = std::max<int64_t>(longest, p.a.indptr[r + 1] - p.a.indptr[r]);
      }
      sums = longest * B * B;
    }
  }
};

}  // namespace
}  // namespace mlx_sparse_nn
