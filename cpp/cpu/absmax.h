// Double quantisation of the scales. One scale stands for 32 values or more, so scalar code is fast enough.
#pragma once

#include "cpu/dequantize.h"
#include "cpu/quantize.h"

namespace qlora::cpu::QLORA_LEVEL {
namespace {

constexpr int kNumNestedCodes = 256;

// The code of x is the number of bounds below it. Between neighbours lies their midpoint; a value on it takes the even
// code, so the bound above an odd code is the float before the midpoint.
struct NestedBounds {
  float bound[kNumNestedCodes - 1];
};

inline float float_before(float x) {
  if (x == 0.0f) return -1.4012984643248171e-45f;
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  bits += x > 0.0f ? -1 : 1;
  __builtin_memcpy(&x, &bits, sizeof(bits));
  return x;
}

inline NestedBounds nested_bounds(const float* nested_code) {
  NestedBounds bounds;
  for (int i = 0; i < kNumNestedCodes - 1; ++i) {
    const float midpoint = (nested_code[i] + nested_code[i + 1]) * 0.5f;
    bounds.bound[i] = i % 2 == 0 ? midpoint : float_before(midpoint);
  }
  return bounds;
}

inline uint8_t nearest_nested_code(const NestedBounds& bounds, float x) {
  int code = 0;
  for (int step = kNumNestedCodes / 2; step > 0; step /= 2) code += x > bounds.bound[code + step - 1] ? step : 0;
  return static_cast<uint8_t>(code);
}

inline void quantize_absmax(const float* absmax, int64_t n, float nested_offset, const float* nested_code,
                            uint8_t* codes, float* nested_absmax, int64_t group_begin, int64_t group_end) {
  const NestedBounds bounds = nested_bounds(nested_code);
  for (int64_t group = group_begin; group < group_end; ++group) {
    const int64_t begin = group * kNestedBlockSize, count = smaller(kNestedBlockSize, n - begin);
    float centered[kNestedBlockSize];
    uint32_t largest_bits = 0;
    for (int64_t i = 0; i < count; ++i) {
      centered[i] = absmax[begin + i] - nested_offset;
      uint32_t bits;
      __builtin_memcpy(&bits, &centered[i], sizeof(bits));
      bits &= kMagnitudeBits;
      largest_bits = bits > largest_bits ? bits : largest_bits;
    }
    if (largest_bits > kInfBits) largest_bits = kNaNBits;
    float largest;
    __builtin_memcpy(&largest, &largest_bits, sizeof(largest));
    nested_absmax[group] = largest;

    const bool is_regular = largest_bits != 0 && largest_bits < kInfBits;
    const BlockScaling scaling = is_regular ? block_scaling(largest) : BlockScaling{0.0f, 0.0f};
    for (int64_t i = 0; i < count; ++i) {
      const float scaled = is_regular ? centered[i] * scaling.power * scaling.reciprocal : 0.0f;
      codes[begin + i] = nearest_nested_code(bounds, scaled);
    }
  }
}

inline void dequantize_absmax(const uint8_t* codes, const float* nested_absmax, const float* nested_code,
                              float nested_offset, float* absmax, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    absmax[i] = nested_scale(nested_code[codes[i]], nested_absmax[i / kNestedBlockSize], nested_offset);
  }
}

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
