// What a block of the wide kernels works on (wide_sm90.cuh): arguments, shared memory, and the items dealt to blocks.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "core/low_rank.h"
#include "cuda/device/barrier.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/scales.cuh"
#include "cuda/gemm/product.cuh"
#include "cuda/gemm/split.h"
#include "cuda/gemm/step_scales.cuh"
#include "cuda/gemm/wgmma_kernels.h"

namespace qlora::wide {

inline constexpr int kWarpgroup = 128;     // threads
inline constexpr int kTile = kScaledRows;  // columns of the output
inline constexpr int kHalfTile = 64;       // that a warpgroup multiplies
inline constexpr int kInputDepth = 64;     // of a stage of the input
inline constexpr int kStepInputs = kStepBlocks;
inline constexpr int kStep = kInputDepth * kStepInputs;      // depth of a stage of the weight
inline constexpr int kMaxTokens = 256;                       // of a tile
inline constexpr int64_t kMaxWorkspace = int64_t{32} << 20;  // bytes
inline constexpr int kWeightStages = 3;
inline constexpr int kMaxInputStages = 8;
inline constexpr int kFirstSteps = 2;  // whose bytes are asked for at once; more would keep the memory from the scales

// Blocks of a cluster, which share the copies of the input: where there is much of it.
constexpr int cluster_of(int tokens) { return tokens >= 64 ? 2 : 1; }

struct Arguments {
  const uint8_t* packed;
  Scales scales;
  float scale_factor;  // that the table asks for
  const void* input;
  ProductTarget target;
  int num_parts;
  int rows;  // of the weight
  int cols;
  int depth;
  LowRank low_rank;
  int num_low_blocks;         // of kInputDepth columns of its left operand
  bool are_right_rows_whole;  // 8 values of a row: aligned to 16 bytes
  bool is_weight_aligned;     // packed to 16 bytes
  bool is_input_aligned;      // rows to 16 bytes
  bool are_scales_aligned;    // those of a row that a tile takes at once: a vector, in one nested block
};

struct Maps {
  CUtensorMap weight;
  CUtensorMap input;
  CUtensorMap left;  // of the low-rank term
};

inline constexpr int kMaxProductWarps = 8;  // that store the output through shared memory

struct WeightStage {
  unsigned char bytes[kTile * kStep / 2];
  float scales[kTile * kStep / kBlockCols];
};
inline constexpr int kWeightStageBytes = sizeof(WeightStage);

// Shared memory: this, the pair table at the first multiple of 64 KiB, the stages of the input, the exchange of sums.
struct Shared {
  WeightStage weight[kWeightStages];
  float nested_code[256];
  Barrier weight_full[kWeightStages];
  Barrier weight_empty[kWeightStages];
  Barrier input_full[kMaxInputStages];
  Barrier input_empty[kMaxInputStages];
  Barrier started;  // the first scales are there
  alignas(16) unsigned char staging[kMaxProductWarps][kStoreBytes];
};
inline constexpr int kTableAlignment = PairTable<__half>::kBytes;
static_assert(sizeof(Shared) + kReservedBytes <= kTableAlignment);
static_assert(FloatPairTable::kBytes == kTableAlignment);

// A Config has kTokens, kCluster, kInputStages, kConsumers (threads that multiply), kExchangeBytes, and the registers
// of threads that copy and multiply: together those of the launch. Two warpgroups read an input stage.
template <typename Config>
inline constexpr int kThreads = kWarpgroup + Config::kConsumers;
inline constexpr int kReaders = 2 * kWarpgroup / 32;  // warps
template <typename Config>
inline constexpr int kInputStageBytes = Config::kTokens * kInputDepth * 2;
template <typename Config>
inline constexpr int kSharedBytes =
    2 * kTableAlignment - kReservedBytes + Config::kInputStages * kInputStageBytes<Config> + Config::kExchangeBytes;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

enum NamedBarrier {
  kAllThreads,
  kAllConsumers,
  kTurnOfFirst,
  kTurnOfSecond,
  kAllScaleThreads,
  kInputWarps,
  kCopyWarps,
  kFirstWarpPair,  // and one more for each further pair of warps that stores together
};

static_assert((int64_t{1} << 30) / kStep * kMaxParts < int64_t{1} << 31);  // see Item

__device__ __forceinline__ int num_steps(const Arguments& arguments) { return (arguments.depth + kStep - 1) / kStep; }

// A cluster's share of the work: items from its index on, dealt in turn; an item is a group of tiles, kTokens rows of
// the input and a part of the depth.
template <typename Config>
struct Items {
  int num_groups;
  int num_token_tiles;
  int count;

  __device__ __forceinline__ explicit Items(const Arguments& arguments)
      : num_groups((arguments.target.width + kTile * Config::kCluster - 1) / (kTile * Config::kCluster)),
        num_token_tiles((arguments.target.m + Config::kTokens - 1) / Config::kTokens),
        count(num_groups * num_token_tiles * arguments.num_parts) {}
  static __device__ __forceinline__ int first() { return blockIdx.x / Config::kCluster; }
  static __device__ __forceinline__ int stride() { return gridDim.x / Config::kCluster; }
};

template <typename Config>
struct Item {
  int first;  // column of the output
  int token;  // the first
  int part;
  int step_begin;
  int step_end;

  __device__ __forceinline__ Item(const Arguments& arguments, const Items<Config>& items, int index) {
    // Neighbouring tiles at once: their rows share pages of memory, and all of them the input's rows.
    constexpr int kCluster = Config::kCluster;
    first = (index % items.num_groups * kCluster + static_cast<int>(blockIdx.x) % kCluster) * kTile;
    const int rest = index / items.num_groups;
    token = rest % items.num_token_tiles * Config::kTokens;
    part = rest / items.num_token_tiles;
    step_begin = num_steps(arguments) * part / arguments.num_parts;
    step_end = num_steps(arguments) * (part + 1) / arguments.num_parts;
  }
};

// f(item) for each item of this block.
template <typename Config, typename Function>
__device__ __forceinline__ void for_each_item(const Arguments& arguments, Function&& f) {
  const Items<Config> items(arguments);
  for (int index = items.first(); index < items.count; index += items.stride()) {
    f(Item<Config>(arguments, items, index));
  }
}

// Stages of the low-rank term behind those of the steps of a part.
__device__ __forceinline__ int num_low_blocks(const Arguments& arguments, int part) {
  return part == arguments.num_parts - 1 ? arguments.num_low_blocks : 0;
}

#endif

}  // namespace qlora::wide
