// The arguments of adapter_pass.cu's kernel, a block's share of its work, and what the blocks of a cluster do together.
#pragma once

#include <cstdint>

#include "cuda/device/cluster.cuh"
#include "cuda/lora/adapter_tile.cuh"
#include "cuda/lora/lora.h"
#include "cuda/lora/tile.cuh"

namespace qlora::lora {

inline constexpr int kMaxCluster = 8;
inline constexpr int kMaxStages = 5;

struct Arguments {
  const uint16_t* x;
  int64_t row_length;
  bool is_aligned;  // x to 16 bytes, row_length and cols multiples of 8
  int64_t m;        // of the window
  int64_t cols;     // of the window
  int64_t rank;
  int padded_rank;
  int num_rank_blocks;
  int num_col_tiles;
  int num_col_groups;  // of what a cluster has
  int tiles_across;    // of a block; 1 where there is a gradient
  int64_t rows_per_block;
  int num_stages;
  int cluster;  // 0: each block writes its own parts
  // Projection
  Narrow narrow;
  float scaling;
  float* projection_parts;  // [num_col_groups, m, padded_rank], or null: the sums of a cluster are whole
  void* output;             // then written: [m, output_stride]
  int output_stride;
  // Gradient
  const uint16_t* left;
  int64_t left_stride;
  float* gradient_parts;  // [clusters or blocks in rows, cols, padded_rank], or null: the sums of a cluster are whole
  bool is_added;          // to the gradient parts that are there
  Narrow gradient;
};

template <bool kProjects, bool kReduces>
inline constexpr int kThreads = kWarps * 32 * (kProjects + kReduces);
template <int kRanks>
inline constexpr int kMinBlocks = kRanks <= 32 ? 2 : 1;  // of a multiprocessor: 64 ranks take all registers

// Shared memory: S of each tile across, what the cluster exchanges, the stages of x and left.
constexpr int exchange_bytes(int ranks, bool projects) {
  return (projects ? 2 * kRows : kCols) * ranks * static_cast<int>(sizeof(float));
}
template <int kRanks, bool kProjects>
inline constexpr int kExchangeBytes = exchange_bytes(kRanks, kProjects);
constexpr int stage_bytes(int ranks, bool reduces) { return kTileBytes + (reduces ? kRows * ranks * 2 : 0); }

__device__ __forceinline__ void wait_for_stage(int num_stages) {
  if (num_stages == 5) return wait_for_copies<3>();
  if (num_stages == 4) return wait_for_copies<2>();
  if (num_stages == 3) return wait_for_copies<1>();
  wait_for_copies<0>();
}

// What a block has of the work.
template <int kRanks, bool kProjects>
struct Share {
  int rank_in_cluster;
  int first_rank;
  int col_group;
  int64_t row_group;
  int first_tile;  // in columns
  int64_t begin;   // rows
  int64_t end;
  int num_row_tiles;

