// The warpgroups of the wide kernels that multiply (wide_sm90.cuh), and those of them that scale weights.
#pragma once

#include <cstdint>

#include "cuda/device/barrier.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/gemm/weight_operand.cuh"
#include "cuda/gemm/wide_work.cuh"

namespace qlora::wide {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Of the warp, in a tile: the first of the 16 columns of the output whose products it has.
__device__ __forceinline__ int first_product_col() {
  return (threadIdx.x / kWarpgroup - 1) % 2 * kHalfTile + threadIdx.x % kWarpgroup / 32 * kProductRows;
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

// A warpgroup that scales weights before it rounds them, so that the tensor cores sum without a pause. It has 64
// columns of the output; of two groups of two warpgroups each takes every second block of 64 values of the depth, and
// the first adds up. Kind has
//   Operand<Config>(shared, table, group)  of a warp: decode(offset, block, a) from the stage `offset` bytes from the
//                                          first, of the step's block `block` + group; load_values(shared, offset, a)
//                                          of one that holds values of the low-rank term
//   store<Config>(arguments, shared, item, sums)
template <typename T, typename Config, typename Kind>
class ScaledConsumer {
 public:
  using Sums = float[Config::kTokens / Config::kCols][Config::kCols / 2];

  __device__ __forceinline__ ScaledConsumer(const Arguments& arguments, Shared& shared, const unsigned char* table,
                                            const unsigned char* input_stages, float* exchange)
      : arguments_(arguments),
        shared_(shared),
        rings_(shared, input_stages),
        group_(keep(kGroups == 1 ? 0 : (threadIdx.x / kWarpgroup - 1) / 2)),
        operand_(shared, table, group()),
        exchange_(keep(shared_address(exchange + threadIdx.x % kPairThreads))) {
    rings_.advance_input(group());
  }

  __device__ __forceinline__ void run() {
    for_each_item<Config>(arguments_, [&](const auto& item) {
#pragma unroll
      for (auto& half : sums_) {
#pragma unroll
        for (float& sum : half) sum = 0.0f;
      }
      rings_.wait_for_weight();
      operand_.decode(rings_.weight_offset(), 0, a_[0]);
#pragma unroll 1
      for (int step = item.step_begin; step < item.step_end; ++step) multiply_step(step + 1 == item.step_end);
      finish_sums();
      rings_.release_input(held_input_);
      held_input_ = -1;
      add_low_rank(item);
      if constexpr (kGroups > 1) exchange_sums();
      if (group() == 0) Kind::template store<Config>(arguments_, shared_, item, sums_);
    });
  }

 private:
  static constexpr int kGroups = Config::kGroups;
  static constexpr int kPairThreads = 2 * kWarpgroup;
  static constexpr int kTurns = kStepInputs / kGroups;  // of a group in a step
  static_assert(kGroups <= 2 && kTurns % 2 == 0);       // a_ is the first again in each step

  __device__ __forceinline__ int group() const { return kGroups == 1 ? 0 : static_cast<int>(group_); }

  // The group's next block of the step, or of the next step, if there is one, the first.
  __device__ __forceinline__ void decode_ahead(int turn, bool is_last, Fragments& a) {
    if (turn == kTurns) {
      rings_.release_weight();
      if (is_last) return;
      rings_.wait_for_weight();
      turn = 0;
    }
    operand_.decode(rings_.weight_offset(), turn * kGroups, a);
  }

  // The fragments of the group's first block of the step are there, and at the end those of the next step's, if there
  // is one.
  __device__ __forceinline__ void multiply_step(bool is_last) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      start_sums(a_[turn % 2], __shfl_sync(0xFFFFFFFFu, rings_.wait_for_input(0), 0));
      wait_for_products<1>();  // those of the block before, whose fragments and stage are free now
      if (held_input_ >= 0) rings_.release_input(held_input_);
      held_input_ = rings_.input_stage(0);
      decode_ahead(turn + 1, is_last, a_[(turn + 1) % 2]);
      rings_.advance_input(kGroups);
    }
  }

  // The low-rank term, if the item has it: its blocks are not scaled.
  __device__ __forceinline__ void add_low_rank(const Item<Config>& item) {
    const int count = num_low_blocks(arguments_, item.part);
#pragma unroll 1
    for (int block = 0; block < count; ++block) {
      rings_.wait_for_weight();
      if (block % kGroups == group()) {
        operand_.load_values(shared_, rings_.weight_offset(), a_[0]);
        const int ahead = block - group();
        start_sums(a_[0], __shfl_sync(0xFFFFFFFFu, rings_.wait_for_input(ahead), 0));
        finish_sums();
        rings_.release_input(rings_.input_stage(ahead));
      }
      rings_.release_weight();
    }
    rings_.advance_input(count);
  }

  __device__ __forceinline__ void start_sums(const Fragments& a, uint32_t input) {
    fence_registers();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int h = 0; h < Config::kTokens / Config::kCols; ++h) {
        multiply<T, Config::kCols>(sums_[h], a[j], input + j * kProductStep + h * (Config::kCols * 128 / 16), true);
      }
    }
    commit_products();
  }
  __device__ __forceinline__ void finish_sums() {
    wait_for_products<0>();
#pragma unroll
    for (auto& half : sums_) hold_registers(half);
  }

  // Adds the sums of the second group to those of the first.
  __device__ __forceinline__ void exchange_sums() {
    static_assert(kGroups == 1 || Config::kTokens == Config::kCols);
    constexpr int kSums = Config::kCols / 2;
    if (group() == 1) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) store_shared_float(exchange_ + i * kPairThreads * 4, sums_[0][i]);
    }
    synchronize<Config::kConsumers>(kAllConsumers);
    if (group() == 0) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums_[0][i] += load_shared_float(exchange_ + i * kPairThreads * 4);
    }
    synchronize<Config::kConsumers>(kAllConsumers);
  }

  const Arguments& arguments_;
  Shared& shared_;
  Rings<Config> rings_;
  uint32_t group_;
  typename Kind::template Operand<Config> operand_;
  uint32_t exchange_;    // shared address
  int held_input_ = -1;  // stage that products in flight may read
  Fragments a_[2];
  Sums sums_;
};

#endif

}  // namespace qlora::wide
