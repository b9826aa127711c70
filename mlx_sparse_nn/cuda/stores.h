#pragma once

// Stores of tensor-core products.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Two neighbouring elements; the first argument only says of what type.
__device__ __forceinline__ unsigned pack2(__nv_bfloat16, float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const unsigned*>(&pair);
}
__device__ __forceinline__ unsigned pack2(__half, float a, float b) {
  const __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<const unsigned*>(&pair);
}

// Four neighbouring lanes hold a row of four 8-column tiles: lane q has in pairs[t] columns 2 q and
// 2 q + 1 of tile t. Return the 8 columns of tile q to lane q.
__device__ __forceinline__ uint4 gather_tile(const unsigned (&pairs)[4]) {
  const bool odd = threadIdx.x & 1;
  const bool high = threadIdx.x & 2;
  const unsigned low = __shfl_xor_sync(0xffffffffu, odd ? pairs[0] : pairs[1], 1);
  const unsigned up = __shfl_xor_sync(0xffffffffu, odd ? pairs[2] : pairs[3], 1);
  const uint2 a = odd ? make_uint2(low, pairs[1]) : make_uint2(pairs[0], low);
  const uint2 b = odd ? make_uint2(up, pairs[3]) : make_uint2(pairs[2], up);
  const unsigned first = __shfl_xor_sync(0xffffffffu, high ? a.x : b.x, 2);
  const unsigned second = __shfl_xor_sync(0xffffffffu, high ? a.y : b.y, 2);
  return high ? make_uint4(first, second, b.x, b.y) : make_uint4(a.x, a.y, first, second);
}

// Store a warp's products, 16 bytes a lane, as rows of T from `y` on, `width` elements apart, of
// which `rows` rows and `cols` columns are there. They are ROW_TILES x COL_TILES tiles of 8 x 8. Of
// each, this lane holds two neighbouring elements: sum(row_tile, col_tile, e), e 0 or 1.
template <typename T, int ROW_TILES, int COL_TILES, typename Sum>
__device__ __forceinline__ void store_tiles(T* y, size_t width, int rows, int cols, Sum sum) {
  static_assert(ROW_TILES * COL_TILES % 4 == 0, "four lanes share four tiles");
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int f = 0; f < ROW_TILES * COL_TILES; f += 4) {
    unsigned pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row_tile = (f + i) / COL_TILES;
      const int col_tile = (f + i) % COL_TILES;
      pairs[i] = pack2(T(), sum(row_tile, col_tile, 0), sum(row_tile, col_tile, 1));
    }
    const uint4 columns = gather_tile(pairs);
    const int row = (f + lane % 4) / COL_TILES * 8 + lane / 4;
    const int col = (f + lane % 4) % COL_TILES * 8;
    if (row < rows && col < cols) {
      *reinterpret_cast<uint4*>(y + row * width + col) = columns;
    }
  }
}

template <typename T>
__device__ __forceinline__ void store_pair(T* place, float a, float b) {
  if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<float2*>(place) = make_float2(a, b);
  } else {
    *reinterpret_cast<unsigned*>(place) = pack2(T(), a, b);
  }
}

// Store the same two elements at a time, whatever their type and the number of tiles.
template <typename T, int ROW_TILES, int COL_TILES, typename Sum>
__device__ __forceinline__ void store_pairs(T* y, size_t width, int rows, int cols, Sum sum) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int row_tile = 0; row_tile < ROW_TILES; row_tile++) {
#pragma unroll
    for (int col_tile = 0; col_tile < COL_TILES; col_tile++) {
      const int row = 8 * row_tile + lane / 4;
      const int col = 8 * col_tile + lane % 4 * 2;
      const float a = sum(row_tile, col_tile, 0);
      const float b = sum(row_tile, col_tile, 1);
      if (row < rows && col < cols) {
        store_pair(y + row * width + col, a, b);
      }
    }
  }
}

// Store the sums of a warp, 16 rows of COLS, as `rows` rows of y, `width` elements apart, of which
// `cols` columns are there.
template <typename T, int COLS>
__device__ __forceinline__ void store_sums_of_tile(T* y, size_t width, int rows, int cols,
                                                   const float (&acc)[COLS / 2]) {
  auto sum = [&](int row_tile, int col_tile, int e) {
    return acc[4 * col_tile + 2 * row_tile + e];
  };
  if constexpr (sizeof(T) == 2 && COLS % 16 == 0) {
    store_tiles<T, 2, COLS / 8>(y, width, rows, cols, sum);
  } else {
    store_pairs<T, 2, COLS / 8>(y, width, rows, cols, sum);
  }
}
