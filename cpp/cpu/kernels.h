// The table of CPU kernels. Each instruction set fills one from the same source (kernels_<level>.cpp); kernels() picks
// one when first asked. Arguments are checked by api.cpp; meanings and units are those of qlora.h.
#pragma once

#include <cstdint>

#include "qlora/qlora.h"

namespace qlora::cpu {

struct Kernels {
  const char* name;

  void (*quantize)(const void* x, qlora_dtype dtype, int64_t n, int64_t block_size, qlora_format format,
                   uint8_t* packed, float* absmax, int64_t block_begin, int64_t block_end);
  void (*dequantize)(const qlora_weight_4bit& weight, void* y, qlora_dtype dtype, int64_t block_begin,
                     int64_t block_end);
  void (*quantize_absmax)(const float* absmax, int64_t n, float nested_offset, const float* nested_code, uint8_t* codes,
                          float* nested_absmax, int64_t group_begin, int64_t group_end);
  void (*dequantize_absmax)(const uint8_t* codes, const float* nested_absmax, const float* nested_code,
                            float nested_offset, float* absmax, int64_t begin, int64_t end);
  void (*embedding)(const int64_t* indices, const qlora_weight_4bit& weight, void* y, qlora_dtype dtype, int64_t begin,
                    int64_t end);
  void (*linear)(const void* x, int64_t m, qlora_dtype dtype, const qlora_weight_4bit& weight, const void* bias,
                 void* y, int64_t row_begin, int64_t row_end);
  void (*linear_grad_input)(const void* dy, int64_t m, qlora_dtype dtype, const qlora_weight_4bit& weight, void* dx,
                            int64_t col_begin, int64_t col_end);
};

extern const Kernels kKernelsPlain;
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;

const Kernels& kernels();

}  // namespace qlora::cpu
