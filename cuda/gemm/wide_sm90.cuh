// What the wide kernels share (wide_sm90.cu, wide_grad_sm90.cu): the shape of their work and the warps that copy.
//
// Both compute output [m, width] = input [m, depth] times the weight, transposed or not. The tensor cores' 64-row
// operand is the decoded weight, from registers, and their column operand the input, kTokens columns for m rows:
//
//   block   a tile of 128 columns and up to 256 rows of the output, over a part of the depth. Warpgroup 0 copies, the
//           others multiply; work items are dealt in turn to as many blocks as there are multiprocessors.
//   input   through a ring of stages of 64 values of depth; the blocks of a cluster, which have neighbouring tiles,
//           copy a share each to all of them
//   weight  through a ring of stages of 256 values of depth; the warps that copy its scales decode them
//   low rank    a low-rank term is more depth at the end, of 64 columns of its left operand for the input and of its
//           right one in 16 bits for the weight: a stage of either, that holds as many bytes
//   parts   where tiles are fewer than multiprocessors the depth is split: fp32 parts in the workspace, which
//           Kind::add adds up in their order
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cuda/device/barrier.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/device/tensor_copy.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/dispatch.h"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/product.cuh"
#include "cuda/gemm/split.h"
#include "cuda/gemm/step_scales.cuh"
#include "cuda/gemm/wgmma_kernels.h"
#include "cuda/launch.h"
#include "cuda/remember.h"
#include "cuda/tensor_map.h"
#include "cuda/weight_arguments.h"

namespace qlora::wide {

inline constexpr int kWarpgroup = 128;     // threads
inline constexpr int kTile = kScaledRows;  // columns of the output
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
  bool are_scales_aligned;    // 4 scales of a row: 4 or 16 aligned bytes in one nested block
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

// A Config has kTokens, kCluster, kInputStages, kConsumers (threads that multiply), kReaders (warps that read an input
// stage), kExchangeBytes, and the registers of threads that copy and multiply: together those of the launch.
// kHasWholeSteps: input behind the last of the depth is copied too, as zeros, so that a step always has all stages of
// the input.
template <typename Config>
inline constexpr int kThreads = kWarpgroup + Config::kConsumers;
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
};

__device__ __forceinline__ int num_steps(const Arguments& arguments) { return (arguments.depth + kStep - 1) / kStep; }

// Input stages of a step.
template <typename Config>
__device__ __forceinline__ int num_inputs(const Arguments& arguments, int step) {
  if constexpr (Config::kHasWholeSteps) return kStepInputs;
  return min(kStepInputs, (arguments.depth - step * kStep + kInputDepth - 1) / kInputDepth);
}

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
    step_begin = static_cast<int>(int64_t{num_steps(arguments)} * part / arguments.num_parts);
    step_end = static_cast<int>(int64_t{num_steps(arguments)} * (part + 1) / arguments.num_parts);
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
template <typename Kind>
__device__ __forceinline__ int num_low_blocks(const Arguments& arguments, int part) {
  if constexpr (!Kind::kFusesLowRank) return 0;
  return part == arguments.num_parts - 1 ? arguments.num_low_blocks : 0;
}

__device__ __noinline__ inline uint4 load_bytes(const void* address, int count) {
  const auto* const bytes = static_cast<const uint8_t*>(address);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (i < count) words[i / 4] |= static_cast<uint32_t>(bytes[i]) << i % 4 * 8;
  }
  return {words[0], words[1], words[2], words[3]};
}

