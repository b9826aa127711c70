// What a core can do at most: multiply-adds, and reading of memory.

#include <stdint.h>

#include "kernels.h"
#include "vectors.h"

using namespace mlx_sparse_nn;

namespace {

constexpr int N = LANES<float>;
constexpr int CHAINS = 12;  // independent sums: more than a multiply-add takes cycles

}  // namespace

// Does `rounds` times CHAINS multiply-adds of vectors of lanes() floats.
MLX_SPARSE_EXPORT float multiply_adds(int64_t rounds, float a, float b) {
  vec<float, N> sums[CHAINS];
#pragma GCC unroll 12
  for (int j = 0; j < CHAINS; ++j) sums[j] = float(j) - vec<float, N>{};  // else all were one
  const vec<float, N> scale = a - vec<float, N>{}, shift = b - vec<float, N>{};
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < CHAINS; ++j) sums[j] = sums[j] * scale + shift;
  }
#pragma GCC unroll 12
  for (int j = 1; j < CHAINS; ++j) sums[0] += sums[j];
  return total<float, N>(sums[0]);
}

MLX_SPARSE_EXPORT int64_t multiply_adds_a_round() { return int64_t(CHAINS) * N; }

// Reads n floats, a multiple of 8 vectors.
MLX_SPARSE_EXPORT float read_floats(const float* p, int64_t n) {
  vec<float, N> sums[8] = {};
  for (int64_t i = 0; i < n; i += 8 * N) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sums[j] += load<N>(p + i + j * N);
  }
#pragma GCC unroll 8
  for (int j = 1; j < 8; ++j) sums[0] += sums[j];
  return total<float, N>(sums[0]);
}
