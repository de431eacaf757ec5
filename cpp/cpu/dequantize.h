// y[i] = round(code_book[packed[i]] * scale of i's block). The 16 products of a block are formed once, in the table; a
// value is then a look-up.
#pragma once

#include "cpu/values.h"

namespace qlora::cpu::QLORA_LEVEL {
namespace {

// Product and sum are rounded separately: the build turns contraction off (sources.cmake).
inline float nested_scale(float code_value, float nested_absmax, float nested_offset) {
  const float product = code_value * nested_absmax;
  return product + nested_offset;
}
inline float block_scale(const qlora_weight_4bit& weight, int64_t block) {
  if (weight.absmax_codes == nullptr) return weight.absmax[block];
  return nested_scale(weight.nested_code[weight.absmax_codes[block]], weight.nested_absmax[block / kNestedBlockSize],
                      *weight.nested_offset);
}

inline float code_value(const qlora_weight_4bit& weight, int64_t i) {
  const uint8_t byte = weight.packed[i / 2];
  return code_book(weight.format)[i % 2 == 0 ? byte >> 4 : byte & 0xF];
}

template <qlora_dtype kType>
inline void store_one(void* y, int64_t i, float value) {
  store_partial_as<kType>(y, i, broadcast(value), 1);
}

// Flat values [begin, end) of the weight, any range, to y[0, end - begin).
template <qlora_dtype kType>
inline void dequantize_values(const qlora_weight_4bit& weight, int64_t begin, int64_t end, void* y) {
  const Table code_values = load_table(code_book(weight.format));
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(weight.block_size));
  for (int64_t i = begin; i < end;) {
    const int64_t block = i >> shift;
    const int64_t stop = smaller((block + 1) << shift, end);
    const float scale = block_scale(weight, block);
    const Table table = scale_table(code_values, scale);
    if (i % 2 != 0) {
      store_one<kType>(y, i - begin, code_value(weight, i) * scale);
      ++i;
    }
    for (; i + kWidth <= stop; i += kWidth) {
      store_as<kType>(y, i - begin, look_up(table, load_codes(weight.packed + i / 2)));
    }
    if (i < stop) {
      uint8_t bytes[kWidth / 2] = {};
      __builtin_memcpy(bytes, weight.packed + i / 2, static_cast<size_t>((stop - i + 1) / 2));
      store_partial_as<kType>(y, i - begin, look_up(table, load_codes(bytes)), stop - i);
      i = stop;
    }
  }
}

inline void dequantize(const qlora_weight_4bit& weight, void* y, qlora_dtype dtype, int64_t block_begin,
                       int64_t block_end) {
  const int64_t begin = block_begin * weight.block_size;
  const int64_t end = smaller(block_end * weight.block_size, weight.rows * weight.cols);
  with_dtype(dtype, [&](auto type) {
    constexpr qlora_dtype kType = decltype(type)::value;
    dequantize_values<kType>(weight, begin, end, at<kType>(y, begin));
  });
}

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
