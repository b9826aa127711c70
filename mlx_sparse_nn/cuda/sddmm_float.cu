// The product of sddmm_tiles.cu in true float32, by CUDA cores, for blocks of any size. The rows n
// come in splits: out[s] sums those of split s.
//
// Inputs
//   y, x, indptr, indices: as there, of float; y and x end where the matrix does
//   step     (1) int32: rows n of a split
// Output
//   out      (S, V, n_blocks, B, B) float
// Launch
//   (R shares THREADS, S, V) threads in groups of (THREADS, 1, 1), shares GROUP at least the blocks
//   of the longest block-row, THREADS = HEIGHT / TI WIDTH / TK SLICES, rounded up to warps. One
//   group owns GROUP blocks of a block-row: HEIGHT rows i, at least B, and WIDTH = GROUP PADDED
//   columns k. A thread holds TI x TK sums over one of SLICES parts of the n of every stage.
//   Shared memory: STAGES stages of DEPTH (HEIGHT + WIDTH) floats; later SLICES HEIGHT (WIDTH + 4)
//   floats where SLICES > 1.
// Template
//   B; GROUP blocks; TI and TK, multiples of 4; SLICES; DEPTH of n in a stage; STAGES.
// Sums in float32: each slice its n ascending, then over slices.

#include "copies.h"
#include "floats.h"
#include "pieces.h"

static_assert(sizeof(T) == 4 && sizeof(OUT) == 4, "true float32");
constexpr int PADDED = (B + 3) / 4 * 4;  // columns of a block in shared memory, in whole chunks
constexpr int HEIGHT = (B + TI - 1) / TI * TI;
constexpr int WIDTH = GROUP * PADDED;
constexpr int LANES_I = HEIGHT / TI;
constexpr int LANES_K = WIDTH / TK;
constexpr int SLICE = LANES_I * LANES_K;  // threads
constexpr int THREADS = (SLICES * SLICE + 31) / 32 * 32;
constexpr int Y_CHUNKS = HEIGHT / 4;
constexpr int X_CHUNKS = WIDTH / 4;
constexpr int STAGE = DEPTH * (HEIGHT + WIDTH);
constexpr bool WHOLE = B % 4 == 0;
static_assert(WIDTH % TK == 0 && TI % 4 == 0 && TK % 4 == 0 && DEPTH % SLICES == 0, "even");
extern __shared__ __align__(128) char shared[];
__shared__ int cols[GROUP];
float* tiles = reinterpret_cast<float*>(shared);

const int R = indptr_shape[0] - 1;
const int r = blockIdx.x % R;
const int j0 = indptr[r] + blockIdx.x / R * GROUP;
const int count = min(GROUP, indptr[r + 1] - j0);
if (count <= 0) {
  return;
}
const int v = blockIdx.z;
const int thread = threadIdx.x;
const int slice = min(thread / SLICE, SLICES - 1);  // threads beyond the last one store nothing
const int lane_k = thread % SLICE % LANES_K;
const int lane_i = thread % SLICE / LANES_K;
const int N = in_register(x_shape[x_ndim - 2]);
const int n_cols = in_register(x_shape[x_ndim - 1]);
const int n_rows = in_register(y_shape[y_ndim - 1]);
const int begin_n = blockIdx.y * step[0];
const int end_n = min(N, begin_n + step[0]);
const int n_stages = (end_n - begin_n + DEPTH - 1) / DEPTH;
const float* y_cols = y + ((size_t)v * N + begin_n) * n_rows + r * B;
const float* x_rows = x + ((size_t)v * N + begin_n) * n_cols;
const bool aligned = ((size_t)y | (size_t)x) % 16 == 0 && (n_rows | n_cols) % 4 == 0;
for (int i = thread; i < GROUP; i += THREADS) {
  cols[i] = i < count ? indices[j0 + i] * B : 0;
}
__syncthreads();

auto copy_stage_as = [&](int stage, auto alignment) {
  constexpr bool ALIGNED = alignment.value;
  float* y_tile = tiles + stage % STAGES * STAGE;
  float* x_tile = y_tile + DEPTH * HEIGHT;
  const int n0 = stage * DEPTH;
  const int n_valid = end_n - begin_n - n0;
#pragma unroll
  for (int i = thread; i < DEPTH * Y_CHUNKS; i += THREADS) {
    const int m = i / Y_CHUNKS;
    const int row = i % Y_CHUNKS * 4;
    const int left = min(B, n_rows - r * B) - row;  // in the block and in y
    const bool valid = m < n_valid && left > 0;
    copy_floats<ALIGNED>(y_tile + i * 4, valid ? y_cols + (size_t)(n0 + m) * n_rows + row : y,
                         valid ? left : 0);
  }
#pragma unroll
  for (int i = thread; i < DEPTH * X_CHUNKS; i += THREADS) {
    const int m = i / X_CHUNKS;
    const int block = i % X_CHUNKS / (PADDED / 4);
    const int k = i % X_CHUNKS % (PADDED / 4) * 4;
    const int left = block < count ? min(B, n_cols - cols[block]) - k : 0;
    const bool valid = m < n_valid && left > 0;
    copy_floats<ALIGNED>(x_tile + i * 4,
                         valid ? x_rows + (size_t)(n0 + m) * n_cols + cols[block] + k : x,
                         valid ? left : 0);
  }
};
auto copy_stage = [&](int stage) {
  if (WHOLE && aligned) {
    copy_stage_as(stage, Constant<WHOLE>());
  } else {
    copy_stage_as(stage, Unaligned());
  }
};

