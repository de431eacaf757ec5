// Run-time enums to compile-time tags: dispatch_x(value, f) calls f with a tag that names the type or the constant.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/format.h"
#include "core/status.h"
#include "qlora/qlora.h"

namespace qlora {

template <typename T>
struct Type {
  using type = T;
};

template <typename Function>
void dispatch_dtype(qlora_dtype dtype, Function&& f) {
  switch (dtype) {
    case QLORA_FLOAT32:
      return f(Type<float>{});
    case QLORA_FLOAT16:
      return f(Type<__half>{});
    case QLORA_BFLOAT16:
      return f(Type<__nv_bfloat16>{});
  }
  fail(QLORA_INTERNAL_ERROR, "dispatch_dtype: expected a checked dtype, got ", static_cast<int>(dtype));
}

template <typename Function>
void dispatch_format(qlora_format format, Function&& f) {
  switch (format) {
    case QLORA_NF4:
      return f(std::integral_constant<Format, Format::kNF4>{});
    case QLORA_FP4:
      return f(std::integral_constant<Format, Format::kFP4>{});
  }
  fail(QLORA_INTERNAL_ERROR, "dispatch_format: expected a checked format, got ", static_cast<int>(format));
}

template <typename Function>
void dispatch_bool(bool value, Function&& f) {
  if (value) {
    f(std::true_type{});
  } else {
    f(std::false_type{});
  }
}

// f with the one of kValues that `value` is.
template <int... kValues, typename Function>
void dispatch_constant(const char* name, int64_t value, Function&& f) {
  const bool is_known = ((value == kValues && (f(std::integral_constant<int, kValues>{}), true)) || ...);
  if (!is_known) fail(QLORA_INTERNAL_ERROR, name, ": expected a checked value, got ", value);
}

template <typename Function>
void dispatch_block_size(int64_t block_size, Function&& f) {
  dispatch_constant<32, 64, 128, 256, 512, 1024, 2048, 4096>("dispatch_block_size", block_size, f);
}

}  // namespace qlora
