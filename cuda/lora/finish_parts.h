// Adding up the parts that adapter_pass.cu wrote.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device_guard.h"
#include "cuda/lora/lora.h"

namespace qlora::lora {

struct Parts {
  const float* values;  // [count, rows or columns, padded_rank]; null: there are none to be added up
  int count;
  int padded_rank;
};

// output [m, stride] = scaling times the sum of the parts, in their order, with zeros from column `rank` on.
struct ProjectionParts {
  Parts parts;
  int64_t m;
  float scaling;
  void* output;
  int64_t stride;
};

// target [rank, cols] = the sum of the parts, in their order.
struct GradientParts {
  Parts parts;
  int64_t cols;
  Narrow target;
};

// dtype: of the projection.
void finish_parts(const ProjectionParts& projection, const GradientParts& gradient, int64_t rank, qlora_dtype dtype,
                  const Device& device, cudaStream_t stream);

}  // namespace qlora::lora
