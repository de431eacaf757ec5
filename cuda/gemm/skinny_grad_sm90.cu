// dx = dy W for 1 to 16 rows of dy on Hopper: the weight is read once from HBM and decoded once.
//
// The sum runs over n, whose scales cannot wait until after it: dy is scaled instead, for each block of 64 columns, in
// fp16. The weight's codes, transposed, are the 16-row operand of mma.m16n8k16 and scaled dy the 8-column one.
//
//   grid     a block of threads an item: a tile of 256 columns and a part of n in steps of 128 rows
//   warps    16 multiply: of a step a warp has a block of 64 columns and 32 rows. One copies W, by the tensor memory
//            accelerator, through a ring of steps, and asks for some more ahead into L2
//   dy       of a segment of up to 16 steps at once, with its scales, before the products: see skinny_grad_segment.cuh
//   decode   a lane has columns 8g..8g+7 of rows 2i, 2i+1, 2i+8 and 2i+9 (g = lane / 4, i = lane % 4). Nibbles of two
//            neighbouring rows make a byte, which PairTable takes to the pair of values that the operand has there
//   sums     of the warps that share columns: through shared memory; of parts: through that of the blocks of a cluster,
//            or, where the GPU has no room for all of these at once, in memory, by add_parts; in a fixed order
//
// Rounding: of the table's values, of scales and of scaled dy to fp16 (0.008, 0.02 and 0.02 %, rms; a weight rounded to
// bf16 has 0.17 %), fp32 sums, dx. In fp16 that would be more than other kernels have: bf16 alone.
// Range: that of any sum in fp32, which may pass the largest value on its way to a smaller one.
#include <cstdint>

#include "core/status.h"
#include "cuda/device/tensor_copy.cuh"
#include "cuda/device/unaligned.cuh"
#include "cuda/dispatch.h"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/skinny_grad_consumer.cuh"
#include "cuda/gemm/skinny_grad_segment.cuh"
#include "cuda/gemm/split.h"
#include "cuda/gemm/wgmma_kernels.h"
#include "cuda/launch.h"
#include "cuda/remember.h"
#include "cuda/tensor_map.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

using namespace skinny_grad;

#if __CUDA_ARCH__ >= 900

constexpr int kFirstSteps = 2;  // that are asked for at once; more would keep the memory from dy and the scales

// By a warp, where the tensor memory accelerator does not take the weight.
__device__ __forceinline__ void copy_plainly(const Arguments& arguments, const Item& item, int step,
                                             unsigned char* target) {
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < kStep * kTileBytes / 16; i += 32) {
    const int row = i / 8;
    const int byte = item.first_col / 2 + i % 8 * 16;
    if (byte >= arguments.cols / 2) continue;  // Whatever is there counts nothing.
    const int64_t source = int64_t{min(step * kStep + row, arguments.rows - 1)} * (arguments.cols / 2) + byte;
    *reinterpret_cast<uint4*>(target + row * kTileBytes + (i % 8 ^ row % 8) * 16) =
        load_16_unaligned_bytes(arguments.packed + source);
  }
}

// The warp that copies the weight.
template <int kTokens>
__device__ __forceinline__ void copy_weight(const Arguments& arguments, const CUtensorMap& map, const Item& item,
                                            Shared<kTokens>& shared) {
  const bool is_first = threadIdx.x % 32 == 0;
  RingPlace<kStages<kTokens>> place;
  for (int step = item.step_begin; step < item.step_end; ++step) {
    const int done = step - item.step_begin;
    Barrier& full = shared.full[place.stage()];
    if (done == kFirstSteps) wait(shared.started, 0);
    wait(shared.empty[place.stage()], place.free_parity());
    if (!arguments.is_weight_aligned) {
      copy_plainly(arguments, item, step, shared.weight[place.stage()]);
      arrive(full);
    } else if (is_first) {
      arrive_expecting(full, sizeof(shared.weight[0]));
      copy_box(shared.weight[place.stage()], map, item.first_col / 2, step * kStep, full);
      // The bytes of the next round of the ring into L2: the memory does not wait for products.
      if (done >= kFirstSteps) {
        const int last = min(step + kStages<kTokens>, item.step_end - 1);
        for (int ahead = done == kFirstSteps ? item.step_begin + kStages<kTokens> : step + kStages<kTokens>;
             ahead <= last; ++ahead) {
          prefetch_box_to_l2(map, item.first_col / 2, ahead * kStep);
        }
      }
    }
    __syncwarp();
    place.advance();
  }
}

template <int kTokens, bool kIsNested>
__device__ __forceinline__ void run(const Arguments& arguments, const CUtensorMap& map, const CodeValues& values) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  Shared<kTokens>& shared = *reinterpret_cast<Shared<kTokens>*>(shared_bytes);
  const Item item(arguments);
  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x == kConsumers) {
      // FixedPairTable relies on it. Addresses begin with the block's place in its cluster.
      if (shared_address(shared_bytes) % (1 << 24) != kReservedBytes) __trap();
      for (int i = 0; i < kStages<kTokens>; ++i) {
        init_barrier(shared.full[i], count_writers(arguments));
        init_barrier(shared.empty[i], count_readers(arguments));
      }
      init_barrier(shared.started, 1);
      publish_barriers();
      // All that may be done before the kernels before this one in the stream have ended: they may write the weight.
      if (arguments.is_weight_aligned) {
        for (int step = item.step_begin; step < min(item.step_begin + kFirstSteps, item.step_end); ++step) {
          prefetch_box_to_l2(map, item.first_col / 2, step * kStep);
        }
      }
    }
    __syncwarp();
    arrive_at<kThreads>(kAllThreads);
    cudaGridDependencySynchronize();
    copy_weight(arguments, map, item, shared);
    if (arguments.is_cluster) {
      arrive_at_cluster();
      wait_for_cluster();
      hand_over_to_cluster();
      take_over_from_cluster();
    }
  } else {
    PairTable<__half>::fill<kConsumers>(shared.table, values);
    synchronize<kThreads>(kAllThreads);
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
    Consumer<kTokens, kIsNested>(arguments, item, shared).run();
  }
}

