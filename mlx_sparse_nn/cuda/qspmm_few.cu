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
//   owns STRIP outputs of a block-row and ROWS rows of x. Its warps take steps of 32 k in turn,
//   DEPTH at a time.
//   Shared memory: 4 WARPS ROWS (STRIP + 5) bytes.
// Template
//   T float, half or bfloat16; BITS 2, 3, 4, 5, 6 or 8; GROUP_SIZE 32, 64 or 128; B a multiple of
//   32 and of GROUP_SIZE; INSIDE columns of the last block-column, 1 to B; STRIP outputs, 16 or a
//   multiple, 32 if TRANSPOSED; ROWS of x, 8 or 16; WARPS; DEPTH; TRANSPOSED and BIAS 0 or 1.
// The integers of a group are factors of tensor-core products as they are, and x as bfloat16, as
// the sum of PARTS of them where it is longer: no factor is rounded. A sum does not mind in which
// order k comes, nor a product which output is its row i. So packed values go from device memory to
// the registers where a tensor core wants them: a lane has 8 k, and of these one output in every
// eighth, or neighbouring outputs if TRANSPOSED. Sums in float32: each warp its steps in stored
// order, by up to DEPTH steps of a group, then over warps, then the bias. If TRANSPOSED, scales are
// factors of x.

#include "copies.h"
#include "sums.h"
#include "mma.h"
#include "stores.h"
#include "quantized.h"

constexpr int STRIPS = B / STRIP;
constexpr int TILES_O = STRIP / 16;
constexpr int TILES_N = ROWS / 8;
constexpr int OUTS = STRIP / 8;         // of a lane
constexpr int STEPS = B / 32;           // of a block
constexpr int WORDS = B * BITS / 32;    // of a stored row
constexpr int SCALES = B / GROUP_SIZE;  // of a stored row
constexpr int PACKS = TRANSPOSED ? 8 : OUTS;
constexpr int COUNT = TRANSPOSED ? OUTS : 8;  // integers of a pack
constexpr bool EXACT = TRANSPOSED || sizeof(T) == 4 || BITS == 8;
constexpr int COPIES = TRANSPOSED ? 3 : PARTS<T>;
constexpr int LD = STRIP + 4;
// Steps of a warp that share scales.
constexpr int SHARED = TRANSPOSED ? 1 : GROUP_SIZE / 32 < DEPTH ? GROUP_SIZE / 32 : DEPTH;
static_assert(!TRANSPOSED || STRIP == 32, "a lane has half a pack of one group");
extern __shared__ __align__(128) char shared[];
float* partial = reinterpret_cast<float*>(shared);  // WARPS x ROWS x LD
float* shares = partial + WARPS * ROWS * LD;        // WARPS x ROWS: what biases add up to

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
const int n_steps = (indptr[r + 1] - begin) * STEPS;

// Rows past the last one repeat it, and are never stored.
const T* x_rows[TILES_N];
#pragma unroll
for (int tn = 0; tn < TILES_N; tn++) {
  x_rows[tn] = x + ((size_t)v * N + min(n0 + 8 * tn + lane_row, N - 1)) * n_cols + lane_k;
}
float acc[TILES_O][TILES_N][4];
float share[TILES_N];
#pragma unroll
for (int tn = 0; tn < TILES_N; tn++) {
  share[tn] = 0.0f;
#pragma unroll
  for (int to = 0; to < TILES_O; to++) {
    acc[to][tn][0] = acc[to][tn][1] = acc[to][tn][2] = acc[to][tn][3] = 0.0f;
  }
}
auto add_steps = [&](auto alignment) {
  constexpr bool ALIGNED = alignment.value;
  for (int first = warp * DEPTH; first < n_steps; first += WARPS * DEPTH) {
    // All loads of the steps, those first that others wait for.
    int col[DEPTH];
    size_t row[DEPTH];
    Pack packs[DEPTH][PACKS];
    T scale[DEPTH][PACKS];
    T offset[DEPTH][PACKS];
    Eight<T> xs[DEPTH][TILES_N];
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      const int step = min(first + d, n_steps - 1);
      const int j = begin + step / STEPS;
      const int k0 = step % STEPS * 32;
      col[d] = indices[j] * B + k0;
      const size_t stored = (size_t)v * indices_shape[0] + (TRANSPOSED ? perm[j] : j);
      row[d] = stored * B + (TRANSPOSED ? k0 + lane_k : o0 + lane_row);
    }
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      const int step = min(first + d, n_steps - 1);
      // In a stored row.
      const int place = TRANSPOSED ? o0 + OUTS * lane_row : step % STEPS * 32 + lane_k;
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
        xs[d][tn] = load_eight<ALIGNED>(x_rows[tn] + col[d]);
      }
    }
    float sums[TILES_O][TILES_N][4];  // of the integers of a group,
    float x_sums[TILES_N][4];         // and of ones: a sum of x
