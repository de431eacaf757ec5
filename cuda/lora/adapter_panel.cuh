// The columns of S that a block of adapter_pass.cu multiplies with, in shared memory as 16 bits.
#pragma once

#include <cstdint>

#include "cuda/device/numeric.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/lora/adapter_tile.cuh"
#include "cuda/lora/lora.h"
#include "cuda/lora/tile.cuh"

namespace qlora::lora {

// 4 neighbours in memory, zeros behind the first `count`; is_vector: the address is a multiple of their size.
template <typename Value>
__device__ __forceinline__ void load_four(const Value* values, int64_t count, bool is_vector, float (&four)[4]) {
  if (is_vector && count >= 4) {
    if constexpr (std::is_same_v<Value, float>) {
      const float4 loaded = *reinterpret_cast<const float4*>(values);
      four[0] = loaded.x;
      four[1] = loaded.y;
      four[2] = loaded.z;
      four[3] = loaded.w;
    } else {
      const uint2 loaded = *reinterpret_cast<const uint2*>(values);
      Word<Value>::unpack(loaded.x, four);
      Word<Value>::unpack(loaded.y, four + 2);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = i < count ? to_float(values[i]) : 0.0f;
  }
}

// S [kRanks][kTileCols] of num_tiles tiles from rank first_rank and column first_col on, rounded to T; zeros behind
// `rank` and `cols`. Threads load 8 times 4 neighbours before the first of them is stored.
template <typename T, typename Value, int kRanks>
__device__ __forceinline__ void load_panel_of(uint32_t shared, const Narrow& narrow, int first_rank, int64_t rank,
                                              int64_t first_col, int64_t cols, int num_tiles) {
  const Value* const values = static_cast<const Value*>(narrow.values);
  const bool is_rank_fast = narrow.rank_stride == 1;
  const int64_t row_length = is_rank_fast ? narrow.col_stride : narrow.rank_stride;
  const bool is_vector = row_length % 4 == 0 && reinterpret_cast<uintptr_t>(values) % (4 * sizeof(Value)) == 0;
  const int num_fours = num_tiles * (kRanks * kTileCols / 4);
  if (!is_rank_fast) {
    constexpr int kBatch = 8;
    for (int first = threadIdx.x; first < num_fours; first += kBatch * kThreads) {
      float loaded[kBatch][4] = {};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int i = first + b * kThreads;
        const int j = first_rank + i / (kTileCols / 4) % kRanks;
        const int64_t col = first_col + i / (kRanks * kTileCols / 4) * kTileCols + i % (kTileCols / 4) * 4;
        if (i < num_fours && j < rank) load_four(values + j * row_length + col, cols - col, is_vector, loaded[b]);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int i = first + b * kThreads;
        const int col = i % (kTileCols / 4) * 4;
        const uint32_t to = shared + i / (kRanks * kTileCols / 4) * Shape<kRanks>::kPanelBytes +
                            chunk_offset<kTileChunks>(i / (kTileCols / 4) % kRanks, col / kChunkValues) +
                            col % kChunkValues * 2;
        if (i < num_fours) {
          store_shared_4_bytes(to, Word<T>::pack(loaded[b]));
          store_shared_4_bytes(to + 4, Word<T>::pack(loaded[b] + 2));
        }
      }
    }
    return;
  }
  // 4 ranks of 2 columns each.
  constexpr int kBatch = 4;
  constexpr int kRankFours = kRanks / 4;
  for (int first = threadIdx.x; first < num_fours / 2; first += kBatch * kThreads) {
    float loaded[kBatch][2][4] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const int i = first + b * kThreads;
        const int j = first_rank + i % kRankFours * 4;
        const int64_t col = first_col + i / kRankFours * 2 + v;
        if (i < num_fours / 2 && col < cols) {
          load_four(values + col * row_length + j, rank - j, is_vector, loaded[b][v]);
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * kThreads;
      const int col = i / kRankFours * 2 % kTileCols;
      const uint32_t to = shared + i / (kRankFours * kTileCols / 2) * Shape<kRanks>::kPanelBytes;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float pair[2] = {loaded[b][0][j], loaded[b][1][j]};
        const int offset =
            chunk_offset<kTileChunks>(i % kRankFours * 4 + j, col / kChunkValues) + col % kChunkValues * 2;
        if (i < num_fours / 2) store_shared_4_bytes(to + offset, Word<T>::pack(pair));
      }
    }
  }
}

template <typename T, int kRanks, typename... Arguments>
__device__ __forceinline__ void load_panel(uint32_t shared, const Narrow& narrow, Arguments... arguments) {
  if (narrow.dtype == QLORA_FLOAT32) {
    load_panel_of<T, float, kRanks>(shared, narrow, arguments...);
  } else if (narrow.dtype == QLORA_BFLOAT16) {
    load_panel_of<T, __nv_bfloat16, kRanks>(shared, narrow, arguments...);
  } else {
    load_panel_of<T, __half, kRanks>(shared, narrow, arguments...);
  }
}

}  // namespace qlora::lora