// Warps 0 and 1: the scales of the weight, and its bytes where the tensor memory accelerator does not take them. Kind
// has
//   Scales<kIsNested>::load(arguments, first, step) and store(..), see StepScales
//   copy_plainly(arguments, item.first, step, stage)
template <typename Config, typename Kind, bool kIsNested>
__device__ __forceinline__ void copy_scales(const Arguments& arguments, Shared& shared) {
  using Cluster = Items<Config>;
  typename Kind::template Scales<kIsNested> scales;
  cudaGridDependencySynchronize();
  // All that is read first is asked for before any of it is waited for.
  const Item<Config> first(arguments, Cluster(arguments), Cluster::first());
  scales.load(arguments, first.first, first.step_begin);
  NestedCode nested_code;
  float nested_offset = 0.0f;
  if constexpr (kIsNested) {
    nested_code.load(arguments.scales.nested_code);
    nested_offset = *arguments.scales.nested_offset;
  }
  synchronize<kScaleThreads + 2 * 32>(kCopyWarps);
  arrive_at<kThreads<Config>>(kAllThreads);
  if constexpr (kIsNested) {
    nested_code.store(shared.nested_code);
    synchronize<kScaleThreads>(kAllScaleThreads);
  }
  bool is_loaded = true;
  bool is_first = true;
  RingPlace<kWeightStages> place;
  for_each_item<Config>(arguments, [&](const auto& item) {
    for (int step = item.step_begin; step < item.step_end; ++step) {
      WeightStage& stage = shared.weight[place.stage()];
      wait(shared.weight_empty[place.stage()], place.free_parity());
      if (!is_loaded) scales.load(arguments, item.first, step);
      scales.store(arguments, item.first, step, shared.nested_code, nested_offset, stage.scales);
      is_loaded = step + 1 < item.step_end;
      if (is_loaded) scales.load(arguments, item.first, step + 1);
      if (!arguments.is_weight_aligned) Kind::copy_plainly(arguments, item.first, step, stage.bytes);
      arrive(shared.weight_full[place.stage()]);
      if (is_first) arrive(shared.started);
      is_first = false;
      place.advance();
    }
    if constexpr (Kind::kFusesLowRank) {
      for (int block = 0; block < num_low_blocks<Kind>(arguments, item.part); ++block) {
        wait(shared.weight_empty[place.stage()], place.free_parity());
        Kind::copy_right(arguments, item.first, block, shared.weight[place.stage()].bytes);
        arrive(shared.weight_full[place.stage()]);
        place.advance();
      }
    }
  });
}

// Warp 3: the bytes of the weight.
template <typename Config, typename Kind>
__device__ __forceinline__ void prefetch_weight(const Arguments& arguments, const CUtensorMap& map) {
  using Cluster = Items<Config>;
  if (!arguments.is_weight_aligned) return;
  const Item<Config> item(arguments, Cluster(arguments), Cluster::first());
  for (int step = item.step_begin; step < min(item.step_begin + kFirstSteps, item.step_end); ++step) {
    prefetch_box_to_l2(map, Kind::box_col(item.first, step), Kind::box_row(item.first, step));
  }
}

template <typename Config, typename Kind>
__device__ __forceinline__ void copy_weight(const Arguments& arguments, const CUtensorMap& map, Shared& shared) {
  int count = 0;
  RingPlace<kWeightStages> place;
  for_each_item<Config>(arguments, [&](const auto& item) {
    for (int step = item.step_begin; step < item.step_end; ++step) {
      WeightStage& stage = shared.weight[place.stage()];
      Barrier& full = shared.weight_full[place.stage()];
      if (count++ == kFirstSteps) wait(shared.started, 0);
      wait(shared.weight_empty[place.stage()], place.free_parity());
      if (arguments.is_weight_aligned) {
        arrive_expecting(full, sizeof(stage.bytes));
        copy_box(stage.bytes, map, Kind::box_col(item.first, step), Kind::box_row(item.first, step), full);
        if (const int ahead = step + kWeightStages; ahead < item.step_end) {
          prefetch_box_to_l2(map, Kind::box_col(item.first, ahead), Kind::box_row(item.first, ahead));
        }
      } else {
        arrive(full);
      }
      place.advance();
    }
    for (int block = 0; block < num_low_blocks<Kind>(arguments, item.part); ++block) {
      wait(shared.weight_empty[place.stage()], place.free_parity());
      arrive(shared.weight_full[place.stage()]);
      place.advance();
    }
  });
}

