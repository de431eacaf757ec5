// The table of CPU kernels. Each instruction set fills one from the same source (kernels_<level>.cpp); kernels() picks
// one when first asked. Arguments are checked by api.cpp; meanings and units are those of qlora.h.
#pragma once

#include <cstdint>

#include "core/low_rank.h"
#include "qlora/qlora.h"

namespace qlora::cpu {

// output [m, output_stride], columns [0, cols) = scaling input [m, depth] R [depth, cols]; zeros up to output_stride.
struct AdapterProduct {
  const void* input;  // of row length input_stride
  int64_t input_stride;
  int64_t depth;
  qlora_dtype dtype;  // of input and output
  const void* right;  // R, or its transpose [cols, depth]
  qlora_dtype right_dtype;
  bool is_right_transposed;
  float scaling;
  void* output;
  int64_t output_stride;
  int64_t cols;
};

// output [rank, cols] = left^T x, or its transpose.
struct AdapterGradient {
  const void* left;  // [m, left_stride]
  int64_t left_stride;
  int64_t rank;
  const void* x;  // [m, cols]
  int64_t m;
  int64_t cols;
  qlora_dtype dtype;  // of left and x
  void* output;
  qlora_dtype output_dtype;
  bool is_output_transposed;
};

// The arguments of qlora_round_columns_nf4_cpu.
struct ColumnRounding {
  const float* values;
  const float* scales;
  const float* inverse;
  const float* coupling;
  const float* previous;
  int64_t num_columns;
  int64_t rows;
  float* rounded;
  float* change;
};

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
                 const LowRank& low_rank, void* y, int64_t row_begin, int64_t row_end);
  void (*linear_grad_input)(const void* dy, int64_t m, qlora_dtype dtype, const qlora_weight_4bit& weight,
                            const LowRank& low_rank, void* dx, int64_t col_begin, int64_t col_end);
  void (*adapter_product)(const AdapterProduct& product, int64_t row_begin, int64_t row_end);
  void (*adapter_gradient)(const AdapterGradient& gradient, int64_t col_begin, int64_t col_end);
  void (*round_columns)(const ColumnRounding& problem, int64_t row_begin, int64_t row_end);
};

extern const Kernels kKernelsPlain;
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;

const Kernels& kernels();

}  // namespace qlora::cpu
