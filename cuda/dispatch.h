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

template <typename Function>
void dispatch_block_size(int64_t block_size, Function&& f) {
  switch (block_size) {
    case 32:
      return f(std::integral_constant<int, 32>{});
    case 64:
      return f(std::integral_constant<int, 64>{});
    case 128:
      return f(std::integral_constant<int, 128>{});
    case 256:
      return f(std::integral_constant<int, 256>{});
    case 512:
      return f(std::integral_constant<int, 512>{});
    case 1024:
      return f(std::integral_constant<int, 1024>{});
    case 2048:
      return f(std::integral_constant<int, 2048>{});
    case 4096:
      return f(std::integral_constant<int, 4096>{});
  }
  fail(QLORA_INTERNAL_ERROR, "dispatch_block_size: expected a checked block size, got ", block_size);
}

// Rows of x that a fused kernel pads to.
template <typename Function>
void dispatch_tokens(int tokens, Function&& f) {
  switch (tokens) {
    case 16:
      return f(std::integral_constant<int, 16>{});
    case 32:
      return f(std::integral_constant<int, 32>{});
    case 64:
      return f(std::integral_constant<int, 64>{});
    case 128:
      return f(std::integral_constant<int, 128>{});
    case 256:
      return f(std::integral_constant<int, 256>{});
  }
  fail(QLORA_INTERNAL_ERROR, "dispatch_tokens: expected 16 to 256, got ", tokens);
}

}  // namespace qlora