  __device__ __forceinline__ explicit Share(const Arguments& arguments) {
    const int cluster = max(arguments.cluster, 1);
    const int index = static_cast<int>(blockIdx.x) / cluster;
    rank_in_cluster = static_cast<int>(blockIdx.x) % cluster;
    first_rank = index % arguments.num_rank_blocks * kRanks;
    col_group = index / arguments.num_rank_blocks % arguments.num_col_groups;
    row_group = index / arguments.num_rank_blocks / arguments.num_col_groups;
    first_tile = kProjects ? col_group * cluster * arguments.tiles_across + rank_in_cluster : col_group;
    const int64_t row_block = kProjects ? row_group : row_group * cluster + rank_in_cluster;
    begin = min(row_block * arguments.rows_per_block, arguments.m);
    end = min(begin + arguments.rows_per_block, arguments.m);
    num_row_tiles = static_cast<int>((end - begin + kRows - 1) / kRows);
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Sends the sums of a tile to the blocks of the cluster that add them up: block i has rows i * kRows / cluster.. of the
// tile, at `exchange` [block that sent][row][kRanks].
template <int kRanks>
__device__ __forceinline__ void send_row_sums(const RowSums<kRanks>& sums, int warp, uint32_t exchange, int cluster,
                                              int rank_in_cluster) {
  const int share = kRows / cluster;
  for_each_row_sum<kRanks>(sums, warp, [&](int row, int rank, float low, float high) {
    const int place = (rank_in_cluster * share + row % share) * kRanks + rank;
    store_two_floats_in_block(address_in_block(exchange, row / share) + place * 4, low, high);
  });
}

// Adds up this block's rows of a tile that begins at first_row. `kept`: of the tiles across before it, where there are
// several: then clusters have 8 blocks and a thread no more than these four sums.
template <typename T, int kRanks, int kNumThreads>
__device__ __forceinline__ void add_row_sums(const Arguments& arguments, const Share<kRanks, true>& block,
                                             const float* exchange, int64_t first_row, int tile_across,
                                             float (&kept)[4]) {
  const int share = kRows / arguments.cluster;
  const bool is_whole = arguments.projection_parts == nullptr;
  const bool is_last = block.first_rank + kRanks >= arguments.padded_rank;
  const int last = is_last ? (is_whole ? arguments.output_stride : arguments.padded_rank) : block.first_rank + kRanks;
  const int num_fours = (last - block.first_rank) / 4;
  for (int i = threadIdx.x; i < share * num_fours; i += kNumThreads) {
    const int rank = i % num_fours * 4;
    const int row = i / num_fours;
    float sums[4] = {};
    for (int sender = 0; sender < arguments.cluster && rank < kRanks; ++sender) {
      const float4 sent = *reinterpret_cast<const float4*>(exchange + (sender * share + row) * kRanks + rank);
      sums[0] += sent.x;
      sums[1] += sent.y;
      sums[2] += sent.z;
      sums[3] += sent.w;
    }
    if (tile_across > 0) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] = kept[j] + sums[j];
    }
    if (tile_across + 1 < arguments.tiles_across) {
#pragma unroll
      for (int j = 0; j < 4; ++j) kept[j] = sums[j];
      continue;
    }
    const int64_t at = first_row + block.rank_in_cluster * share + row;
    const int col = block.first_rank + rank;
    if (at >= block.end) continue;
    if (is_whole) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[j] = col + j < arguments.rank ? arguments.scaling * sums[j] : 0.0f;
      *reinterpret_cast<uint2*>(static_cast<T*>(arguments.output) + at * arguments.output_stride + col) =
          make_uint2(Word<T>::pack(sums), Word<T>::pack(sums + 2));
    } else {
      float* const part = arguments.projection_parts + (block.col_group * arguments.m + at) * arguments.padded_rank;
      *reinterpret_cast<float4*>(part + col) = make_float4(sums[0], sums[1], sums[2], sums[3]);
    }
  }
}

__device__ __forceinline__ void store_gradient(const Narrow& gradient, int64_t rank, int64_t col, float value) {
  void* const values = const_cast<void*>(gradient.values);
  const int64_t at = rank * gradient.rank_stride + col * gradient.col_stride;
  if (gradient.dtype == QLORA_FLOAT32) {
    static_cast<float*>(values)[at] = value;
  } else if (gradient.dtype == QLORA_BFLOAT16) {
    static_cast<__nv_bfloat16*>(values)[at] = from_float<__nv_bfloat16>(value);
  } else {
    static_cast<__half*>(values)[at] = from_float<__half>(value);
  }
}

// The gradient of the cluster's rows: block i adds up columns i * kCols / cluster.. of the tile.
template <int kRanks, int kNumThreads>
__device__ __forceinline__ void add_column_sums(const Arguments& arguments, const Share<kRanks, false>& block,
                                                ColumnSums<kRanks>& sums, const float* exchange) {
  const int share = kCols / arguments.cluster;
  const uint32_t to = shared_address(exchange);
  for_each_column_sum<kRanks>(sums, threadIdx.x / 32, [&](int col, int rank, float low, float high) {
    const int place = (block.rank_in_cluster * share + col % share) * kRanks + rank;
    store_two_floats_in_block(address_in_block(to, col / share) + place * 4, low, high);
  });
  hand_over_to_cluster();
  take_over_from_cluster();
  const int64_t first_col = int64_t{block.first_tile} * kCols + block.rank_in_cluster * share;
  // Threads that are neighbours write what is.
  const bool is_rank_fast = arguments.gradient_parts != nullptr || arguments.gradient.rank_stride == 1;
  for (int i = threadIdx.x; i < share * kRanks; i += kNumThreads) {
    const int col = is_rank_fast ? i / kRanks : i % share;
    const int rank = is_rank_fast ? i % kRanks : i / share;
    float sum = 0.0f;
    for (int sender = 0; sender < arguments.cluster; ++sender) {
      sum += exchange[(sender * share + col) * kRanks + rank];
    }
    if (first_col + col >= arguments.cols) continue;
    if (arguments.gradient_parts == nullptr) {
      if (block.first_rank + rank < arguments.rank) {
        store_gradient(arguments.gradient, block.first_rank + rank, first_col + col, sum);
      }
    } else if (block.first_rank + rank < arguments.padded_rank) {
      const int64_t at = block.row_group * arguments.cols + first_col + col;
      arguments.gradient_parts[at * arguments.padded_rank + block.first_rank + rank] = sum;
    }
  }
}

#endif

}  // namespace qlora::lora