// Warp 2: the input. The 16-byte piece p of token t lies at place p ^ t % 8 of its 128 bytes.
template <typename Config, typename Kind>
__device__ __forceinline__ void copy_input(const Arguments& arguments, const Maps& maps, Shared& shared,
                                           unsigned char* stages) {
  constexpr int kShare = Config::kTokens / Config::kCluster;  // tokens that this block copies, to all of its cluster
  const int lane = threadIdx.x % 32;
  const int rank = static_cast<int>(blockIdx.x) % Config::kCluster;
  RingPlace<Config::kInputStages> place;
  for_each_item<Config>(arguments, [&](const auto& item) {
    const int steps_end = item.step_end * kStep;
    const int end = Config::kHasWholeSteps ? steps_end : min(steps_end, arguments.depth);
    for (int begin = item.step_begin * kStep; begin < end; begin += kInputDepth) {
      unsigned char* const stage = stages + place.stage() * kInputStageBytes<Config>;
      Barrier& full = shared.input_full[place.stage()];
      wait(shared.input_empty[place.stage()], place.free_parity());
      if (arguments.is_input_aligned) {
        if (lane == 0) {
          arrive_expecting(full, kInputStageBytes<Config>);
          copy_box(stage + rank * kShare * 128, maps.input, begin, item.token + rank * kShare, full,
                   (1 << Config::kCluster) - 1);
        }
      } else {
        for (int i = lane; i < Config::kTokens * 8; i += 32) {
          const int token = i / 8;
          const int first = begin + i % 8 * 8;
          const int source = item.token + token;
          const auto* const row = static_cast<const uint8_t*>(arguments.input) + int64_t{source} * arguments.depth * 2;
          const int count = source < arguments.target.m ? min(max(arguments.depth - first, 0), 8) * 2 : 0;
          *reinterpret_cast<uint4*>(stage + token * 128 + (i % 8 ^ token % 8) * 16) =
              load_bytes(row + first * 2, count);
        }
        fence_shared();
        __syncwarp();
        if (lane == 0) arrive(full);
      }
      place.advance();
    }
    for (int block = 0; block < num_low_blocks<Kind>(arguments, item.part); ++block) {
      unsigned char* const stage = stages + place.stage() * kInputStageBytes<Config>;
      Barrier& full = shared.input_full[place.stage()];
      wait(shared.input_empty[place.stage()], place.free_parity());
      if (lane == 0) {
        arrive_expecting(full, kInputStageBytes<Config>);
        copy_box(stage + rank * kShare * 128, maps.left, block * kInputDepth, item.token + rank * kShare, full,
                 (1 << Config::kCluster) - 1);
      }
      place.advance();
    }
  });
  // Until all that was copied has been read, here and in the other blocks: then they send no more arrivals, and may
  // leave.
  for (int i = 0; i < Config::kInputStages; ++i) {
    wait(shared.input_empty[place.stage()], place.free_parity());
    place.advance();
  }
}

// The part of a warpgroup that multiplies which has to do with the rings.
template <typename Config>
class Rings {
 public:
  __device__ __forceinline__ Rings(Shared& shared, const unsigned char* input_stages)
      : shared_(shared), input_(describe_columns(input_stages)), lane_(keep(threadIdx.x % 32)) {}

  __device__ __forceinline__ int lane() const { return static_cast<int>(lane_); }
  // Offset of the weight's stage from the first, in bytes.
  __device__ __forceinline__ uint32_t weight_offset() const { return weight_place_.stage() * kWeightStageBytes; }

  __device__ __forceinline__ void wait_for_weight() {
    wait(shared_.weight_full[weight_place_.stage()], weight_place_.parity());
  }
  // Each thread for what it has read.
  __device__ __forceinline__ void release_weight() {
    arrive(shared_.weight_empty[weight_place_.stage()]);
    weight_place_.advance();
  }