float acc[TI][TK];
#pragma unroll
for (int ti = 0; ti < TI; ti++) {
#pragma unroll
  for (int tk = 0; tk < TK; tk++) {
    acc[ti][tk] = 0.0f;
  }
}
#pragma unroll 1
for (int stage = 0; stage < STAGES - 1; stage++) {
  if (stage < n_stages) {
    copy_stage(stage);
  }
  commit_copies();
}
#pragma unroll 1
for (int stage = 0; stage < n_stages; stage++) {
  wait_copies<STAGES - 2>();
  __syncthreads();
  if (stage + STAGES - 1 < n_stages) {
    copy_stage(stage + STAGES - 1);
  }
  commit_copies();
  const int m0 = slice * (DEPTH / SLICES);
  const float* y_tile = tiles + stage % STAGES * STAGE + m0 * HEIGHT + 4 * lane_i;
  const float* x_tile = tiles + stage % STAGES * STAGE + DEPTH * HEIGHT + m0 * WIDTH + 4 * lane_k;
#pragma unroll
  for (int m = 0; m < DEPTH / SLICES; m++) {
    float ys[TI / 4][4];
    float xs[TK / 4][4];
#pragma unroll
    for (int i = 0; i < TI / 4; i++) {
      load_floats(ys[i], y_tile + m * HEIGHT + 4 * i * LANES_I);
    }
#pragma unroll
    for (int i = 0; i < TK / 4; i++) {
      load_floats(xs[i], x_tile + m * WIDTH + 4 * i * LANES_K);
    }
#pragma unroll
    for (int ti = 0; ti < TI; ti++) {
#pragma unroll
      for (int tk = 0; tk < TK; tk++) {
        acc[ti][tk] = fmaf(ys[ti / 4][ti % 4], xs[tk / 4][tk % 4], acc[ti][tk]);
      }
    }
  }
}

// Store the sums of columns k, ..., k + 3 of the group, in row i.
float* const blocks =
    out + (((size_t)blockIdx.y * gridDim.z + v) * indices_shape[0] + j0) * (B * B);
auto store = [&](int i, int k, float4 sum) {
  const int block = k / PADDED;
  const int left = block < count && i < B ? B - k % PADDED : 0;
  store_floats<WHOLE>(blocks + (size_t)block * (B * B) + i * B + k % PADDED, sum, left);
};
if constexpr (SLICES == 1) {
  if (thread < SLICE) {
#pragma unroll
    for (int ti = 0; ti < TI; ti++) {
#pragma unroll
      for (int tk = 0; tk < TK; tk += 4) {
        store(4 * lane_i + ti / 4 * 4 * LANES_I + ti % 4, 4 * lane_k + tk * LANES_K,
              make_float4(acc[ti][tk], acc[ti][tk + 1], acc[ti][tk + 2], acc[ti][tk + 3]));
      }
    }
  }
} else {
  constexpr int PITCH = WIDTH + 4;
  __syncthreads();  // the stages are not read any more
  if (thread < SLICES * SLICE) {
#pragma unroll
    for (int ti = 0; ti < TI; ti++) {
#pragma unroll
      for (int tk = 0; tk < TK; tk += 4) {
        const int i = 4 * lane_i + ti / 4 * 4 * LANES_I + ti % 4;
        float* place = tiles + (slice * HEIGHT + i) * PITCH + 4 * lane_k + tk * LANES_K;
        *reinterpret_cast<float4*>(place) =
            make_float4(acc[ti][tk], acc[ti][tk + 1], acc[ti][tk + 2], acc[ti][tk + 3]);
      }
    }
  }
  __syncthreads();
  for (int e = thread; e < HEIGHT * X_CHUNKS; e += THREADS) {
    const int i = e / X_CHUNKS;
    const int k = e % X_CHUNKS * 4;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int s = 0; s < SLICES; s++) {
      float part[4];
      load_floats(part, tiles + (s * HEIGHT + i) * PITCH + k);
      sum.x += part[0];
      sum.y += part[1];
      sum.z += part[2];
      sum.w += part[3];
    }
    store(i, k, sum);
  }
}
