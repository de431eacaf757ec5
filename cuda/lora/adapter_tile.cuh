// The two products of a tile of x in shared memory (adapter_pass.cu), of 4 warps each.
#pragma once

#include <cstdint>

#include "cuda/device/matrix_load.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/lora/tile.cuh"

namespace qlora::lora {

inline constexpr int kRows = 64;   // of a tile
inline constexpr int kCols = 256;  // of a tile
inline constexpr int kWarps = 4;   // of each of the two products
inline constexpr int kWarpCols = kCols / kWarps;
inline constexpr int kWarpRows = kRows / kWarps;
inline constexpr int kChunks = kCols / kChunkValues;
inline constexpr int kTileBytes = kRows * kCols * 2;
template <int kRanks>
inline constexpr int kNarrowBytes = kRanks * kCols * 2;  // of the tile's columns of S
template <int kRanks>
inline constexpr int kLeftBytes = kRows * kRanks * 2;

template <int kRanks>
using RowSums = float[kRanks / 8][4];
template <int kRanks>
using ColumnSums = float[kWarpCols / 16][kRanks / 8][4];

// By warp `warp` of 4: rows 16 warp.. of the tile times S^T.
template <typename T, int kRanks>
__device__ __forceinline__ void project_tile(uint32_t tile, uint32_t narrow, int warp, RowSums<kRanks>& sums) {
  const int lane = threadIdx.x % 32;
  const int matrix = lane / 8;
  const int row = lane % 8;
#pragma unroll 4
  for (int c = 0; c < kCols / 16; ++c) {
    uint32_t a[4];
    load_matrices(a, tile + chunk_offset<kChunks>(warp * kWarpRows + matrix % 2 * 8 + row, 2 * c + matrix / 2));
#pragma unroll
    for (int n = 0; n < kRanks / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, narrow + chunk_offset<kChunks>(n * 16 + matrix / 2 * 8 + row, 2 * c + matrix % 2));
      multiply_add<T>(sums[2 * n], a, b[0], b[1]);
      multiply_add<T>(sums[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// visit(row, rank, two sums) for those of neighbouring ranks of the tile that the lane of warp `warp` holds.
template <int kRanks, typename Visit>
__device__ __forceinline__ void for_each_row_sum(const RowSums<kRanks>& sums, int warp, Visit visit) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kRanks / 8; ++n) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      visit(warp * kWarpRows + lane / 4 + 8 * h, n * 8 + lane % 4 * 2, sums[n][2 * h], sums[n][2 * h + 1]);
    }
  }
}

// By warp `warp` of 4: sums [16 columns each of 64][8 ranks each] += columns 64 warp.. of the tile, transposed, times
// left.
template <typename T, int kRanks>
__device__ __forceinline__ void reduce_tile(uint32_t tile, uint32_t left, int warp, ColumnSums<kRanks>& sums) {
  const int lane = threadIdx.x % 32;
  const int matrix = lane / 8;
  const int row = lane % 8;
#pragma unroll(kRanks == 16 ? 4 : 1)  // more ranks fill the registers
  for (int r = 0; r < kRows / 16; ++r) {
    uint32_t b[kRanks / 16][4];
#pragma unroll
    for (int n = 0; n < kRanks / 16; ++n) {
      load_matrices_transposed(
          b[n], left + chunk_offset<kRanks / kChunkValues>(r * 16 + matrix % 2 * 8 + row, 2 * n + matrix / 2));
    }
#pragma unroll
    for (int c = 0; c < kWarpCols / 16; ++c) {
      uint32_t a[4];
      const int chunk = warp * (kWarpCols / kChunkValues) + 2 * c + matrix % 2;
      load_matrices_transposed(a, tile + chunk_offset<kChunks>(r * 16 + matrix / 2 * 8 + row, chunk));
#pragma unroll
      for (int n = 0; n < kRanks / 16; ++n) {
        multiply_add<T>(sums[c][2 * n], a, b[n][0], b[n][1]);
        multiply_add<T>(sums[c][2 * n + 1], a, b[n][2], b[n][3]);
      }
    }
  }
}

// visit(column, rank, two sums) for those of neighbouring ranks of the tile that the lane of warp `warp` holds.
template <int kRanks, typename Visit>
__device__ __forceinline__ void for_each_column_sum(ColumnSums<kRanks>& sums, int warp, Visit visit) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < kWarpCols / 16; ++c) {
#pragma unroll
    for (int n = 0; n < kRanks / 8; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int col = warp * kWarpCols + c * 16 + lane / 4 + 8 * h;
        visit(col, n * 8 + lane % 4 * 2, sums[c][n][2 * h], sums[c][n][2 * h + 1]);
      }
    }
  }
}

}  // namespace qlora::lora
