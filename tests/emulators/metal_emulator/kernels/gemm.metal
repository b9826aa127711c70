// c = a b on 32 x 32 tiles, one to a threadgroup of 4 simdgroups with 16 x 16 each.
//
// a: (M, K) T, K a multiple of 16.  b: (K, N) T, N a multiple of 32.  c: (M, N) T.
// Launch: (N / 32 * 128, ceil(M / 32), 1) threads in groups of (128, 1, 1).
// Sums in float32, k ascending.
constexpr int BM = 32, BN = 32, BK = 16, PAD = 4;
threadgroup T a_tile[BM * (BK + PAD)];
threadgroup T b_tile[BK * (BN + PAD)];
threadgroup float c_tile[BM][BN];

const int M = a_shape[0], K = a_shape[1], N = b_shape[1];
const int row = threadgroup_position_in_grid.y * BM, col = threadgroup_position_in_grid.x * BN;
const uint thread_index = thread_index_in_threadgroup;
const int simd_row = simdgroup_index_in_threadgroup / 2 * 16;
const int simd_col = simdgroup_index_in_threadgroup % 2 * 16;

simdgroup_float8x8 acc[2][2];
for (int i = 0; i < 2; i++)
  for (int j = 0; j < 2; j++) acc[i][j] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);

for (int k = 0; k < K; k += BK) {
  threadgroup_barrier(mem_flags::mem_threadgroup);
  load_tile<T, BM, BK, BK + PAD, 128>(a + row * K + k, K, M - row, a_tile, thread_index);
  load_tile<T, BK, BN, BN + PAD, 128>(b + k * N + col, N, BK, b_tile, thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
  for (int kk = 0; kk < BK; kk += 8) {
    simdgroup_matrix<T, 8, 8> fa[2], fb[2];
    for (int i = 0; i < 2; i++) {
      simdgroup_load(fa[i], a_tile + (simd_row + 8 * i) * (BK + PAD) + kk, BK + PAD);
      simdgroup_load(fb[i], b_tile + kk * (BN + PAD) + simd_col + 8 * i, BN + PAD);
    }
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 2; j++) simdgroup_multiply_accumulate(acc[i][j], fa[i], fb[j], acc[i][j]);
  }
}
for (int i = 0; i < 2; i++)
  for (int j = 0; j < 2; j++)
    simdgroup_store(acc[i][j], &c_tile[simd_row + 8 * i][simd_col + 8 * j], BN);
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = thread_index; i < BM * BN && row + i / BN < M; i += 128)
  c[(row + i / BN) * N + col + i % BN] = T(c_tile[i / BN][i % BN]);
