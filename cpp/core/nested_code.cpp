// The 8-bit code book of double-quantised scales, bit-equal to bitsandbytes' signed dynamic map.
//
// Seven decades, 10^-6 to 1: decade d holds +- the midpoints of 2^d equal parts of [0.1, 1], times 10^(d - 6). With 0
// and 1 that is 256 entries; -1 is not among them. The part's ends and the midpoints are rounded to fp32 where
// bitsandbytes rounds them (torch.linspace steps from both ends to the middle, each step one fused multiply-add).
#include <algorithm>
#include <array>
#include <cmath>

#include "qlora/qlora.h"

namespace {

using Code = std::array<float, 256>;

// Element i of `count` + 1 equally spaced values from 0.1 to 1.
float part_end(int i, int count) {
  const float begin = 0.1f, end = 1.0f;
  const float step = (end - begin) / static_cast<float>(count);
  return i < (count + 1) / 2 ? std::fma(step, static_cast<float>(i), begin)
                             : std::fma(-step, static_cast<float>(count - i), end);
}

Code make_code() {
  constexpr float kDecades[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  Code code{};
  size_t size = 0;
  for (int decade = 0; decade < 7; ++decade) {
    const int count = 1 << decade;
    for (int i = 0; i < count; ++i) {
      const float midpoint = (part_end(i, count) + part_end(i + 1, count)) / 2.0f;
      const float value = kDecades[decade] * midpoint;
      code[size++] = value;
      code[size++] = -value;
    }
  }
  code[size++] = 0.0f;
  code[size++] = 1.0f;
  std::sort(code.begin(), code.end());
  return code;
}

}  // namespace

const float* qlora_nested_code(void) {
  static const Code code = make_code();
  return code.data();
}
