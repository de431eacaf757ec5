// The warps of the wide kernels that copy (wide_sm90.cuh).
#pragma once

#include <cstdint>

#include "cuda/device/barrier.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/device/tensor_copy.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/gemm/step_scales.cuh"
#include "cuda/gemm/wide_work.cuh"

namespace qlora::wide {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

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
//   copy_plainly(arguments, item.first, step, bytes)
//   copy_right(arguments, item.first, block, bytes), of the right operand of the low-rank term
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
    for (int block = 0; block < num_low_blocks(arguments, item.part); ++block) {
      wait(shared.weight_empty[place.stage()], place.free_parity());
      Kind::copy_right(arguments, item.first, block, shared.weight[place.stage()].bytes);
      arrive(shared.weight_full[place.stage()]);
      place.advance();
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
    for (int block = 0; block < num_low_blocks(arguments, item.part); ++block) {
      wait(shared.weight_empty[place.stage()], place.free_parity());
      arrive(shared.weight_full[place.stage()]);
      place.advance();
    }
  });
}

// Warp 2: the input. The 16-byte piece p of token t lies at place p ^ t % 8 of its 128 bytes.
template <typename Config>
__device__ __forceinline__ void copy_input(const Arguments& arguments, const Maps& maps, Shared& shared,
                                           unsigned char* stages) {
  constexpr int kShare = Config::kTokens / Config::kCluster;  // tokens that this block copies, to all of its cluster
  const int lane = threadIdx.x % 32;
  const int rank = static_cast<int>(blockIdx.x) % Config::kCluster;
  RingPlace<Config::kInputStages> place;
  for_each_item<Config>(arguments, [&](const auto& item) {
    // Behind the last of the depth zeros: a step has all stages of the input.
    for (int begin = item.step_begin * kStep; begin < item.step_end * kStep; begin += kInputDepth) {
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
    for (int block = 0; block < num_low_blocks(arguments, item.part); ++block) {
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
#endif

}  // namespace qlora::wide
