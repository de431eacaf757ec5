// packed[i] = code of x[i] * (1 / absmax), absmax = max |x| of the block: two passes over a block, in groups of 32
// values. The largest magnitude is found on the bits of |x| as integers, where NaN > Inf > every finite value, so that
// a NaN wins.
#pragma once

#include "cpu/values.h"

namespace qlora::cpu::QLORA_LEVEL {
namespace {

constexpr uint32_t kInfBits = 0x7F800000, kNaNBits = 0x7FC00000, kMagnitudeBits = 0x7FFFFFFF;

struct Group {
  Floats value[kGroup / kWidth];
};

// The 32 values from i on, zeros past `count` of them.
template <qlora_dtype kType>
inline Group load_group(const void* x, int64_t i, int64_t count) {
  Group group;
  for (int v = 0; v < kGroup / kWidth; ++v) {
    const int64_t left = count - v * kWidth;
    group.value[v] = left >= kWidth ? load_as<kType>(x, i + v * kWidth)
                     : left > 0     ? load_partial_as<kType>(x, i + v * kWidth, left)
                                    : broadcast(0.0f);
  }
  return group;
}

// The number of thresholds (at most 15, ascending) below x: by bisection where a look-up is an instruction, else by
// counting. Table i of the bisection holds the thresholds from 2^i - 1 on.
struct ThresholdCount {
  float padded[kNumCodes + 3];
  Table from[3];

  template <int kNum>
  explicit ThresholdCount(const float (&thresholds)[kNum]) {
    for (int i = 0; i < kNumCodes + 3; ++i) padded[i] = i < kNum ? thresholds[i] : __builtin_inff();
    for (int i = 0; i < 3; ++i) from[i] = load_table(padded + (1 << i) - 1);
  }

  Ints operator()(Floats x) const {
    if constexpr (kHasFastLookUp) {
      Ints count = if_greater(x, broadcast(padded[7]), broadcast_int(8));
      count = bit_or(count, if_greater(x, look_up(from[2], count), broadcast_int(4)));
      count = bit_or(count, if_greater(x, look_up(from[1], count), broadcast_int(2)));
      return bit_or(count, if_greater(x, look_up(from[0], count), broadcast_int(1)));
    } else {
      Ints count = broadcast_int(0);
      for (int i = 0; i < kNumCodes - 1; ++i)
        count = add_ints(count, if_greater(x, broadcast(padded[i]), broadcast_int(1)));
      return count;
    }
  }
};

template <Format kFormat>
struct NearestCode {
  ThresholdCount count = make();

  static ThresholdCount make() {
    if constexpr (kFormat == Format::kNF4) {
      return ThresholdCount(kNF4Thresholds);
    } else {
      return ThresholdCount(kFP4Thresholds);
    }
  }