  // The descriptor of the step's input stage `index`, when it is there.
  __device__ __forceinline__ uint32_t wait_for_input(int index) {
    const auto place = index == 0 ? input_place_ : input_place_.plus(index);
    wait(shared_.input_full[place.stage()], place.parity());
    return input_ + place.stage() * (kInputStageBytes<Config> / 16);
  }
  __device__ __forceinline__ int input_stage(int index) const {
    return index == 0 ? input_place_.stage() : input_place_.plus(index).stage();
  }
  __device__ __forceinline__ void release_input(int stage) {
    __syncwarp();
    if constexpr (Config::kCluster == 1) {
      if (lane() == 0) arrive(shared_.input_empty[stage]);
    } else {
      if (lane() < Config::kCluster) arrive_remote(shared_.input_empty[stage], lane());
    }
  }
  __device__ __forceinline__ void advance_input(int count) { input_place_.advance(count); }

 private:
  Shared& shared_;
  uint32_t input_;
  uint32_t lane_;
  RingPlace<kWeightStages> weight_place_;
  RingPlace<Config::kInputStages> input_place_;
};

// The kernel's body.
template <typename Kind, typename Config, bool kIsNested>
__device__ __forceinline__ void run(const Arguments& arguments, const Maps& maps, const CodeValues& values) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  unsigned char* const table = shared_bytes + (kTableAlignment - shared_address(shared_bytes) % kTableAlignment);
  unsigned char* const input_stages = table + kTableAlignment;
  constexpr bool kIsCluster = Config::kCluster > 1;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (kIsCluster && warp != 3) arrive_at_cluster();
  if (warp < kWarpgroup / 32) {
    limit_registers<Config::kCopyRegisters, false>();
    if (warp < 2) {
      copy_scales<Config, Kind, kIsNested>(arguments, shared);
      if constexpr (kIsCluster) wait_for_cluster();
    } else if (warp == 2) {
      synchronize<2 * 32>(kInputWarps);
      arrive_at<kScaleThreads + 2 * 32>(kCopyWarps);
      arrive_at<kThreads<Config>>(kAllThreads);
      if constexpr (kIsCluster) wait_for_cluster();
      cudaGridDependencySynchronize();
      copy_input<Config, Kind>(arguments, maps, shared, input_stages);
      __syncwarp();
    } else {
      const bool is_first = threadIdx.x % 32 == 0;
      if (is_first) {
        for (int i = 0; i < kWeightStages; ++i) {
          init_barrier(shared.weight_full[i], kScaleThreads + 1);
          init_barrier(shared.weight_empty[i], Config::kConsumers);
        }
        for (int i = 0; i < Config::kInputStages; ++i) {
          init_barrier(shared.input_full[i], 1);
          init_barrier(shared.input_empty[i], Config::kCluster * Config::kReaders);
        }
        init_barrier(shared.started, kScaleThreads);
        publish_barriers();
        // All that may be done before the kernels before this one in the stream have ended: they may write the weight.
        prefetch_weight<Config, Kind>(arguments, maps.weight);
      }
      __syncwarp();
      if constexpr (kIsCluster) arrive_at_cluster();
      synchronize<2 * 32>(kInputWarps);
      arrive_at<kScaleThreads + 2 * 32>(kCopyWarps);
      arrive_at<kThreads<Config>>(kAllThreads);
      cudaGridDependencySynchronize();
      if (is_first) copy_weight<Config, Kind>(arguments, maps.weight, shared);
      __syncwarp();
      if constexpr (kIsCluster) wait_for_cluster();
    }
  } else {
    limit_registers<Config::kRegisters, true>();
    Kind::template Table<Config>::template fill<Config::kConsumers>(table, values, threadIdx.x - kWarpgroup);
    synchronize<kThreads<Config>>(kAllThreads);
    if constexpr (kIsCluster) wait_for_cluster();
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
    float* const exchange = reinterpret_cast<float*>(input_stages + Config::kInputStages * kInputStageBytes<Config>);
    typename Kind::template Consumer<Config> consumer(arguments, shared, table, input_stages, exchange);
    consumer.run();
    __syncwarp();
  }
  // A block may leave only when none of its cluster copies to it any more.
  if constexpr (kIsCluster) {
    arrive_at_cluster();
    wait_for_cluster();
  }
}

