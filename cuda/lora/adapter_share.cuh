// The arguments of adapter_pass.cu's kernel, and a block's share of its work.
#pragma once

#include <cstdint>

#include "cuda/device/copy_async.cuh"
#include "cuda/lora/adapter_tile.cuh"
#include "cuda/lora/lora.h"
#include "cuda/lora/tile.cuh"

namespace qlora::lora {

inline constexpr int kMaxStages = 8;

struct Arguments {
  const uint16_t* x;
  int64_t row_length;
  bool is_aligned;  // x to 16 bytes, row_length and cols multiples of 8
  int64_t m;        // of the window
  int64_t cols;     // of the window
  int64_t rank;
  int padded_rank;
  int num_rank_blocks;
  int tiles_across;     // of a group of columns
  int row_tiles;        // of a group, some maybe behind the last row
  int num_units;        // a row tile of a group each, by groups
  int units_per_share;  // of a block
  int num_stages;
  int num_left_stages;
  // Projection
  Narrow narrow;
  float* projection_parts;  // [groups, m, padded_rank]
  // Gradient
  const uint16_t* left;
  int64_t left_stride;
  float* gradient_parts;  // [num_rank_blocks, num_slots, columns of a group, ranks of a block]
  int num_slots;
  int slots_per_group;  // see slot_of
  bool is_added;        // to the gradient parts that are there
};

// The place of share `share`'s gradient of a group: with slots_per_group 0 no share has more than one group, else 1.
__host__ __device__ constexpr int slot_of(int share, int group, int slots_per_group) {
  return share + group * slots_per_group;
}

// Tiles across whose gradient a thread holds.
template <bool kProjects, bool kReduces>
inline constexpr int kHeldTiles = kProjects && kReduces ? 2 : 1;

// Row tiles whose `left` must be there at once.
constexpr int left_stages(int stages, int tiles_across) { return (stages + tiles_across - 2) / tiles_across + 1; }

// Returns when the copies of the oldest stage have arrived, all of num_stages but one being on their way.
template <int kPending = kMaxStages - 2>
__device__ __forceinline__ void wait_for_stage(int num_stages) {
  if constexpr (kPending == 0) {
    wait_for_copies<0>();
  } else if (num_stages >= kPending + 2) {
    wait_for_copies<kPending>();
  } else {
    wait_for_stage<kPending - 1>(num_stages);
  }
}

// A tile in the order in which a block takes them.
struct Place {
  int unit;
  int group;
  int row_tile;
  int across = 0;
  int stage = 0;
  int left_stage = 0;

  __device__ __forceinline__ Place(int first_unit, int row_tiles)
      : unit(first_unit), group(first_unit / row_tiles), row_tile(first_unit % row_tiles) {}

  __device__ __forceinline__ void advance(const Arguments& arguments, int tiles_across) {
    if (++stage == arguments.num_stages) stage = 0;
    if (++across < tiles_across) return;
    across = 0;
    ++unit;
    if (++left_stage == arguments.num_left_stages) left_stage = 0;
    if (++row_tile < arguments.row_tiles) return;
    row_tile = 0;
    ++group;
  }
};

// Starts the copies of a tile of x; zeros behind its last row and column.
template <int kRows>
__device__ __forceinline__ void load_x(uint32_t tile, const Arguments& arguments, int64_t row, int64_t col) {
  const int thread = threadIdx.x;
  const uint16_t* const source = arguments.x + row * arguments.row_length + col;
  if (!arguments.is_aligned) {
    load_tile<kRows, kTileChunks>(tile, source, arguments.row_length, arguments.m - row, arguments.cols - col, false,
                                  thread, kThreads);
    return;
  }
  const int first = thread / kTileChunks;
  const int chunk = thread % kTileChunks;
  const bool has_chunk = col + chunk * kChunkValues < arguments.cols;
  const int rows = static_cast<int>(min(arguments.m - row, int64_t{kRows}));
  const uint32_t to = tile + chunk_offset<kTileChunks>(first, chunk);  // the pieces of row + 8 are dealt alike
  const uint16_t* from = source + first * arguments.row_length + chunk * kChunkValues;
  const int64_t step = kWarps * arguments.row_length;
#pragma unroll
  for (int i = 0; i < kRows / kWarps; ++i) {
    const bool is_inside = has_chunk && first + i * kWarps < rows;
    copy_16_bytes_or_zeros_async(to + i * (kWarps * kTileCols * 2), is_inside ? from : source, is_inside);
    from += step;
  }
}

// Adds up the shares of the columns of a row tile in their order: its part of the projection.
template <int kRanks>
__device__ __forceinline__ void add_row_sums(const Arguments& arguments, const float* exchange, int group,
                                             int64_t first_row, int first_rank) {
  using S = Shape<kRanks>;
  for (int i = threadIdx.x; i < S::kRows * (kRanks / 4); i += kThreads) {
    const int row = i / (kRanks / 4);
    const int rank = i % (kRanks / 4) * 4;
    if (first_row + row >= arguments.m || first_rank + rank >= arguments.padded_rank) continue;
    float4 sum = {};
#pragma unroll
    for (int part = 0; part < S::kColSplit; ++part) {
      const float4 share =
          *reinterpret_cast<const float4*>(exchange + (part * S::kRows + row) * S::kExchangePitch + rank);
      sum.x += share.x;
      sum.y += share.y;
      sum.z += share.z;
      sum.w += share.w;
    }
    float* const to = arguments.projection_parts + (group * arguments.m + first_row + row) * arguments.padded_rank;
    *reinterpret_cast<float4*>(to + first_rank + rank) = sum;
  }
}

}  // namespace qlora::lora
