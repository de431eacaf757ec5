// Values of 4-bit codes: round(code_value[code] * scale), the product in fp32, one rounding to T.
//
// The code book lives in registers: lane i of a warp holds code_value[i % 16], and a shuffle fetches a value. A shuffle
// takes its source lane modulo 32 and the book repeats after 16, so a shifted word serves as index without masking.
// H100 shuffles 32 lanes a clock an SM (measured); a dequantisation at HBM speed needs 5.
#pragma once

#include <cstdint>

#include "core/format.h"
#include "cuda/device/numeric.cuh"

namespace qlora {

static __device__ const float kNF4CodesOnDevice[kNumCodes] = {QLORA_NF4_CODES};
static __device__ const float kFP4CodesOnDevice[kNumCodes] = {QLORA_FP4_CODES};

template <Format F>
__device__ __forceinline__ float code_value(uint32_t code) {
  return F == Format::kNF4 ? kNF4CodesOnDevice[code] : kFP4CodesOnDevice[code];
}

// This lane's entry of the code book.
template <Format F>
__device__ __forceinline__ float lane_code_value() {
  return code_value<F>(threadIdx.x % kNumCodes);
}

// kCount consecutive values from `word` (kCount / 2 bytes of memory, the first in its low bits). Every lane of the warp
// must take part.
template <int kCount>
__device__ __forceinline__ void decode(uint32_t word, float lane_value, float scale, float (&values)[kCount]) {
  static_assert(kCount % 2 == 0 && kCount <= 8);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int position = i % 2 == 0 ? 4 * i + 4 : 4 * i - 4;  // even: high nibble of byte i / 2; odd: low nibble
    values[i] = __fmul_rn(__shfl_sync(0xFFFFFFFFu, lane_value, static_cast<int>(word >> position)), scale);
  }
}

// One value by its flat index: the plain form, for whichever shape and alignment.
template <typename T, Format F>
__device__ __forceinline__ T decode_one(const uint8_t* packed, int64_t index, float scale) {
  return from_float<T>(__fmul_rn(code_value<F>(unpack_code(packed[index / 2], index % 2 != 0)), scale));
}

}  // namespace qlora