#endif

// By which kernels that scale weights decode them: in bf16 from fp16 values, whose error adds nothing to that of the
// weights' rounding (0.008 % to 0.17 %, rms), in fp16 from exact ones.
template <typename T>
using ScaledWeightTable = std::conditional_t<std::is_same_v<T, __half>, FloatPairTable, PairTable<__half>>;

// Kind<T> says what the forward product and the input gradient have for themselves:
//   Config<kTokens>, Table<Config>        what is above, and the table that decodes
//   describe_weight(weight)               the boxes in which the weight is copied
//   kMaxRows                              of the input
//   kFusesLowRank, copy_right             of a low-rank term, see copy_scales
//   tokens_of(m), dispatch_tokens(m, f)   kTokens for m rows of the input
//   num_part_floats(m, width), add(..)    of a part of the output, and to add the parts up
//   Scales, Consumer, box_col, box_row, copy_plainly    on the device, see copy_scales and run
template <typename Kind, typename Config, bool kIsNested>
__global__ __launch_bounds__(kThreads<Config>, 1) void wide_kernel(const __grid_constant__ Arguments arguments,
                                                                   const __grid_constant__ Maps maps,
                                                                   const __grid_constant__ CodeValues values) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  run<Kind, Config, kIsNested>(arguments, maps, values);
#else
  __trap();  // supports lets no device here that this was not compiled for.
#endif
}

inline bool is_forward(const Gemm& problem) { return problem.direction == Direction::kForward; }
inline int64_t width_of(const Gemm& problem) { return is_forward(problem) ? problem.weight.rows : problem.weight.cols; }
inline int64_t depth_of(const Gemm& problem) { return is_forward(problem) ? problem.weight.cols : problem.weight.rows; }

template <typename Kind>
int64_t part_bytes(const Gemm& problem) {
  return Kind::num_part_floats(problem.m, width_of(problem)) * static_cast<int64_t>(sizeof(float));
}

// As many parts as are best, within kMaxWorkspace.
template <typename Kind>
int num_parts_of(const Gemm& problem, const Device& device) {
  const int tokens = Kind::tokens_of(problem.m);
  const int cluster = cluster_of(tokens);
  const int64_t num_tiles = ceil_div(width_of(problem), kTile * cluster) * ceil_div(problem.m, tokens);
  const int most = static_cast<int>(std::clamp<int64_t>(kMaxWorkspace / part_bytes<Kind>(problem), 1, kMaxParts));
  return best_num_parts(num_tiles, ceil_div(depth_of(problem), kStep), device.num_multiprocessors / cluster, most);
}

// As supports_x of gemm.h, but for the direction.
template <template <typename> typename Kind>
bool supports(const Gemm& problem, const Device& device, std::string* why_not) {
  using Any = Kind<__half>;
  const auto* const any =
      reinterpret_cast<const void*>(wide_kernel<Any, typename Any::template Config<kMaxTokens>, true>);
  return supports_wgmma(problem, device, Any::kMaxRows, any, why_not);
}

template <template <typename> typename Kind>
int64_t workspace_size(const Gemm& problem, const Device& device) {
  const int parts = num_parts_of<Kind<__half>>(problem, device);
  return parts == 1 ? 0 : parts * part_bytes<Kind<__half>>(problem);
}

