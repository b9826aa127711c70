// The product of spmm_tiles.cu in true float32, by CUDA cores, for blocks of any size.
//
// Inputs, output: as there, of float.
// Launch
//   (R STRIPS THREADS, ceil(N / ROWS), V) threads in groups of (THREADS, 1, 1), STRIPS =
//   ceil(B / WIDTH), THREADS = ROWS / TN WIDTH / TO SLICES, rounded up to warps. One group owns
//   WIDTH outputs of a block-row and ROWS rows of x. A thread holds TN x TO sums over one of SLICES
//   parts of the k of every stage.
//   Shared memory: STAGES stages of ROWS STRIDE + W_ROWS W_STRIDE floats; later SLICES ROWS (WIDTH
//   + 4) floats where SLICES > 1.
// Template
//   B; INSIDE columns of the last block-column and LAST rows of the last block-row, 1 to B: x and
//   y end there; ROWS of x and WIDTH outputs of a group; TN
//   and TO of a thread, TO a multiple of 4; SLICES; DEPTH of k in a stage, a multiple of 4 SLICES;
//   STAGES; TRANSPOSED and BIAS 0 or 1.
// Sums in float32: each slice its k in stored order, then over slices, then the bias.

#include "copies.h"
#include "floats.h"
#include "pieces.h"

static_assert(sizeof(T) == 4, "true float32");
constexpr int LANES_O = WIDTH / TO;
constexpr int LANES_N = ROWS / TN;
constexpr int SLICE = LANES_O * LANES_N;  // threads
constexpr int THREADS = (SLICES * SLICE + 31) / 32 * 32;
constexpr int STRIPS = (B + WIDTH - 1) / WIDTH;
constexpr int PADDED = (B + 3) / 4 * 4;  // k of a block in shared memory, in whole chunks
constexpr int CHUNKS = DEPTH / 4;
constexpr int STRIDE = (CHUNKS | 1) * 4;  // neighbouring rows lie in other banks
constexpr int W_CHUNKS = TRANSPOSED ? WIDTH / 4 : CHUNKS;
constexpr int W_ROWS = TRANSPOSED ? DEPTH : WIDTH;
constexpr int W_STRIDE = TRANSPOSED ? WIDTH : STRIDE;
constexpr int STAGE = ROWS * STRIDE + W_ROWS * W_STRIDE;
constexpr int W_COPIES = (W_ROWS * W_CHUNKS + THREADS - 1) / THREADS;  // of a thread
constexpr bool WHOLE = B % 4 == 0;
static_assert(THREADS % CHUNKS == 0, "a thread keeps to one chunk");
static_assert(CHUNKS % SLICES == 0 && WIDTH % TO == 0 && TO % 4 == 0 && ROWS % TN == 0, "even");
extern __shared__ __align__(128) char shared[];
float* tiles = reinterpret_cast<float*>(shared);

const int r = blockIdx.x / STRIPS;
const int o0 = blockIdx.x % STRIPS * WIDTH;
const int n0 = blockIdx.y * ROWS;
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int slice = min(thread / SLICE, SLICES - 1);  // threads beyond the last one store nothing
const int lane_o = thread % SLICE % LANES_O;
const int lane_n = thread % SLICE / LANES_O;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int R = indptr_shape[0] - 1;
const int n_rows = (R - 1) * B + LAST;
const int n_outputs = min(WIDTH, (r == R - 1 ? LAST : B) - o0);  // of this group
const float* blocks = data + (size_t)v * indices_shape[0] * (B * B);
const bool aligned = ((size_t)x | (size_t)data) % 16 == 0 && n_cols % 4 == 0;
const int begin = indptr[r];
const int end = indptr[r + 1];
const int n_stages = ((end - begin) * PADDED + DEPTH - 1) / DEPTH;

