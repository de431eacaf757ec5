// Reads at addresses that no vector load takes.
#pragma once

#include <cstdint>

namespace qlora {

__device__ __forceinline__ uint4 load_16_unaligned_bytes(const uint8_t* address) {
  uint32_t words[4] = {};
  for (int i = 0; i < 16; ++i) words[i / 4] |= static_cast<uint32_t>(address[i]) << i % 4 * 8;
  return {words[0], words[1], words[2], words[3]};
}

}  // namespace qlora