template <typename Kind>
Arguments arguments_of(const Gemm& problem, const Device& device) {
  const qlora_weight_4bit& weight = problem.weight;
  Arguments arguments = {};
  arguments.packed = static_cast<const uint8_t*>(weight.packed);
  arguments.scales = scales_of(weight);
  arguments.input = problem.input;
  arguments.num_parts = num_parts_of<Kind>(problem, device);
  arguments.target = {problem.output,
                      problem.bias,
                      arguments.num_parts == 1 ? nullptr : static_cast<float*>(problem.workspace),
                      static_cast<int>(problem.m),
                      static_cast<int>(width_of(problem)),
                      is_aligned(problem.output, 16) && width_of(problem) % 8 == 0};
  arguments.rows = static_cast<int>(weight.rows);
  arguments.cols = static_cast<int>(weight.cols);
  arguments.depth = static_cast<int>(depth_of(problem));
  if constexpr (Kind::kFusesLowRank) {
    const LowRank& term = problem.low_rank;
    arguments.low_rank = term;
    arguments.num_low_blocks = static_cast<int>(ceil_div(term.rank, kInputDepth));
    arguments.are_right_rows_whole = term.rank % 8 == 0 && is_aligned(term.right, 16);
  }
  arguments.is_weight_aligned = is_aligned(weight.packed, 16);
  arguments.is_input_aligned = is_aligned(problem.input, 16) && arguments.depth % 8 == 0;
  arguments.are_scales_aligned = weight.block_size == kBlockCols && weight.cols % (4 * kBlockCols) == 0 &&
                                 is_aligned(weight.absmax_codes, 4) && is_aligned(weight.absmax, 16);
  return arguments;
}

// Launches the kernel, and the addition behind it where there are parts.
template <typename Kind, typename Config, bool kIsNested>
void launch(const Gemm& problem, const Device& device, const Arguments& arguments, Maps maps, const CodeValues& values,
            cudaStream_t stream) {
  const auto kernel = wide_kernel<Kind, Config, kIsNested>;
  if (arguments.is_input_aligned) {
    maps.input = describe_matrix(problem.input, 2, 128, problem.m, arguments.depth, Config::kTokens / Config::kCluster);
  }
  if (arguments.num_low_blocks > 0) {
    maps.left = describe_matrix(problem.low_rank.left, 2, 128, problem.m, problem.low_rank.left_stride,
                                Config::kTokens / Config::kCluster);
  }
  allow_shared_bytes(device, reinterpret_cast<const void*>(kernel), kSharedBytes<Config>);
  const int64_t num_tiles =
      ceil_div(arguments.target.width, kTile * Config::kCluster) * ceil_div(arguments.target.m, Config::kTokens);
  const int64_t num_items = num_tiles * arguments.num_parts;
  const unsigned num_clusters = grid_size(num_items, 1, device.num_multiprocessors / Config::kCluster);
  launch_early("wide_kernel", kernel,
               LaunchShape{num_clusters * Config::kCluster, kThreads<Config>, kSharedBytes<Config>, Config::kCluster},
               device, stream, arguments, maps, values);
  if (arguments.num_parts > 1) Kind::add(arguments.target, arguments.num_parts, problem.dtype, device, stream);
}

// As x of gemm.h.
template <template <typename> typename Kind>
void run_wide(const Gemm& problem, const Device& device, cudaStream_t stream) {
  const qlora_weight_4bit& weight = problem.weight;
  const Format format = weight.format == QLORA_NF4 ? Format::kNF4 : Format::kFP4;
  dispatch_dtype(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      Arguments arguments = arguments_of<Kind<T>>(problem, device);
      Maps maps = {};
      if (arguments.is_weight_aligned) maps.weight = Kind<T>::describe_weight(weight);
      dispatch_bool(weight.absmax_codes != nullptr, [&](auto nested) {
        Kind<T>::dispatch_tokens(problem.m, [&](auto tokens) {
          using Config = typename Kind<T>::template Config<tokens()>;
          using Table = typename Kind<T>::template Table<Config>;
          arguments.scale_factor = 1.0f / Table::scale(format);
          launch<Kind<T>, Config, nested()>(problem, device, arguments, maps, Table::values(format), stream);
        });
      });
    }
  });
}

}  // namespace qlora::wide