// A thread copies the same chunk of k of every row of x, and of every row of W where that is not
// transposed. It reads the index of its block a stage ahead.
const int x_row = thread / CHUNKS;
const int x_k = thread % CHUNKS * 4;
const float* x_mine = x + ((size_t)v * N + n0 + x_row) * n_cols;
int next_stage = 0;
int next_buffer = 0;
int next_col;                   // in x, -1 behind the last block
int next_j;                     // of the block, and
int next_k;                     // the place in it
const float* next_w[W_COPIES];  // rows of W transposed; null where there are zeros
auto read_indices = [&]() {
  const int k = next_stage * DEPTH + x_k;
  next_j = begin + k / PADDED;
  next_k = k % PADDED;
  next_col = next_j < end ? indices[next_j] * B + next_k : -1;
  if constexpr (TRANSPOSED) {
#pragma unroll
    for (int i = 0; i < W_COPIES; i++) {
      const int w_k = next_stage * DEPTH + (thread + i * THREADS) / W_CHUNKS;
      const int j = begin + w_k / PADDED;
      const int k_in = w_k % PADDED;
      const bool stored = j < end && k_in < B && (INSIDE == B || indices[j] * B + k_in < n_cols);
      next_w[i] = stored ? blocks + (size_t)perm[j] * (B * B) + k_in * B : nullptr;
    }
  }
};
auto copy_stage_as = [&](auto alignment) {
  constexpr bool ALIGNED = alignment.value;
  if (next_stage < n_stages) {
    float* x_tile = tiles + next_buffer * STAGE;
    float* w_tile = x_tile + ROWS * STRIDE;
    const int in_block = next_col < 0 ? 0 : min(B - next_k, n_cols - next_col);
    const float* x_src = x_mine + next_col;
#pragma unroll
    for (int i = 0; i < ROWS; i += THREADS / CHUNKS) {
      if (ROWS % (THREADS / CHUNKS) == 0 || x_row + i < ROWS) {
        const bool valid = in_block > 0 && n0 + x_row + i < N;
        copy_floats<ALIGNED>(x_tile + (x_row + i) * STRIDE + x_k,
                             valid ? x_src + (size_t)i * n_cols : x, valid ? in_block : 0);
      }
    }
    if constexpr (TRANSPOSED) {
#pragma unroll
      for (int i = 0; i < W_COPIES; i++) {
        const int at = thread + i * THREADS;
        const int o = o0 + at % W_CHUNKS * 4;
        if (W_ROWS * W_CHUNKS % THREADS == 0 || at < W_ROWS * W_CHUNKS) {
          const bool valid = next_w[i] != nullptr && o < B;
          copy_floats<ALIGNED>(w_tile + at * 4, valid ? next_w[i] + o : data, valid ? B - o : 0);
        }
      }
    } else {
      const float* w_src = blocks + (size_t)min(next_j, end - 1) * (B * B) + next_k;
#pragma unroll
      for (int i = 0; i < WIDTH; i += THREADS / CHUNKS) {
        const int o = x_row + i;
        if (WIDTH % (THREADS / CHUNKS) == 0 || o < WIDTH) {
          const bool valid = o0 + o < B && in_block > 0;
          // Of each four rows, the first ones lie together, then the second ones, and so on.
          copy_floats<ALIGNED>(w_tile + (o % 4 * (WIDTH / 4) + o / 4) * STRIDE + x_k,
                               valid ? w_src + (o0 + o) * B : data, valid ? in_block : 0);
        }
      }
    }
    next_buffer = next_buffer + 1 == STAGES ? 0 : next_buffer + 1;
    next_stage++;
    read_indices();
  }
  commit_copies();
};
auto copy_stage = [&]() {
  if (WHOLE && aligned) {
    copy_stage_as(Constant<WHOLE>());
  } else {
    copy_stage_as(Unaligned());
  }
};

