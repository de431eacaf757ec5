// The 8-bit code of a scaled scale: the entry of an ascending code book nearest to x. Of two entries equally near, the
// one with the even index is taken, which is what bitsandbytes' search does; midpoints are fp32.
#pragma once

#include <cstdint>

namespace qlora {

inline constexpr int kNumNestedCodes = 256;

__device__ __forceinline__ uint8_t nearest_nested_code(float x, const float* code) {
  int above = 0;  // first entry that is not below x
#pragma unroll
  for (int step = kNumNestedCodes / 2; step > 0; step /= 2) {
    if (code[above + step - 1] < x) above += step;
  }
  if (above == 0) return 0;
  // The eight steps reach 255 at most; beyond the last entry the nearest is the last, which the comparison below finds.
  const int below = above - 1;
  const float midpoint = (code[below] + code[above]) * 0.5f;
  const bool is_above = below % 2 == 0 ? x > midpoint : x >= midpoint;
  return static_cast<uint8_t>(is_above ? above : below);
}

}  // namespace qlora
