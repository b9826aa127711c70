// The product of spmm_tiles.cu for blocks of any size: they are filled up with zeros on their way
// to shared memory.
//
// Inputs, output: as there, of 16 bits.
// Launch
//   (R STRIPS THREADS, ceil(N / ROWS), V) threads in groups of (THREADS, 1, 1), STRIPS =
//   ceil(B / WIDTH), THREADS = 32 WARPS_N WARPS_O SLICES. One group owns WIDTH outputs of a
//   block-row and ROWS rows of x. Each of SLICES sets of warps has a part of the k of every stage.
//   Shared memory: STAGES stages of ROWS DEPTH + W_ROWS W_STRIDE elements; later SLICES ROWS (WIDTH
//   + 4) floats.
// Template
//   T half or bfloat16; B; INSIDE columns of the last block-column and LAST rows of the last
//   block-row, 1 to B: x and y end there; ROWS of x and WIDTH outputs of a group; WARPS_N and
//   WARPS_O warps over them; SLICES; DEPTH of k in a stage, a multiple of 16 SLICES; STAGES;
//   TRANSPOSED and BIAS 0 or 1.
// Sums in float32: each slice its k in stored order, then over slices, then the bias.

#include "copies.h"
#include "mma.h"
#include "pieces.h"

constexpr int THREADS = 32 * WARPS_N * WARPS_O * SLICES;
constexpr int STRIPS = (B + WIDTH - 1) / WIDTH;
constexpr int PADDED = (B + 7) / 8 * 8;         // k of a block in shared memory, in whole chunks
constexpr int TILES_N = ROWS / (16 * WARPS_N);  // 16 x 8 tiles of a warp over the rows of x,
constexpr int TILES_O = WIDTH / (8 * WARPS_O);  // and over the outputs
constexpr int CHUNKS = DEPTH / 8;
constexpr int W_CHUNKS = TRANSPOSED ? WIDTH / 8 : CHUNKS;
constexpr int W_ROWS = TRANSPOSED ? DEPTH : WIDTH;
constexpr int W_STRIDE = row_stride<W_CHUNKS>() * 8;
constexpr int STAGE = ROWS * DEPTH + W_ROWS * W_STRIDE;
constexpr int W_COPIES = (W_ROWS * W_CHUNKS + THREADS - 1) / THREADS;  // of a thread
constexpr int PIECE = B % 4 == 0 ? 4 : B % 2 == 0 ? 2 : 1;             // elements copied at once
static_assert(THREADS % CHUNKS == 0, "a thread keeps to one chunk");
static_assert(TILES_N * WARPS_N * 16 == ROWS && TILES_O * WARPS_O * 8 == WIDTH, "even");
static_assert(DEPTH % (16 * SLICES) == 0 && sizeof(T) == 2, "a product of a warp has 16 of k");
extern __shared__ __align__(128) char shared[];
T* tiles = reinterpret_cast<T*>(shared);

const int r = blockIdx.x / STRIPS;
const int o0 = blockIdx.x % STRIPS * WIDTH;
const int n0 = blockIdx.y * ROWS;
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int lane = thread % 32;
const int slice = thread / 32 / (WARPS_N * WARPS_O);
const int warp = thread / 32 % (WARPS_N * WARPS_O);
const int warp_n = warp / WARPS_O * TILES_N * 16;
const int warp_o = warp % WARPS_O * TILES_O * 8;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int R = indptr_shape[0] - 1;
const int n_rows = (R - 1) * B + LAST;
const int n_outputs = min(WIDTH, (r == R - 1 ? LAST : B) - o0);  // of this group
const T* blocks = data + (size_t)v * indices_shape[0] * (B * B);
const bool aligned = ((size_t)x | (size_t)data) % (2 * PIECE) == 0 && n_cols % PIECE == 0;
const int begin = indptr[r];
const int end = indptr[r + 1];
const int n_stages = ((end - begin) * PADDED + DEPTH - 1) / DEPTH;

