// What the wide kernels share (wide_sm90.cu, wide_grad_sm90.cu): the shape of their work.
//
// Both compute output [m, width] = input [m, depth] times the weight, transposed or not. The tensor cores' 64-row
// operand is the decoded weight, from registers, and their column operand the input, kTokens columns for m rows:
//
//   block   a tile of 128 columns and up to 256 rows of the output, over a part of the depth. Warpgroup 0 copies
//           (wide_copies.cuh), the others multiply (wide_consumer.cuh); work items are dealt in turn to as many blocks
//           as there are multiprocessors (wide_work.cuh).
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
#include "cuda/dispatch.h"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/product.cuh"
#include "cuda/gemm/split.h"
#include "cuda/gemm/wgmma_kernels.h"
#include "cuda/gemm/wide_consumer.cuh"
#include "cuda/gemm/wide_copies.cuh"
#include "cuda/gemm/wide_work.cuh"
#include "cuda/launch.h"
#include "cuda/remember.h"
#include "cuda/tensor_map.h"
#include "cuda/weight_arguments.h"

namespace qlora::wide {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

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
      copy_input<Config>(arguments, maps, shared, input_stages);
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
          init_barrier(shared.input_empty[i], Config::kCluster * kReaders);
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
//   kScaleVector                          scales of a row that its Scales load at once
//   tokens_of(m), dispatch_tokens(m, f)   kTokens for m rows of the input
//   num_part_floats(m, width), add(..)    of a part of the output, and to add the parts up
//   Scales, Consumer, box_col, box_row, copy_plainly, copy_right    on the device, see copy_scales and run
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

inline constexpr int kMaxRows = 1 << 30;  // of the input

// As supports_x of gemm.h, but for the direction.
template <template <typename> typename Kind>
bool supports(const Gemm& problem, const Device& device, std::string* why_not) {
  using Any = Kind<__half>;
  const auto* const any =
      reinterpret_cast<const void*>(wide_kernel<Any, typename Any::template Config<kMaxTokens>, true>);
  return supports_wgmma(problem, device, kMaxRows, any, why_not);
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
  const LowRank& term = problem.low_rank;
  arguments.low_rank = term;
  arguments.num_low_blocks = static_cast<int>(ceil_div(term.rank, kInputDepth));
  arguments.are_right_rows_whole =
      (is_forward(problem) ? term.rank : weight.cols) % 8 == 0 && is_aligned(term.right, 16);
  arguments.is_weight_aligned = is_aligned(weight.packed, 16);
  arguments.is_input_aligned = is_aligned(problem.input, 16) && arguments.depth % 8 == 0;
  arguments.are_scales_aligned = weight.block_size == kBlockCols &&
                                 weight.cols % (Kind::kScaleVector * kBlockCols) == 0 &&
                                 is_aligned(weight.absmax_codes, Kind::kScaleVector) &&
                                 is_aligned(weight.absmax, Kind::kScaleVector * sizeof(float));
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
