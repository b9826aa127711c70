// y[v, n, r B + o] = bias[r B + o] + sum of W_j[o, k] x[v, n, indices[j] B + k] over the blocks j
// of block-row r and k < B, for few rows of x: bound by reading the packed values. W_j is what
// packed[v, j], scales[v, j] and biases[v, j] stand for, or its transpose, j being perm[j] then.
//
// Inputs
//   packed   (V, n_blocks, B, B BITS / 32) uint32
//   scales   (V, n_blocks, B, B / GROUP_SIZE) T, biases likewise
//   indptr   (R + 1) int32, indices (n_blocks) int32
//   perm     (n_blocks) int32; not read unless TRANSPOSED
//   x        (V, N, n_cols) T
//   bias     (n_rows) T; not read unless BIAS
// Output
//   y        (V, N, n_rows) T
// Launch
//   (n_rows / STRIP 32 WARPS, ceil(N / ROWS), V) threads in groups of (32 WARPS, 1, 1). One group
//   owns STRIP outputs of a block-row and ROWS rows of x. Its warps take pieces of 32 k in turn,
//   DEPTH at a time.
//   Shared memory: 4 WARPS ROWS (STRIP + 4) bytes.
// Template
//   T half or bfloat16; BITS 2, 3, 4, 5, 6 or 8; GROUP_SIZE 32, 64 or 128; B a multiple of 32 and
//   of GROUP_SIZE; INSIDE columns of the last block-column, 1 to B; STRIP outputs, 16, 32 or 64,
//   from 32 on if TRANSPOSED; ROWS of x, a multiple of 8; WARPS; DEPTH; TRANSPOSED and BIAS 0 or 1.
// A sum does not mind in which order k comes, nor a product which output is its row i. So packed
// values go from device memory to the registers where a tensor core wants them: a lane has 8 k, and
// of these one output in every eighth, or neighbouring outputs if TRANSPOSED.
// Sums in float32 of values in T: each warp its pieces in stored order, then over warps, then the
// bias.

#include "copies.h"
#include "mma.h"
#include "stores.h"
#include "quantized.h"

constexpr int STRIPS = B / STRIP;
constexpr int TILES_O = STRIP / 16;
constexpr int TILES_N = ROWS / 8;
constexpr int OUTS = STRIP / 8;         // of a lane
constexpr int PIECES = B / 32;          // of a block
constexpr int WORDS = B * BITS / 32;    // of a stored row
constexpr int SCALES = B / GROUP_SIZE;  // of a stored row
constexpr int PACKS = TRANSPOSED ? 8 : OUTS;
constexpr int COUNT = TRANSPOSED && OUTS < 8 ? OUTS : 8;  // integers of a pack
constexpr int LD = STRIP + 4;
// Steps of a warp that share scales.
constexpr int SHARED = TRANSPOSED ? 1 : GROUP_SIZE / 32 < DEPTH ? GROUP_SIZE / 32 : DEPTH;
extern __shared__ __align__(128) char shared[];
float* partial = reinterpret_cast<float*>(shared);

const int r = blockIdx.x / STRIPS;
const int o0 = blockIdx.x % STRIPS * STRIP;
const int n0 = blockIdx.y * ROWS;
const int v = blockIdx.z;
const int lane = threadIdx.x % 32;
const int warp = threadIdx.x / 32;
const int lane_row = lane / 4;
const int lane_k = lane % 4 * 8;
const int N = x_shape[x_ndim - 2];
const int n_cols = x_shape[x_ndim - 1];
const int n_rows = (indptr_shape[0] - 1) * B;
const int n_inside = n_cols - B + INSIDE;
const int begin = indptr[r];
const int n_pieces = (indptr[r + 1] - begin) * PIECES;