// A thread copies the same chunk of k of every row of x, and of every row of W where that is not
// transposed. It reads the index of its block a stage ahead.
const int x_row = thread / CHUNKS;
const int x_k = thread % CHUNKS * 8;
const T* x_mine = x + ((size_t)v * N + n0 + x_row) * n_cols;
int next_stage = 0;
int next_buffer = 0;
int next_col;               // in x, -1 behind the last block
int next_j;                 // of the block, and
int next_k;                 // the place in it
const T* next_w[W_COPIES];  // rows of W transposed; null where there are zeros
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
auto copy_stage_by = [&](auto pieces) {
  constexpr int TAKEN = pieces.value ? PIECE : 1;
  if (next_stage < n_stages) {
    T* x_tile = tiles + next_buffer * STAGE;
    T* w_tile = x_tile + ROWS * DEPTH;
    const int in_block = next_col < 0 ? 0 : min(B - next_k, n_cols - next_col);
    const T* x_src = x_mine + next_col;
#pragma unroll
    for (int i = 0; i < ROWS; i += THREADS / CHUNKS) {
      if (ROWS % (THREADS / CHUNKS) == 0 || x_row + i < ROWS) {
        const bool valid = in_block > 0 && n0 + x_row + i < N;
        copy_pieces<TAKEN>(x_tile + swizzle<CHUNKS>(x_row + i, thread % CHUNKS) * 8,
                           valid ? x_src + (size_t)i * n_cols : x, valid ? in_block : 0);
      }
    }
    if constexpr (TRANSPOSED) {
#pragma unroll
      for (int i = 0; i < W_COPIES; i++) {
        const int at = thread + i * THREADS;
        const int o = o0 + at % W_CHUNKS * 8;
        if (W_ROWS * W_CHUNKS % THREADS == 0 || at < W_ROWS * W_CHUNKS) {
          const bool valid = next_w[i] != nullptr && o < B;
          copy_pieces<TAKEN>(w_tile + swizzle<W_CHUNKS>(at / W_CHUNKS, at % W_CHUNKS) * 8,
                             valid ? next_w[i] + o : data, valid ? B - o : 0);
        }
      }
    } else {
      const T* w_src = blocks + (size_t)min(next_j, end - 1) * (B * B) + next_k;
#pragma unroll
      for (int i = 0; i < WIDTH; i += THREADS / CHUNKS) {
        const int o = x_row + i;
        if (WIDTH % (THREADS / CHUNKS) == 0 || o < WIDTH) {
          const bool valid = o0 + o < B && in_block > 0;
          copy_pieces<TAKEN>(w_tile + swizzle<CHUNKS>(o, thread % CHUNKS) * 8,
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
  if (PIECE > 1 && aligned) {
    copy_stage_by(Constant<(PIECE > 1)>());
  } else {
    copy_stage_by(Constant<false>());
  }
};

float acc[TILES_N][TILES_O][4];
#pragma unroll
for (int tn = 0; tn < TILES_N; tn++) {
#pragma unroll
  for (int to = 0; to < TILES_O; to++) {
    acc[tn][to][0] = acc[tn][to][1] = acc[tn][to][2] = acc[tn][to][3] = 0.0f;
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
  const T* x_tile = tiles + used * STAGE;
  const T* w_tile = x_tile + ROWS * DEPTH;
  used = used + 1 == STAGES ? 0 : used + 1;
  const int k0 = slice * (DEPTH / SLICES);
#pragma unroll
  for (int k = 0; k < DEPTH / SLICES; k += 16) {
    const int chunk = (k0 + k) / 8;
    unsigned xs[TILES_N][4];
#pragma unroll
    for (int tn = 0; tn < TILES_N; tn++) {
      const int m = warp_n + 16 * tn + lane % 16;
      load_matrix4<false>(xs[tn], x_tile + swizzle<CHUNKS>(m, chunk + lane / 16) * 8);
    }
#pragma unroll
    for (int to = 0; to < TILES_O; to++) {
      unsigned ws[2];
      const int o = warp_o + 8 * to;
      if (TRANSPOSED) {
        load_matrix2<true>(ws, w_tile + swizzle<W_CHUNKS>(k0 + k + lane % 16, o / 8) * 8);
      } else {
        load_matrix2<false>(ws, w_tile + swizzle<CHUNKS>(o + lane % 8, chunk + lane / 8 % 2) * 8);
      }
#pragma unroll
      for (int tn = 0; tn < TILES_N; tn++) {
        multiply<T>(acc[tn][to], xs[tn][0], xs[tn][1], xs[tn][2], xs[tn][3], ws[0], ws[1]);
      }
    }
  }
}

// Rows of a block lie on no multiple of anything: sums go through shared memory to be stored.
constexpr int PITCH = WIDTH + 4;
float* partial = reinterpret_cast<float*>(shared);
__syncthreads();  // the stages are not read any more
#pragma unroll
for (int tn = 0; tn < TILES_N; tn++) {
#pragma unroll
  for (int to = 0; to < TILES_O; to++) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int m = warp_n + 16 * tn + 8 * i + lane / 4;
      float* place = partial + (slice * ROWS + m) * PITCH + warp_o + 8 * to + lane % 4 * 2;
      *reinterpret_cast<float2*>(place) = make_float2(acc[tn][to][2 * i], acc[tn][to][2 * i + 1]);
    }
  }
}
__syncthreads();
T* const y_rows = y + ((size_t)v * N + n0) * n_rows + r * B + o0;
for (int i = thread; i < min(ROWS, N - n0) * n_outputs; i += THREADS) {
  const int m = i / n_outputs;
  const int o = i % n_outputs;
  float sum = 0.0f;
#pragma unroll
  for (int s = 0; s < SLICES; s++) {
    sum += partial[(s * ROWS + m) * PITCH + o];
  }
  if (BIAS) {
    sum += float(bias[r * B + o0 + o]);
  }
  y_rows[(size_t)m * n_rows + o] = T(sum);
}
