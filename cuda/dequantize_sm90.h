// dequantize_sm90.cu: dequantize_4bit by few multiprocessors, at a rate of theirs and not of the memory's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/weight.h"
#include "cuda/device_guard.h"

namespace qlora {

// Value (r, c) of a window has flat index first + r * row_stride + c in the weight and r * leading_dimension + c in y.
struct DequantizeFew {
  int64_t first;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t leading_dimension;
  void* y;
  qlora_dtype dtype;
  int multiprocessors;
};
inline constexpr int64_t kDequantizeFewCols = 2048;  // best as many, or a multiple

// Whether it serves such weights on the device: then any window of whole groups of 64 columns at aligned addresses.
bool has_dequantize_sm90(const qlora_weight_4bit& weight, qlora_dtype dtype, const Device& device);
bool supports_dequantize_sm90(const qlora_weight_4bit& weight, const DequantizeFew& window, const Device& device);
void dequantize_sm90(const qlora_weight_4bit& weight, const DequantizeFew& window, const Device& device,
                     cudaStream_t stream);

}  // namespace qlora
