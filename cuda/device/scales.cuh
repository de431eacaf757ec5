// Block scales of a weight, plain or double-quantised:
//   absmax[b] = nested_code[codes[b]] * nested_absmax[b / 256] + nested_offset, product and sum rounded separately.
#pragma once

#include <cstdint>

#include "core/format.h"

namespace qlora {

struct Scales {
  const float* absmax;         // [num_blocks] or null
  const uint8_t* codes;        // [num_blocks] or null
  const float* nested_absmax;  // [ceil(num_blocks / 256)] with codes
  const float* nested_code;    // [256] with codes
  const float* nested_offset;  // [1] with codes
  int log2_block_size;
};

__device__ __forceinline__ float decode_scale(uint8_t code, const float* nested_code, float nested_absmax,
                                              float nested_offset) {
  return __fadd_rn(__fmul_rn(__ldg(nested_code + code), nested_absmax), nested_offset);
}

// The scale of the value at a flat index.
template <bool kIsNested>
__device__ __forceinline__ float load_scale(const Scales& scales, int64_t index) {
  const int64_t block = index >> scales.log2_block_size;
  if constexpr (!kIsNested) return __ldg(scales.absmax + block);
  return decode_scale(__ldg(scales.codes + block), scales.nested_code,
                      __ldg(scales.nested_absmax + block / kNestedBlockSize), __ldg(scales.nested_offset));
}

__device__ __forceinline__ float load_scale(const Scales& scales, int64_t index) {
  return scales.codes != nullptr ? load_scale<true>(scales, index) : load_scale<false>(scales, index);
}

}  // namespace qlora