#pragma unroll
    for (int d = 0; d < DEPTH; d++) {
      const bool valid = d == 0 || first + d < n_steps;
      unsigned ws[4][OUTS];  // by pairs of k
      if (TRANSPOSED) {
#pragma unroll
        for (int c = 0; c < 4; c++) {  // k 2 c and 2 c + 1
          unsigned pairs[4];
          pair_up<BITS, SHIFT<__nv_bfloat16, BITS>>(packs[d][2 * c].low, packs[d][2 * c + 1].low,
                                                    pairs);
#pragma unroll
          for (int i = 0; i < 4; i++) {
            ws[c][i] = factors<BITS, EXACT>(pairs[i]);
          }
        }
      } else {
#pragma unroll
        for (int e = 0; e < OUTS; e++) {
          unsigned pairs[4];
          pair_up<BITS, SHIFT<__nv_bfloat16, BITS>>(packs[d][e].low, packs[d][e].high, pairs);
#pragma unroll
          for (int i = 0; i < 4; i++) {  // k i and i + 4
            ws[i][e] = factors<BITS, EXACT>(pairs[i]);
          }
        }
      }
#pragma unroll
      for (int tn = 0; tn < TILES_N; tn++) {
        unsigned parts[COPIES][4];
        const Eight<T> eight = xs[d][tn];
        if constexpr (COPIES == 1) {
          const uint4 a = valid ? eight.words[0] : make_uint4(0, 0, 0, 0);
          parts[0][0] = __byte_perm(a.x, a.z, 0x5410);
          parts[0][1] = __byte_perm(a.x, a.z, 0x7632);
          parts[0][2] = __byte_perm(a.y, a.w, 0x5410);
          parts[0][3] = __byte_perm(a.y, a.w, 0x7632);
        } else {
          const T* elements = reinterpret_cast<const T*>(&eight);
          float values[8];
#pragma unroll
          for (int k = 0; k < 8; k++) {
            values[k] = valid ? float(elements[k]) : 0.0f;
            if (TRANSPOSED) {
              const bool inside = INSIDE == B || col[d] + lane_k + k < n_inside;
              share[tn] = fmaf(inside ? float(offset[d][k]) : 0.0f, values[k], share[tn]);
              values[k] *= inside ? float(scale[d][k]) : 0.0f;
            }
          }
          split<COPIES, !TRANSPOSED>(values, parts);
        }
        if (d % SHARED == 0) {
#pragma unroll
          for (int e = 0; e < 4; e++) {
            x_sums[tn][e] = 0.0f;
#pragma unroll
            for (int to = 0; to < TILES_O; to++) {
              sums[to][tn][e] = 0.0f;
            }
          }
        }
#pragma unroll
        for (int part = COPIES - 1; part >= 0; part--) {  // the least first
          const unsigned (&p)[4] = parts[part];
          if (!TRANSPOSED) {
            constexpr unsigned ONES = 0x3f803f80u;
            multiply<__nv_bfloat16>(x_sums[tn], ONES, ONES, ONES, ONES, p[0], p[1]);
            multiply<__nv_bfloat16>(x_sums[tn], ONES, ONES, ONES, ONES, p[2], p[3]);
          }
#pragma unroll
          for (int to = 0; to < TILES_O; to++) {
            float (&sum)[4] = TRANSPOSED ? acc[to][tn] : sums[to][tn];
            multiply<__nv_bfloat16>(sum, ws[0][2 * to], ws[0][2 * to + 1], ws[1][2 * to],
                                    ws[1][2 * to + 1], p[0], p[1]);
            multiply<__nv_bfloat16>(sum, ws[2][2 * to], ws[2][2 * to + 1], ws[3][2 * to],
                                    ws[3][2 * to + 1], p[2], p[3]);
          }
        }
      }
      if (!TRANSPOSED && d % SHARED == SHARED - 1) {
        // Of a group that lies outside the matrix, the scale may be anything.
        const bool inside = INSIDE == B || col[d / SHARED * SHARED] < n_inside;
#pragma unroll
        for (int i = 0; i < OUTS; i++) {
          const float s = inside ? float(scale[d / SHARED * SHARED][i]) : 0.0f;
          const float o = inside ? float(offset[d / SHARED * SHARED][i]) : 0.0f;
          const float b = EXACT ? o : fmaf(-128.0f, s, o);
#pragma unroll
          for (int tn = 0; tn < TILES_N; tn++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
              float& sum = acc[i / 2][tn][i % 2 * 2 + e];
              sum = fmaf(s, sums[i / 2][tn][i % 2 * 2 + e], fmaf(b, x_sums[tn][e], sum));
            }
          }
        }
      }
    }
  }
};
if ((size_t)x % 16 == 0) {
  add_steps(Aligned());
} else {
  add_steps(Unaligned());
}
const int n_used = min(WARPS, (n_steps + DEPTH - 1) / DEPTH);
if (warp < n_used) {
  float* mine = partial + warp * (ROWS * LD);
#pragma unroll
  for (int tn = 0; tn < TILES_N; tn++) {
#pragma unroll
    for (int to = 0; to < TILES_O; to++) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int i = 2 * to + e / 2;
        const int o = TRANSPOSED ? OUTS * lane_row + i : 8 * i + lane_row;
        mine[(8 * tn + lane % 4 * 2 + e % 2) * LD + o] = acc[to][tn][e];
      }
    }
    if (TRANSPOSED) {
      const float sum = sum_lanes<1, 4>(share[tn]);
      if (lane % 4 == 0) {
        shares[warp * ROWS + 8 * tn + lane_row] = sum;
      }
    }
  }
}
__syncthreads();
const int n_valid = min(ROWS, N - n0);
for (int i = threadIdx.x; i < n_valid * STRIP; i += 32 * WARPS) {
  const int n = i / STRIP;
  const int o = i % STRIP;
  float sum = 0.0f;
  for (int other = 0; other < n_used; other++) {
    sum += partial[(other * ROWS + n) * LD + o];
    if (TRANSPOSED) {
      sum += shares[other * ROWS + n];
    }
  }
  if (BIAS) {
    sum += float(bias[r * B + o0 + o]);
  }
  y[((size_t)v * N + n0 + n) * n_rows + r * B + o0 + o] = T(sum);
}
