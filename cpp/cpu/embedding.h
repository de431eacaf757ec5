// y[i, :] = row indices[i] of the dequantised weight.
#pragma once

#include "cpu/dequantize.h"

namespace qlora::cpu::QLORA_LEVEL {
namespace {

inline void embedding(const int64_t* indices, const qlora_weight_4bit& weight, void* y, qlora_dtype dtype,
                      int64_t begin, int64_t end) {
  with_dtype(dtype, [&](auto type) {
    constexpr qlora_dtype kType = decltype(type)::value;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = indices[i] * weight.cols;
      dequantize_values<kType>(weight, first, first + weight.cols, at<kType>(y, i * weight.cols));
    }
  });
}

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
