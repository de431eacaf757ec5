// Adding up the parts that adapter_pass.cu wrote.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/device_guard.h"
#include "cuda/lora/lora.h"

namespace qlora::lora {

struct Parts {
  const float* values;  // [count, rows or columns, padded_rank]
  int count;
  int padded_rank;
};

// output [m, stride] = scaling times the sum of the parts, in their order, with zeros from column `rank` on.
void finish_projection(const Parts& parts, int64_t m, int64_t rank, float scaling, void* output, int64_t stride,
                       qlora_dtype dtype, const Device& device, cudaStream_t stream);

// Columns [first_col, first_col + cols) of the gradient, which has total_cols, = the sum of the parts, in their order.
void finish_gradient(const Parts& parts, int64_t cols, int64_t rank, const AdapterMatrix& gradient, int64_t first_col,
                     int64_t total_cols, const Device& device, cudaStream_t stream);

}  // namespace qlora::lora
