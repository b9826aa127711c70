// The product of qspmm_few.cu for more rows of x, or of its transpose for few: values are computed
// in the registers of a tensor-core product, once for all rows of x of a thread block.
//
// Inputs, output: as there.
// Launch
//   (n_rows / STRIP 32 WARPS, ceil(N / ROWS), V) threads in groups of (32 WARPS, 1, 1). One group
//   owns STRIP outputs of a block-row and ROWS rows of x. Its warps take steps of 32 k in turn, and
//   copy x for STAGES - 1 of them ahead.
//   Shared memory: 4 WARPS ROWS (STRIP + 4), or 64 WARPS ROWS STAGES bytes if that is more.
// Template
//   T half or bfloat16; BITS 2, 3, 4, 5, 6 or 8; GROUP_SIZE 32, 64 or 128; B a multiple of 32 and
//   of GROUP_SIZE; INSIDE columns of the last block-column, 1 to B; STRIP outputs, 32 or 64; ROWS
//   of x, a multiple of 8; WARPS; STAGES; TRANSPOSED and BIAS 0 or 1.
// A lane has 8 k, and of these one output in every eighth, or neighbouring outputs if TRANSPOSED.
// What it copies of x, it alone reads: no stage waits for another thread.
// Sums in float32 of values in T: each warp its steps in stored order, then over warps, then the
// bias.

#include "copies.h"
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
constexpr int COUNT = TRANSPOSED && OUTS < 8 ? OUTS : 8;  // integers of a pack
constexpr int LD = STRIP + 4;
constexpr int STAGE = ROWS * 32;  // elements of a warp
extern __shared__ __align__(128) char shared[];
float* partial = reinterpret_cast<float*>(shared);  // WARPS x ROWS x LD, when x has been read

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
#pragma unroll
for (int to = 0; to < TILES_O; to++) {
#pragma unroll
  for (int tn = 0; tn < TILES_N; tn++) {
    acc[to][tn][0] = acc[to][tn][1] = acc[to][tn][2] = acc[to][tn][3] = 0.0f;
  }
}

// What a lane needs of W in a step.
struct Loaded {
  Pack packs[PACKS];
  T scale[PACKS];
  T offset[PACKS];
  int col;
};
T* ring = reinterpret_cast<T*>(shared) + warp * (STAGES * STAGE) + lane * 8;
auto load_packs = [&](int step, Loaded& to) {
  if (step < n_steps) {
    const int j = begin + step / STEPS;
    const int k0 = step % STEPS * 32;
    to.col = indices[j] * B + k0;
    const size_t stored = (size_t)v * indices_shape[0] + (TRANSPOSED ? perm[j] : j);
    const size_t row = stored * B + (TRANSPOSED ? k0 + lane_k : o0 + lane_row);
    const int place = TRANSPOSED ? o0 + OUTS * lane_row : k0 + lane_k;  // in a stored row
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
      const size_t i_row = row + (TRANSPOSED ? i : 8 * i);
      to.packs[i] = load_pack<BITS, COUNT>(packed + i_row * WORDS, place);
      to.scale[i] = scales[i_row * SCALES + place / GROUP_SIZE];
      to.offset[i] = biases[i_row * SCALES + place / GROUP_SIZE];
    }
  }
};
auto add_steps = [&](auto alignment) {
  constexpr bool ALIGNED = alignment.value;
  auto copy_x = [&](int step, int stage) {
    if (step < n_steps) {
      const int col = indices[begin + step / STEPS] * B + step % STEPS * 32;
#pragma unroll
      for (int tn = 0; tn < TILES_N; tn++) {
        copy16<ALIGNED>(ring + stage * STAGE + tn * 256, x_rows[tn] + col, true);
      }
    }
    commit_copies();
  };
  Loaded next;
  load_packs(warp, next);
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    copy_x(warp + i * WARPS, i);
  }
  int stage = 0;
#pragma unroll 1
  for (int step = warp; step < n_steps; step += WARPS) {
    const Loaded now = next;
    load_packs(step + WARPS, next);
    __syncwarp();
    copy_x(step + (STAGES - 1) * WARPS, stage == 0 ? STAGES - 1 : stage - 1);
    const int n_valid = INSIDE < B ? n_inside - now.col - lane_k : 8;  // k in the matrix
    unsigned ws[4][OUTS];                                              // by pairs of k
    if (TRANSPOSED) {
#pragma unroll
      for (int c = 0; c < 4; c++) {  // k 2 c and 2 c + 1
        const unsigned s = bits_of_pair(now.scale[2 * c], now.scale[2 * c + 1]);
        const unsigned b = bits_of_pair(now.offset[2 * c], now.offset[2 * c + 1]);
        const unsigned mask =
            (2 * c < n_valid ? 0xffffu : 0u) | (2 * c + 1 < n_valid ? 0xffff0000u : 0u);
#pragma unroll
        for (int half = 0; half < OUTS / 4; half++) {
          const Pack first = now.packs[2 * c];
          const Pack second = now.packs[2 * c + 1];
          unsigned pairs[4];
          pair_up<BITS, SHIFT<T, BITS>>(half ? first.high : first.low,
                                        half ? second.high : second.low, pairs);
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
        const unsigned s = bits_of_pair(now.scale[e], now.scale[e]);
        const unsigned b = bits_of_pair(now.offset[e], now.offset[e]);
        unsigned pairs[4];
        pair_up<BITS, SHIFT<T, BITS>>(now.packs[e].low, now.packs[e].high, pairs);
#pragma unroll
        for (int i = 0; i < 4; i++) {  // k i and i + 4
          const unsigned w = scale_pair<BITS, T>(pairs[i], s, b);
          const unsigned mask = (i < n_valid ? 0xffffu : 0u) | (i + 4 < n_valid ? 0xffff0000u : 0u);
          ws[i][e] = INSIDE < B ? w & mask : w;
        }
      }
    }
    wait_copies<STAGES - 1>();
    __syncwarp();
#pragma unroll
    for (int tn = 0; tn < TILES_N; tn++) {
      uint4 pairs = *reinterpret_cast<const uint4*>(ring + stage * STAGE + tn * 256);
      if (!TRANSPOSED) {
        const uint4 a = pairs;
        pairs = make_uint4(__byte_perm(a.x, a.z, 0x5410), __byte_perm(a.x, a.z, 0x7632),
                           __byte_perm(a.y, a.w, 0x5410), __byte_perm(a.y, a.w, 0x7632));
      }
#pragma unroll
      for (int to = 0; to < TILES_O; to++) {
        multiply<T>(acc[to][tn], ws[0][2 * to], ws[0][2 * to + 1], ws[1][2 * to], ws[1][2 * to + 1],
                    pairs.x, pairs.y);
        multiply<T>(acc[to][tn], ws[2][2 * to], ws[2][2 * to + 1], ws[3][2 * to], ws[3][2 * to + 1],
                    pairs.z, pairs.w);
      }
    }
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }
  wait_copies<0>();
};
if ((size_t)x % 16 == 0) {
  add_steps(Aligned());
} else {
  add_steps(Unaligned());
}
__syncthreads();
const int n_used = min(WARPS, n_steps);
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
