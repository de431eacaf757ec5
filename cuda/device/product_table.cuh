// A block's 16 products, code value times scale, rounded to 16 bits, in 8 registers, and 8 of them at a time by the
// codes of a word: byte permutations take 4 codes as they are packed for indices into 8 bytes.
//
//   low_[0], low_[1]    low bytes of the products of codes 0 to 7,   low_[2], low_[3]   of codes 8 to 15
//   high_               high bytes, the same
//
// No shared memory and no shuffle, each of which delivers 32 values a clock and multiprocessor at best: 8 values take
// 12 permutations, 2 masks of them, 4 selections and 2 operations on the word, 20 in all of 64 lanes a clock; the table
// 16 multiplications, 8 roundings and 8 permutations.
#pragma once

#include <cstdint>

#include "core/format.h"
#include "cuda/device/numeric.cuh"

namespace qlora {

// Byte i of the result: that of the 8 bytes of high:low which nibble i of `selector` says; with its top bit set, that
// byte's sign 8 times.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
  return result;
}

template <typename T, Format F>
class ProductTable {
 public:
  __device__ __forceinline__ explicit ProductTable(float scale) {
    constexpr float kCodes[2][kNumCodes] = {{QLORA_NF4_CODES}, {QLORA_FP4_CODES}};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float products[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) products[j] = __fmul_rn(kCodes[static_cast<int>(F)][4 * i + j], scale);
      const uint32_t first = Word<T>::pack(products);
      const uint32_t second = Word<T>::pack(products + 2);
      low_[i] = permute_bytes(first, second, 0x6420);
      high_[i] = permute_bytes(first, second, 0x7531);
    }
  }

  // The products of the 8 codes of `word`, pairs as they lie in memory.
  __device__ __forceinline__ void look_up(uint32_t word, uint32_t (&pairs)[4]) const {
    const uint32_t codes = word & 0x77777777;
    const uint32_t shifted = word << 4;
    // Nibble i of a half word is the code of value i ^ 1: the bytes below are of values 1, 0, 3, 2.
    look_up_four(codes, permute_bytes(shifted, word, 0xD9C8), pairs[0], pairs[1]);
    look_up_four(codes >> 16, permute_bytes(shifted, word, 0xFBEA), pairs[2], pairs[3]);
  }

 private:
  // is_upper: the bytes of ones whose code is 8 or more.
  __device__ __forceinline__ void look_up_four(uint32_t codes, uint32_t is_upper, uint32_t& first,
                                               uint32_t& second) const {
    const uint32_t low =
        select(permute_bytes(low_[0], low_[1], codes), permute_bytes(low_[2], low_[3], codes), is_upper);
    const uint32_t high =
        select(permute_bytes(high_[0], high_[1], codes), permute_bytes(high_[2], high_[3], codes), is_upper);
    first = permute_bytes(low, high, 0x4051);
    second = permute_bytes(low, high, 0x6273);
  }
  static __device__ __forceinline__ uint32_t select(uint32_t lower, uint32_t upper, uint32_t is_upper) {
    return (lower & ~is_upper) | (upper & is_upper);
  }

  uint32_t low_[4];
  uint32_t high_[4];
};

}  // namespace qlora
