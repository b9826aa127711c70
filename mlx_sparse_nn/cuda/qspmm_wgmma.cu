// The product of qspmm_few.cu for many rows of x on Hopper's tensor cores: those who copy write the
// values that packed ones stand for to shared memory, from where spmm_wgmma.cu multiplies them.
//
// Inputs, output: as there.
// Launch
//   (R THREADS, shares, V) threads in groups of (THREADS, 1, 1), THREADS = 128 (WARPGROUPS + 1).
//   One group owns one block-row and an equal share of the tiles of ROWS rows of x, which it takes
//   one after the other. Its last warpgroup copies, the others multiply. Shared memory: STAGES
//   (ROWS + B) 128 + 1024 bytes.
// Template
//   T half or bfloat16; BITS 2, 3, 4, 5, 6 or 8; GROUP_SIZE 32, 64 or 128; B 64 or 128; INSIDE
//   columns of the last block-column, 1 to B; WARPGROUPS that multiply; ROWS of x in a tile, a
//   multiple of 64 WARPGROUPS; STAGES; TRANSPOSED and BIAS 0 or 1.
// Sums in float32 of values in T: the bias, then blocks in stored order, k ascending by 16.

#include "barriers.h"
#include "copies.h"
#include "wgmma.h"
#include "copiers.h"
#include "reader.h"
#include "stores.h"
#include "quantized.h"

constexpr int COPIERS = 128;                     // threads
constexpr int AHEAD = 256 / B;                   // stages whose packed values are on their way
constexpr int TILES = ROWS / (64 * WARPGROUPS);  // 64 x B tiles of a warpgroup
constexpr int DEPTH = 64;                        // k in a stage: rows of 128 bytes
constexpr int PARTS_OF_BLOCK = B / DEPTH;        // stages of a block
constexpr int STAGE = (ROWS + B) * DEPTH;
constexpr int WORDS = B * BITS / 32;    // of a stored row
constexpr int SCALES = B / GROUP_SIZE;  // of a stored row
extern __shared__ char shared[];
__shared__ unsigned long long full[STAGES];
__shared__ unsigned long long empty[STAGES];
T* tiles = reinterpret_cast<T*>(shared + (1024 - shared_address(shared) % 1024) % 1024);

const int r = blockIdx.x;
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int warpgroup = thread / 128;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int all_tiles = (N + ROWS - 1) / ROWS;
const int begin_n = (size_t)all_tiles * blockIdx.y / gridDim.y * ROWS;
const int end_n = (size_t)all_tiles * (blockIdx.y + 1) / gridDim.y * ROWS;
const int begin = indptr[r];
const int n_stages = (indptr[r + 1] - begin) * PARTS_OF_BLOCK;

if (thread < STAGES) {
  init_barrier(full + thread, COPIERS);
  init_barrier(empty + thread, 4 * WARPGROUPS);
}
__syncthreads();

