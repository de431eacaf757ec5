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

// Scales by the flat index of a value; what all share is loaded once.
template <bool kIsNested>
class ScaleReader {
 public:
  __device__ __forceinline__ explicit ScaleReader(const Scales& scales) : scales_(scales) {
    if constexpr (kIsNested) nested_offset_ = __ldg(scales.nested_offset);
  }
  __device__ __forceinline__ float load(int64_t index) const {
    const int64_t block = index >> scales_.log2_block_size;
    if constexpr (!kIsNested) return __ldg(scales_.absmax + block);
    return decode_scale(__ldg(scales_.codes + block), scales_.nested_code,
                        __ldg(scales_.nested_absmax + (block >> kLog2NestedBlockSize)), nested_offset_);
  }

 private:
  static constexpr int kLog2NestedBlockSize = 8;
  static_assert(1 << kLog2NestedBlockSize == kNestedBlockSize);
  const Scales& scales_;
  float nested_offset_ = 0.0f;
};

// The same for kernels that are not specialised.
__device__ __forceinline__ float load_scale(const Scales& scales, int64_t index) {
  return scales.codes != nullptr ? ScaleReader<true>(scales).load(index) : ScaleReader<false>(scales).load(index);
}

}  // namespace qlora
