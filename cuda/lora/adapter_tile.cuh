// The two products of a tile of x in shared memory (adapter_pass.cu), each by all 8 warps of a block.
#pragma once

#include <cstdint>

#include "cuda/device/matrix_load.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/lora/tile.cuh"

namespace qlora::lora {

inline constexpr int kTileCols = 256;
inline constexpr int kTileChunks = kTileCols / kChunkValues;
inline constexpr int kWarps = 8;
inline constexpr int kThreads = kWarps * 32;

// A tile of kRows rows for kRanks ranks. In the projection a warp has half of the rows, one of kRankSplit shares of the
// ranks and one of kColSplit shares of the columns; in the gradient all rows of an eighth of the columns.
template <int kRanks>
struct Shape {
  static constexpr int kRows = kRanks <= 32 ? 32 : 64;
  static constexpr int kRowBlocks = kRows / 32;  // of 16 rows, of a warp
  static constexpr int kRankSplit = kRanks <= 32 ? 1 : 2;
  static constexpr int kWarpRanks = kRanks / kRankSplit;
  static constexpr int kColSplit = kWarps / 2 / kRankSplit;
  static constexpr int kWarpCols = kTileCols / kColSplit;
  static constexpr int kGradientCols = kTileCols / kWarps;
  static constexpr int kTileBytes = kRows * kTileCols * 2;
  static constexpr int kPanelBytes = kRanks * kTileCols * 2;  // S of the tile's columns
  static constexpr int kLeftBytes = kRows * kRanks * 2;
  // Sums [kColSplit][kRows][kRanks], rows padded: what 4 rows' lanes write lies in different banks.
  static constexpr int kExchangePitch = kRanks + 8;
  static constexpr int kExchangeBytes = kColSplit * kRows * kExchangePitch * static_cast<int>(sizeof(float));
};

template <int kRanks>
using RowSums = float[Shape<kRanks>::kRowBlocks][Shape<kRanks>::kWarpRanks / 8][4];
template <int kRanks>
using ColumnSums = float[Shape<kRanks>::kGradientCols / 16][kRanks / 8][4];

// Where a warp's share of the projection begins.
template <int kRanks>
struct RowShare {
  int part;  // of the columns
  int row;
  int rank;

  __device__ __forceinline__ explicit RowShare(int warp)
      : part(warp / 2 / Shape<kRanks>::kRankSplit),
        row(warp % 2 * (Shape<kRanks>::kRows / 2)),
        rank(warp / 2 % Shape<kRanks>::kRankSplit * Shape<kRanks>::kWarpRanks) {}
};

// sums += the warp's rows of the tile times S^T; panel: S [kRanks][kTileCols].
template <typename T, int kRanks>
__device__ __forceinline__ void project_tile(uint32_t tile, uint32_t panel, int warp, RowSums<kRanks>& sums) {
  using S = Shape<kRanks>;
  const RowShare<kRanks> share(warp);
  const int lane = threadIdx.x % 32;
  const int matrix = lane / 8;
  const int row = lane % 8;
#pragma unroll(kRanks <= 32 ? 4 : 2)
  for (int c = 0; c < S::kWarpCols / 16; ++c) {
    const int chunk = share.part * (S::kWarpCols / kChunkValues) + 2 * c;
    uint32_t a[S::kRowBlocks][4];
#pragma unroll
    for (int r = 0; r < S::kRowBlocks; ++r) {
      load_matrices(a[r],
                    tile + chunk_offset<kTileChunks>(share.row + r * 16 + matrix % 2 * 8 + row, chunk + matrix / 2));
    }
#pragma unroll
    for (int n = 0; n < S::kWarpRanks / 16; ++n) {
      uint32_t b[4];
      load_matrices(b,
                    panel + chunk_offset<kTileChunks>(share.rank + n * 16 + matrix / 2 * 8 + row, chunk + matrix % 2));
#pragma unroll
      for (int r = 0; r < S::kRowBlocks; ++r) {
        multiply_add<T>(sums[r][2 * n], a[r], b[0], b[1]);
        multiply_add<T>(sums[r][2 * n + 1], a[r], b[2], b[3]);
      }
    }
  }
}

// Puts the warp's sums to `exchange`.
template <int kRanks>
__device__ __forceinline__ void store_row_sums(const RowSums<kRanks>& sums, int warp, float* exchange) {
  using S = Shape<kRanks>;
  const RowShare<kRanks> share(warp);
  const int lane = threadIdx.x % 32;
  float* const to =
      exchange + (share.part * S::kRows + share.row + lane / 4) * S::kExchangePitch + share.rank + lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < S::kRowBlocks; ++r) {
#pragma unroll
    for (int n = 0; n < S::kWarpRanks / 8; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        *reinterpret_cast<float2*>(to + (r * 16 + h * 8) * S::kExchangePitch + n * 8) =
            make_float2(sums[r][n][2 * h], sums[r][n][2 * h + 1]);
      }
    }
  }
}

// sums [16 columns each][8 ranks each] += the warp's columns of the tile, transposed, times left.
template <typename T, int kRanks>
__device__ __forceinline__ void reduce_tile(uint32_t tile, uint32_t left, int warp, ColumnSums<kRanks>& sums) {
  using S = Shape<kRanks>;
  const int lane = threadIdx.x % 32;
  const int matrix = lane / 8;
  const int row = lane % 8;
#pragma unroll(kRanks <= 32 ? 2 : 1)  // more ranks fill the registers
  for (int r = 0; r < S::kRows / 16; ++r) {
    uint32_t a[S::kGradientCols / 16][4];
#pragma unroll
    for (int c = 0; c < S::kGradientCols / 16; ++c) {
      const int chunk = warp * (S::kGradientCols / kChunkValues) + 2 * c + matrix % 2;
      load_matrices_transposed(a[c], tile + chunk_offset<kTileChunks>(r * 16 + matrix / 2 * 8 + row, chunk));
    }
#pragma unroll
    for (int n = 0; n < kRanks / 16; ++n) {
      uint32_t b[4];
      load_matrices_transposed(
          b, left + chunk_offset<kRanks / kChunkValues>(r * 16 + matrix % 2 * 8 + row, 2 * n + matrix / 2));
#pragma unroll
      for (int c = 0; c < S::kGradientCols / 16; ++c) {
        multiply_add<T>(sums[c][2 * n], a[c], b[0], b[1]);
        multiply_add<T>(sums[c][2 * n + 1], a[c], b[2], b[3]);
      }
    }
  }
}

// visit(sums of two neighbouring ranks, their offset in [kTileCols][kRanks]) for those that the lane holds.
template <int kRanks, typename Visit>
__device__ __forceinline__ void for_each_column_sum(ColumnSums<kRanks>& sums, int warp, Visit visit) {
  using S = Shape<kRanks>;
  const int lane = threadIdx.x % 32;
  const int first = (warp * S::kGradientCols + lane / 4) * kRanks + lane % 4 * 2;
#pragma unroll
  for (int c = 0; c < S::kGradientCols / 16; ++c) {
#pragma unroll
    for (int n = 0; n < kRanks / 8; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        visit(sums[c][n][2 * h], sums[c][n][2 * h + 1], first + (c * 16 + h * 8) * kRanks + n * 8);
      }
    }
  }
}

}  // namespace qlora::lora
