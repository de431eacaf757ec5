// A weight as kernels take it. Only .cu files include this.
#pragma once

#include "core/weight.h"
#include "cuda/device/scales.cuh"

namespace qlora {

// Of a power of two.
inline int log2_of(int64_t block_size) {
  int log2 = 0;
  while (int64_t{1} << log2 < block_size) ++log2;
  return log2;
}

inline Scales scales_of(const qlora_weight_4bit& weight) {
  return {weight.absmax,      weight.absmax_codes,  weight.nested_absmax,
          weight.nested_code, weight.nested_offset, log2_of(weight.block_size)};
}

inline bool is_aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace qlora