#endif

template <int kTokens, bool kIsNested>
__global__ __launch_bounds__(kThreads, 1) void skinny_grad_kernel(const __grid_constant__ Arguments arguments,
                                                                  const __grid_constant__ CUtensorMap map,
                                                                  const __grid_constant__ CodeValues values) {
#if __CUDA_ARCH__ >= 900
  run<kTokens, kIsNested>(arguments, map, values);
#else
  __trap();  // supports_skinny_grad_sm90 lets no device here that this was not compiled for.
#endif
}

int tokens_of(const Gemm& problem) { return problem.m <= 8 ? 8 : kMaxTokens; }

template <int kTokens>
int clusters_at_once(const void* kernel, int cluster) {
  return count_clusters(kernel, LaunchShape{static_cast<unsigned>(cluster), kThreads, kSharedBytes<kTokens>, cluster});
}

// The same for any number of rows.
int num_parts_of(const Gemm& problem, const Device& device) {
  return best_num_parts(ceil_div(problem.weight.cols, kTileCols), ceil_div(problem.weight.rows, kStep),
                        device.num_multiprocessors);
}

}  // namespace

bool supports_skinny_grad_sm90(const Gemm& problem, const Device& device, std::string* why_not) {
  if (problem.direction != Direction::kGradInput) return refuse(why_not, "expected the input gradient");
  if (problem.dtype != QLORA_BFLOAT16) return refuse(why_not, "expected bfloat16");
  const auto* const any = reinterpret_cast<const void*>(skinny_grad_kernel<8, true>);
  return supports_wgmma(problem, device, kMaxTokens, any, why_not);
}

// Also where a cluster needs none: what a GPU has room for is asked when it runs.
int64_t skinny_grad_sm90_workspace_size(const Gemm& problem, const Device& device) {
  const int parts = num_parts_of(problem, device);
  return parts == 1 ? 0 : parts * problem.m * problem.weight.cols * static_cast<int64_t>(sizeof(float));
}

void skinny_grad_sm90(const Gemm& problem, const Device& device, cudaStream_t stream) {
  const qlora_weight_4bit& weight = problem.weight;
  const Format format = weight.format == QLORA_NF4 ? Format::kNF4 : Format::kFP4;
  Arguments arguments = {};
  arguments.packed = static_cast<const uint8_t*>(weight.packed);
  arguments.scales = scales_of(weight);
  arguments.table_scale_inverse = 1.0f / PairTable<__half>::scale(format);
  arguments.dy = static_cast<const __nv_bfloat16*>(problem.input);
  arguments.dx = static_cast<__nv_bfloat16*>(problem.output);
  arguments.num_parts = num_parts_of(problem, device);
  arguments.num_tiles = static_cast<int>(ceil_div(weight.cols, kTileCols));
  arguments.m = static_cast<int>(problem.m);
  arguments.rows = static_cast<int>(weight.rows);
  arguments.cols = static_cast<int>(weight.cols);
  arguments.is_weight_aligned = is_aligned(weight.packed, 16);
  arguments.is_dy_aligned = is_aligned(problem.input, 16) && weight.rows % 8 == 0;
  arguments.are_scales_aligned = weight.block_size == kBlockCols && weight.cols % kTileCols == 0 &&
                                 is_aligned(weight.absmax_codes, 4) && is_aligned(weight.absmax, 16);
  arguments.is_dx_aligned = is_aligned(problem.output, 8);
  CUtensorMap map = {};
  if (arguments.is_weight_aligned) {
    map = describe_matrix(weight.packed, 1, kTileBytes, weight.rows, weight.cols / 2, kStep);
  }
  dispatch_bool(weight.absmax_codes != nullptr, [&](auto nested) {
    dispatch_constant<8, kMaxTokens>("skinny_grad_sm90", tokens_of(problem), [&](auto tokens) {
      const auto kernel = skinny_grad_kernel<tokens(), nested()>;
      const auto* const pointer = reinterpret_cast<const void*>(kernel);
      allow_shared_bytes(device, pointer, kSharedBytes<tokens()>);
      arguments.is_cluster =
          arguments.num_parts > 1 && arguments.num_parts <= kMaxCluster &&
          arguments.num_tiles <= remember(device, pointer, arguments.num_parts, clusters_at_once<tokens()>);
      const bool has_parts = arguments.num_parts > 1 && !arguments.is_cluster;
      arguments.parts = has_parts ? static_cast<float*>(problem.workspace) : nullptr;
      const auto blocks = static_cast<unsigned>(int64_t{arguments.num_tiles} * arguments.num_parts);
      const int cluster = arguments.is_cluster ? arguments.num_parts : 1;
      launch_early("skinny_grad_kernel", kernel, LaunchShape{blocks, kThreads, kSharedBytes<tokens()>, cluster}, device,
                   stream, arguments, map, PairTable<__half>::values(format));
      if (has_parts) {
        add_parts(arguments.parts, arguments.num_parts, problem.m, weight.cols, nullptr, problem.output, problem.dtype,
                  device, stream);
      }
    });
  });
}

}  // namespace qlora
