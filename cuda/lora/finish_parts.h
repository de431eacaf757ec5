// Adding up the parts that adapter_pass.cu wrote.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device_guard.h"
#include "cuda/lora/lora.h"

namespace qlora::lora {

// output [m, stride] = scaling times the sum of the parts, in their order, with zeros from column `rank` on.
struct ProjectionParts {
  const float* values;  // [count, m, padded_rank]; null: there are none to be added up
  int count;
  int padded_rank;
  int64_t m;
  float scaling;
  void* output;
  int64_t stride;
};

// target [rank, cols] = the sum of the parts of each group of columns, in their order.
struct GradientParts {
  const float* values;  // [blocks of ranks, num_slots, group_cols, ranks]; null: there are none
  int64_t cols;
  int group_cols;
  int ranks;
  int num_slots;
  // Which shares have a part of a group, and where: slot_of (adapter_share.cuh)
  int row_tiles;
  int units_per_share;
  int slots_per_group;
  Narrow target;
};

// dtype: of the projection.
void finish_parts(const ProjectionParts& projection, const GradientParts& gradient, int64_t rank, qlora_dtype dtype,
                  const Device& device, cudaStream_t stream);

}  // namespace qlora::lora