  Ints operator()(Floats scaled) const {
    if constexpr (kFormat == Format::kNF4) return count(scaled);
    const Ints place = count(as_floats(bit_and(as_ints(scaled), broadcast_int(kMagnitudeBits))));
    // kFP4MagnitudeOrder: bit 2 flips where bit 1 is set.
    const Ints code = bit_xor(place, shift_left<1>(bit_and(place, broadcast_int(2))));
    return bit_or(code, if_greater(broadcast(0.0f), scaled, broadcast_int(8)));
  }
};

constexpr bool order_is_flip() {
  for (int i = 0; i < 8; ++i) {
    if (kFP4MagnitudeOrder[i] != (i ^ (i & 2) << 1)) return false;
  }
  return true;
}
static_assert(order_is_flip());

// The code of +-1 for an infinite value, else that of 0.
template <Format kFormat>
inline Ints code_beside_inf(Floats x) {
  const Floats limit = broadcast(3.4028234663852886e38f), zero = broadcast(0.0f);
  const Floats magnitude = as_floats(bit_and(as_ints(x), broadcast_int(kMagnitudeBits)));
  const Ints one = broadcast_int(kFormat == Format::kNF4 ? 15 : 3);
  const Ints minus_one = broadcast_int(kFormat == Format::kNF4 ? 0 : 11);
  const Ints zero_code = broadcast_int(kZeroCode<kFormat>);
  const Ints all = broadcast_int(0xF);
  const Ints is_infinite = if_greater(magnitude, limit, all);
  const Ints is_negative = if_greater(zero, x, all);
  const Ints signed_one = bit_or(bit_and(is_negative, minus_one), bit_and(bit_xor(is_negative, all), one));
  return bit_or(bit_and(is_infinite, signed_one), bit_and(bit_xor(is_infinite, all), zero_code));
}

template <Format kFormat>
inline void pack_group(const Ints (&codes)[kGroup / kWidth], int64_t count, uint8_t* packed) {
  if (count >= kGroup) return store_codes(codes, packed);
  uint8_t bytes[kGroup / 2];
  store_codes(codes, bytes);
  __builtin_memcpy(packed, bytes, static_cast<size_t>((count + 1) / 2));
}

// code(vector) gives the codes of each vector of the block's values [begin, end).
template <qlora_dtype kType, Format kFormat, class Code>
inline void pack_block(const void* x, int64_t begin, int64_t end, uint8_t* packed, Code code) {
  for (int64_t i = begin; i < end; i += kGroup) {
    const Group group = load_group<kType>(x, i, end - i);
    Ints codes[kGroup / kWidth];
    for (int v = 0; v < kGroup / kWidth; ++v) codes[v] = code(group.value[v]);
    pack_group<kFormat>(codes, end - i, packed + i / 2);
  }
}

template <qlora_dtype kType, Format kFormat>
inline float quantize_block(const void* x, int64_t begin, int64_t end, const NearestCode<kFormat>& nearest_code,
                            uint8_t* packed) {
  Ints largest = broadcast_int(0);
  for (int64_t i = begin; i < end; i += kGroup) {
    const Group group = load_group<kType>(x, i, end - i);
    for (const Floats& value : group.value) {
      largest = max_unsigned(largest, bit_and(as_ints(value), broadcast_int(kMagnitudeBits)));
    }
  }
  const uint32_t absmax_bits = reduce_max(largest);
  float absmax;
  __builtin_memcpy(&absmax, &absmax_bits, sizeof(absmax));

  if (absmax_bits == 0 || absmax_bits > kInfBits) {
    pack_block<kType, kFormat>(x, begin, end, packed, [](Floats) { return broadcast_int(kZeroCode<kFormat>); });
    return absmax_bits == 0 ? 0.0f : __builtin_nanf("");
  }
  if (absmax_bits == kInfBits) {
    pack_block<kType, kFormat>(x, begin, end, packed, [](Floats value) { return code_beside_inf<kFormat>(value); });
    return absmax;
  }
  const BlockScaling scaling = block_scaling(absmax);
  const Floats power = broadcast(scaling.power), reciprocal = broadcast(scaling.reciprocal);
  pack_block<kType, kFormat>(x, begin, end, packed,
                             [&](Floats value) { return nearest_code(multiply(multiply(value, power), reciprocal)); });
  return absmax;
}

template <qlora_dtype kType, Format kFormat>
inline void quantize_blocks(const void* x, int64_t n, int64_t block_size, uint8_t* packed, float* absmax,
                            int64_t block_begin, int64_t block_end) {
  const NearestCode<kFormat> nearest_code;
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t begin = block * block_size, end = smaller(begin + block_size, n);
    absmax[block] = quantize_block<kType, kFormat>(x, begin, end, nearest_code, packed);
  }
}

inline void quantize(const void* x, qlora_dtype dtype, int64_t n, int64_t block_size, qlora_format format,
                     uint8_t* packed, float* absmax, int64_t block_begin, int64_t block_end) {
  with_dtype(dtype, [&](auto type) {
    constexpr qlora_dtype kType = decltype(type)::value;
    const auto run = format == QLORA_NF4 ? quantize_blocks<kType, Format::kNF4> : quantize_blocks<kType, Format::kFP4>;
    run(x, n, block_size, packed, absmax, block_begin, block_end);
  });
}

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