// Rows past the last one repeat it, and are never stored.
const T* x_rows[TILES_N];
#pragma unroll
for (int tn = 0; tn < TILES_N; tn++) {
  x_rows[tn] = x + ((size_t)v * N + min(n0 + 8 * tn + lane_row, N - 1)) * n_cols + lane_k;
}
float acc[TILES_O][TILES_N][4];
#pragma unroll
for (int to = 0; to < TILES_O; to++) {
#pragma unroll
  for (int tn = 0; tn < TILES_N; tn++) {
    acc[to][tn][0] = acc[to][tn][1] = acc[to][tn][2] = acc[to][tn][3] = 0.0f;
  }
}
auto add_pieces = [&](auto alignment) {
  constexpr bool ALIGNED = alignment.value;
  for (int first = warp * DEPTH; first < n_pieces; first += WARPS * DEPTH) {
    // All loads of the steps, those first that others wait for.
    int col[DEPTH];
    size_t row[DEPTH];
    Pack packs[DEPTH][PACKS];
    T scale[DEPTH][PACKS];
    T offset[DEPTH][PACKS];
    uint4 xs[DEPTH][TILES_N];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      const int piece = min(first + d, n_pieces - 1);
      const int j = begin + piece / PIECES;
      const int k0 = piece % PIECES * 32;
      col[d] = indices[j] * B + k0;
      const size_t stored = (size_t)v * indices_shape[0] + (TRANSPOSED ? perm[j] : j);
      row[d] = stored * B + (TRANSPOSED ? k0 + lane_k : o0 + lane_row);
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      const int piece = min(first + d, n_pieces - 1);
      const int place =
          TRANSPOSED ? o0 + OUTS * lane_row : piece % PIECES * 32 + lane_k;  // in a stored row
#pragma unroll
      for (int i = 0; i < PACKS; i++) {
        const size_t i_row = row[d] + (TRANSPOSED ? i : 8 * i);
        packs[d][i] = load_pack<BITS, COUNT>(packed + i_row * WORDS, place);
        if (d % SHARED == 0) {
          scale[d][i] = scales[i_row * SCALES + place / GROUP_SIZE];
          offset[d][i] = biases[i_row * SCALES + place / GROUP_SIZE];
        }
      }
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
#pragma unroll
      for (int tn = 0; tn < TILES_N; tn++) {
        xs[d][tn] = load8<ALIGNED>(x_rows[tn] + col[d]);
      }
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      {
        const bool valid = d == 0 || first + d < n_pieces;

        const int n_valid = INSIDE < B ? n_inside - col[d] - lane_k : 8;  // k in the matrix
        unsigned ws[4][OUTS];                                             // by pairs of k
        if (TRANSPOSED) {
#pragma unroll
          for (int c = 0; c < 4; c++) {  // k 2 c and 2 c + 1
            const unsigned s = !valid ? 0 : bits_of_pair(scale[d][2 * c], scale[d][2 * c + 1]);
            const unsigned b = !valid ? 0 : bits_of_pair(offset[d][2 * c], offset[d][2 * c + 1]);
            const unsigned mask =
                (2 * c < n_valid ? 0xffffu : 0u) | (2 * c + 1 < n_valid ? 0xffff0000u : 0u);
#pragma unroll
            for (int half = 0; half < (OUTS + 3) / 4; half++) {
              unsigned pairs[4];
              pair_up<BITS, SHIFT<T, BITS>>(
                  half ? packs[d][2 * c].high : packs[d][2 * c].low,
                  half ? packs[d][2 * c + 1].high : packs[d][2 * c + 1].low, pairs);
#pragma unroll
              for (int i = 0; i < 4; i++) {
                const unsigned w = scale_pair<BITS, T>(pairs[i], s, b);
                ws[c][4 * half + i] = INSIDE < B ? w & mask : w;
              }
            }
          }
        } else {
#pragma unroll
          for (int e = 0; e < OUTS; e++) {
            const unsigned s =
                bits_of_pair(scale[d / SHARED * SHARED][e], scale[d / SHARED * SHARED][e]);
            const unsigned b =
                bits_of_pair(offset[d / SHARED * SHARED][e], offset[d / SHARED * SHARED][e]);
            unsigned pairs[4];
            pair_up<BITS, SHIFT<T, BITS>>(packs[d][e].low, packs[d][e].high, pairs);
#pragma unroll
            for (int i = 0; i < 4; i++) {  // k i and i + 4
              const unsigned w = scale_pair<BITS, T>(pairs[i], s, b);
              const unsigned mask =
                  (i < n_valid ? 0xffffu : 0u) | (i + 4 < n_valid ? 0xffff0000u : 0u);
              ws[i][e] = INSIDE < B ? w & mask : w;
            }
          }
        }
#pragma unroll
        for (int tn = 0; tn < TILES_N; tn++) {
          uint4 pairs = valid ? xs[d][tn] : make_uint4(0, 0, 0, 0);
          if (!TRANSPOSED) {
            const uint4 a = pairs;
            pairs = make_uint4(__byte_perm(a.x, a.z, 0x5410), __byte_perm(a.x, a.z, 0x7632),
                               __byte_perm(a.y, a.w, 0x5410), __byte_perm(a.y, a.w, 0x7632));
          }
#pragma unroll
          for (int to = 0; to < TILES_O; to++) {
            multiply<T>(acc[to][tn], ws[0][2 * to], ws[0][2 * to + 1], ws[1][2 * to],
                        ws[1][2 * to + 1], pairs.x, pairs.y);
            multiply<T>(acc[to][tn], ws[2][2 * to], ws[2][2 * to + 1], ws[3][2 * to],
                        ws[3][2 * to + 1], pairs.z, pairs.w);
          }
        }
      }
    }
  }
};
if ((size_t)x % 16 == 0) {
  add_pieces(Aligned());
} else {
  add_pieces(Unaligned());
}
const int n_used = min(WARPS, (n_pieces + DEPTH - 1) / DEPTH);
if (warp < n_used) {
  float* mine = partial + warp * (ROWS * LD);
#pragma unroll
  for (int to = 0; to < TILES_O; to++) {
#pragma unroll
    for (int tn = 0; tn < TILES_N; tn++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = 2 * to + e / 2;
        const int o = TRANSPOSED ? OUTS * lane_row + i : 8 * i + lane_row;
        mine[(8 * tn + lane % 4 * 2 + e % 2) * LD + o] = acc[to][tn][e];
      }
    }
  }
}
__syncthreads();
const int n_valid_rows = min(ROWS, N - n0);
for (int i = threadIdx.x; i < n_valid_rows * STRIP; i += 32 * WARPS) {
  const int n = i / STRIP;
  const int o = i % STRIP;
  float sum = 0.0f;
  for (int other = 0; other < n_used; other++) {
    sum += partial[(other * ROWS + n) * LD + o];
  }
  if (BIAS) {
    sum += float(bias[r * B + o0 + o]);
  }
  y[((size_t)v * N + n0 + n) * n_rows + r * B + o0 + o] = T(sum);
}