float acc[TN][TO];
#pragma unroll
for (int tn = 0; tn < TN; tn++) {
#pragma unroll
  for (int to = 0; to < TO; to++) {
    acc[tn][to] = 0.0f;
  }
}
read_indices();
#pragma unroll 1
for (int stage = 0; stage < STAGES - 1; stage++) {
  copy_stage();
}
int used = 0;
#pragma unroll 1
for (int stage = 0; stage < n_stages; stage++) {
  wait_copies<STAGES - 2>();
  __syncthreads();
  copy_stage();
  const int k0 = slice * (DEPTH / SLICES);
  const float* x_tile = tiles + used * STAGE + lane_n * STRIDE + k0;
  const float* w_tile = tiles + used * STAGE + ROWS * STRIDE;
  w_tile += TRANSPOSED ? k0 * W_STRIDE + lane_o * 4 : lane_o * STRIDE + k0;
  used = used + 1 == STAGES ? 0 : used + 1;
#pragma unroll
  for (int k = 0; k < DEPTH / SLICES; k += 4) {
    float xs[TN][4];
#pragma unroll
    for (int tn = 0; tn < TN; tn++) {
      load_floats(xs[tn], x_tile + tn * LANES_N * STRIDE + k);
    }
    if constexpr (TRANSPOSED) {
#pragma unroll
      for (int e = 0; e < 4; e++) {
#pragma unroll
        for (int to = 0; to < TO; to += 4) {
          float w[4];
          load_floats(w, w_tile + (k + e) * W_STRIDE + to * LANES_O);
#pragma unroll
          for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int tn = 0; tn < TN; tn++) {
              acc[tn][to + i] = fmaf(xs[tn][e], w[i], acc[tn][to + i]);
            }
          }
        }
      }
    } else {
#pragma unroll
      for (int to = 0; to < TO; to++) {
        float w[4];
        load_floats(w, w_tile + (to % 4 * (WIDTH / 4) + to / 4 * LANES_O) * STRIDE + k);
#pragma unroll
        for (int e = 0; e < 4; e++) {
#pragma unroll
          for (int tn = 0; tn < TN; tn++) {
            acc[tn][to] = fmaf(xs[tn][e], w[e], acc[tn][to]);
          }
        }
      }
    }
  }
}

// Store the sums of outputs o0 + o, ..., o0 + o + 3 of row n0 + m.
auto store = [&](int m, int o, float4 sum) {
  const int count = n0 + m < N ? n_outputs - o : 0;
  if (BIAS) {
    const float* of_row = bias + r * B + o0 + o;
    sum.x += count > 0 ? __ldg(of_row) : 0.0f;
    sum.y += count > 1 ? __ldg(of_row + 1) : 0.0f;
    sum.z += count > 2 ? __ldg(of_row + 2) : 0.0f;
    sum.w += count > 3 ? __ldg(of_row + 3) : 0.0f;
  }
  store_floats<(WHOLE && LAST % 4 == 0)>(y + ((size_t)v * N + n0 + m) * n_rows + r * B + o0 + o,
                                         sum, count);
};
if constexpr (SLICES == 1) {
  if (thread < SLICE) {
#pragma unroll
    for (int tn = 0; tn < TN; tn++) {
#pragma unroll
      for (int to = 0; to < TO; to += 4) {
        store(lane_n + tn * LANES_N, 4 * lane_o + to * LANES_O,
              make_float4(acc[tn][to], acc[tn][to + 1], acc[tn][to + 2], acc[tn][to + 3]));
      }
    }
  }
} else {
  constexpr int PITCH = WIDTH + 4;
  __syncthreads();  // the stages are not read any more
  if (thread < SLICES * SLICE) {
#pragma unroll
    for (int tn = 0; tn < TN; tn++) {
#pragma unroll
      for (int to = 0; to < TO; to += 4) {
        float* place = tiles + (slice * ROWS + lane_n + tn * LANES_N) * PITCH;
        *reinterpret_cast<float4*>(place + 4 * lane_o + to * LANES_O) =
            make_float4(acc[tn][to], acc[tn][to + 1], acc[tn][to + 2], acc[tn][to + 3]);
      }
    }
  }
  __syncthreads();
  for (int i = thread; i < ROWS * (WIDTH / 4); i += THREADS) {
    const int m = i / (WIDTH / 4);
    const int o = i % (WIDTH / 4) * 4;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int s = 0; s < SLICES; s++) {
      float part[4];
      load_floats(part, tiles + (s * ROWS + m) * PITCH + o);
      sum.x += part[0];
      sum.y += part[1];
      sum.z += part[2];
      sum.w += part[3];
    }
    store(m, o, sum);
  }
}