if (warpgroup == WARPGROUPS) {
  // Eight threads copy a row of 64 elements, and of W a pack each. A transposed block lies in slabs
  // of 64 outputs.
  constexpr int EVERY = COPIERS / 8;
  constexpr int PACKS = B / EVERY;
  const int copy_row = thread % COPIERS / 8;
  const int chunk = thread % 8;
  const int place = swizzle<8>(copy_row, chunk) * 8;
  const T* x_mine = x + ((size_t)v * N + copy_row) * n_cols + chunk * 8;
  const size_t first_row = (size_t)v * indices_shape[0] * B + copy_row;
  struct Loaded {
    Pack packs[PACKS];
    T scale[PACKS];
    T offset[PACKS];
  };
  // Pack i lies EVERY rows of a tile after the one before.
  auto load_packs = [&](int stored, int k, Loaded& to) {
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
      const size_t row =
          first_row + (size_t)stored * B + (TRANSPOSED ? k + i * EVERY % DEPTH : i * EVERY);
      const int col = chunk * 8 + (TRANSPOSED ? i * EVERY / DEPTH * DEPTH : k);
      to.packs[i] = load_pack<BITS, 8>(packed + row * WORDS, col);
      to.scale[i] = scales[row * SCALES + col / GROUP_SIZE];
      to.offset[i] = biases[row * SCALES + col / GROUP_SIZE];
    }
  };
  auto copy_as = [&](auto alignment) {
    constexpr bool ALIGNED = alignment.value;
    Copier<STAGES, STAGES - 2> copier{full, empty};
    for (int n0 = begin_n; n0 < end_n; n0 += ROWS) {
      Reader cols(indices, begin, indptr[r + 1]);
      Reader places(perm, begin, TRANSPOSED ? indptr[r + 1] : begin);
      auto load_stage = [&](int stage, Loaded& to) {
        if (stage < n_stages) {
          const int j = begin + stage / PARTS_OF_BLOCK;
          load_packs(TRANSPOSED ? places.at(j) : j, stage % PARTS_OF_BLOCK * DEPTH, to);
        }
      };
      Loaded loaded[AHEAD];
#pragma unroll
      for (int a = 0; a < AHEAD; a++) {
        load_stage(a, loaded[a]);
      }
      for (int first = 0; first < n_stages; first += AHEAD) {
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
          const int stage = first + a;
          if (stage >= n_stages) {
            break;
          }
          const int j = begin + stage / PARTS_OF_BLOCK;
          const int k = stage % PARTS_OF_BLOCK * DEPTH;
          const int col = cols.at(j) * B + k;
          T* x_tile = tiles + copier.begin() * STAGE + place;
          T* w_tile = x_tile + ROWS * DEPTH;
          const int valid = (N - n0 - copy_row + EVERY - 1) / EVERY;
          copy_rows<ALIGNED, ROWS / EVERY, EVERY * DEPTH>(
              x_tile, x_mine + (size_t)n0 * n_cols + col, EVERY * (size_t)n_cols, valid);
          // How many k of the stage lie in the matrix.
          const int depth = INSIDE < B ? n_cols - B + INSIDE - col : DEPTH;
#pragma unroll
          for (int i = 0; i < PACKS; i++) {
            uint4 values =
                values_of<BITS>(loaded[a].packs[i], loaded[a].scale[i], loaded[a].offset[i]);
            if (INSIDE < B) {
              const int inside =
                  TRANSPOSED ? (copy_row + i * EVERY % DEPTH < depth ? 8 : 0) : depth - chunk * 8;
              values = cut8(values, inside);
            }
            *reinterpret_cast<uint4*>(w_tile + i * EVERY * DEPTH) = values;
          }
          load_stage(stage + AHEAD, loaded[a]);
          copier.end();
        }
      }
    }
    copier.finish();
  };
  if ((size_t)x % 16 == 0) {
    copy_as(Aligned());
  } else {
    copy_as(Unaligned());
  }
  return;
}

Ring ring{STAGES};
const int n_rows = (indptr_shape[0] - 1) * B;
const int warpgroup_n = warpgroup * TILES * 64;  // the first row of this warpgroup, in a tile
float acc[TILES][B / 2];
for (int n0 = begin_n; n0 < end_n; n0 += ROWS) {
#pragma unroll
  for (int e = 0; e < B / 2; e++) {
    const float bias_e =
        BIAS ? float(__ldg(bias + r * B + e / 4 * 8 + lane % 4 * 2 + e % 2)) : 0.0f;
#pragma unroll
    for (int tn = 0; tn < TILES; tn++) {
      acc[tn][e] = bias_e;
    }
  }
  int last_buffer = 0;  // of the last stage
  for (int stage = 0; stage < n_stages; stage++) {
    const T* x_tile = tiles + ring.buffer * STAGE + warpgroup_n * DEPTH;
    const T* w_tile = tiles + ring.buffer * STAGE + ROWS * DEPTH;
    wait_barrier(full + ring.buffer, ring.parity);
    begin_products();
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      const unsigned long long w = describe(w_tile + (TRANSPOSED ? k * 64 : k), DEPTH * 128);
#pragma unroll
      for (int tn = 0; tn < TILES; tn++) {
        const unsigned long long a = describe(x_tile + tn * 64 * DEPTH + k, 16);
        Warpgroup<T, B, 0, TRANSPOSED>::multiply(acc[tn], a, w);
      }
    }
    commit_products();
    wait_products<1>();
    if (stage > 0 && lane == 0) {
      arrive(empty + last_buffer);
    }
    last_buffer = ring.buffer;
    ring.advance();
  }
  wait_products<0>();
  if (n_stages > 0 && lane == 0) {
    arrive(empty + last_buffer);
  }
#pragma unroll
  for (int tn = 0; tn < TILES; tn++) {
    const int n = n0 + warpgroup_n + 64 * tn + thread / 32 % 4 * 16;
    store_tiles<T, 2, B / 8>(
        y + ((size_t)v * N + n) * n_rows + r * B, n_rows, N - n, B,
        [&](int row_tile, int to, int e) { return acc[tn][4 * to + 2 * row_tile + e]; });
  }
}
