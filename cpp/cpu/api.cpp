// The CPU half of the C interface: check the arguments, then call the kernel.
#include <limits>

#include "core/low_rank.h"
#include "core/status.h"
#include "core/weight.h"
#include "cpu/kernels.h"

namespace qlora::cpu {
namespace {

constexpr int64_t kMaxValues = std::numeric_limits<int64_t>::max() / 8;

void check_count(const char* op, const char* argument, int64_t count) {
  expect(count >= 0 && count <= kMaxValues, op, ": ", argument, ": expected 0 to ", kMaxValues, ", got ", count);
}

void linear(const char* op, const void* x, int64_t m, qlora_dtype dtype, const qlora_weight_4bit* weight,
            const void* bias, const LowRank& low_rank, void* y, int64_t row_begin, int64_t row_end) {
  check_weight(op, weight);
  check_dtype(op, dtype);
  check_count(op, "m", m);
  check_range(op, "rows of the weight", row_begin, row_end, weight->rows);
  if (m == 0 || row_begin == row_end) return;
  if (weight->cols != 0) check_pointer(op, "x", x);
  check_pointer(op, "y", y);
  kernels().linear(x, m, dtype, *weight, bias, low_rank, y, row_begin, row_end);
}

void linear_grad_input(const char* op, const void* dy, int64_t m, qlora_dtype dtype, const qlora_weight_4bit* weight,
                       const LowRank& low_rank, void* dx, int64_t col_begin, int64_t col_end) {
  check_weight(op, weight);
  check_dtype(op, dtype);
  check_count(op, "m", m);
  check_range(op, "columns of the weight", col_begin, col_end, weight->cols);
  if (m == 0 || col_begin == col_end) return;
  if (weight->rows != 0) check_pointer(op, "dy", dy);
  check_pointer(op, "dx", dx);
  kernels().linear_grad_input(dy, m, dtype, *weight, low_rank, dx, col_begin, col_end);
}

// The update of an adapter with the matrix `right` of it.
LowRank low_rank_of(const char* op, const qlora_lora* lora, const void* left, const char* argument, const void* right,
                    qlora_dtype right_dtype) {
  check_rank(op, lora->rank);
  check_dtype(op, right_dtype);
  check_pointer(op, "left", left);
  check_pointer(op, argument, right);
  return {left, left_columns(lora->rank), right, right_dtype, lora->rank};
}

}  // namespace
}  // namespace qlora::cpu

using namespace qlora;

qlora_status qlora_quantize_4bit_cpu(const void* x, qlora_dtype dtype, int64_t n, int64_t block_size,
                                     qlora_format format, uint8_t* packed, float* absmax, int64_t block_begin,
                                     int64_t block_end) {
  return guarded([&] {
    const char* op = "quantize_4bit";
    check_dtype(op, dtype);
    check_format(op, format);
    check_block_size(op, block_size);
    cpu::check_count(op, "n", n);
    check_range(op, "blocks", block_begin, block_end, num_blocks(n, block_size));
    if (block_begin == block_end) return;
    check_pointer(op, "x", x);
    check_pointer(op, "packed", packed);
    check_pointer(op, "absmax", absmax);
    cpu::kernels().quantize(x, dtype, n, block_size, format, packed, absmax, block_begin, block_end);
  });
}

qlora_status qlora_dequantize_4bit_cpu(const qlora_weight_4bit* weight, void* y, qlora_dtype dtype, int64_t block_begin,
                                       int64_t block_end) {
  return guarded([&] {
    const char* op = "dequantize_4bit";
    check_weight(op, weight);
    check_dtype(op, dtype);
    check_range(op, "blocks", block_begin, block_end, num_blocks(*weight));
    if (block_begin == block_end) return;
    check_pointer(op, "y", y);
    cpu::kernels().dequantize(*weight, y, dtype, block_begin, block_end);
  });
}

qlora_status qlora_quantize_absmax_cpu(const float* absmax, int64_t n, const float* nested_offset,
                                       const float* nested_code, uint8_t* codes, float* nested_absmax,
                                       int64_t group_begin, int64_t group_end) {
  return guarded([&] {
    const char* op = "quantize_absmax";
    cpu::check_count(op, "n", n);
    check_range(op, "groups", group_begin, group_end, num_nested_blocks(n));
    if (group_begin == group_end) return;
    check_pointer(op, "absmax", absmax);
    check_pointer(op, "nested_offset", nested_offset);
    check_pointer(op, "nested_code", nested_code);
    check_pointer(op, "codes", codes);
    check_pointer(op, "nested_absmax", nested_absmax);
    cpu::kernels().quantize_absmax(absmax, n, *nested_offset, nested_code, codes, nested_absmax, group_begin,
                                   group_end);
  });
}

qlora_status qlora_dequantize_absmax_cpu(const uint8_t* codes, int64_t n, const float* nested_absmax,
                                         const float* nested_code, const float* nested_offset, float* absmax,
                                         int64_t begin, int64_t end) {
  return guarded([&] {
    const char* op = "dequantize_absmax";
    cpu::check_count(op, "n", n);
    check_range(op, "scales", begin, end, n);
    if (begin == end) return;
    check_pointer(op, "codes", codes);
    check_pointer(op, "nested_absmax", nested_absmax);
    check_pointer(op, "nested_code", nested_code);
    check_pointer(op, "nested_offset", nested_offset);
    check_pointer(op, "absmax", absmax);
    cpu::kernels().dequantize_absmax(codes, nested_absmax, nested_code, *nested_offset, absmax, begin, end);
  });
}

qlora_status qlora_round_columns_nf4_cpu(const float* values, const float* scales, const float* inverse,
                                         const float* coupling, const float* previous, int64_t num_columns,
                                         int64_t rows, float* rounded, float* change, int64_t row_begin,
                                         int64_t row_end) {
  return guarded([&] {
    const char* op = "round_columns_nf4";
    check_round_columns(op, num_columns);
    cpu::check_count(op, "rows", rows);
    check_range(op, "rows", row_begin, row_end, rows);
    if (row_begin == row_end || num_columns == 0) return;
    check_pointer(op, "values", values);
    check_pointer(op, "scales", scales);
    check_pointer(op, "inverse", inverse);
    check_pointer(op, "coupling", coupling);
    check_pointer(op, "rounded", rounded);
    check_pointer(op, "change", change);
    cpu::kernels().round_columns({values, scales, inverse, coupling, previous, num_columns, rows, rounded, change},
                                 row_begin, row_end);
  });
}

qlora_status qlora_linear_4bit_cpu(const void* x, int64_t m, qlora_dtype dtype, const qlora_weight_4bit* weight,
                                   const void* bias, void* y, int64_t row_begin, int64_t row_end) {
  return guarded([&] { cpu::linear("linear_4bit", x, m, dtype, weight, bias, {}, y, row_begin, row_end); });
}

qlora_status qlora_linear_4bit_grad_input_cpu(const void* dy, int64_t m, qlora_dtype dtype,
                                              const qlora_weight_4bit* weight, void* dx, int64_t col_begin,
                                              int64_t col_end) {
  return guarded(
      [&] { cpu::linear_grad_input("linear_4bit_grad_input", dy, m, dtype, weight, {}, dx, col_begin, col_end); });
}

qlora_status qlora_adapter_product_cpu(const void* input, int64_t input_stride, int64_t m, int64_t depth,
                                       qlora_dtype dtype, const void* right, qlora_dtype right_dtype,
                                       int is_right_transposed, float scaling, void* output, int64_t output_stride,
                                       int64_t cols, int64_t row_begin, int64_t row_end) {
  return guarded([&] {
    const char* op = "adapter_product";
    check_dtype(op, dtype);
    check_dtype(op, right_dtype);
    cpu::check_count(op, "m", m);
    cpu::check_count(op, "depth", depth);
    cpu::check_count(op, "cols", cols);
    expect(input_stride >= depth, op, ": input_stride: expected at least ", depth, ", got ", input_stride);
    expect(output_stride >= cols, op, ": output_stride: expected at least ", cols, ", got ", output_stride);
    check_range(op, "rows", row_begin, row_end, m);
    if (row_begin == row_end || output_stride == 0) return;
    if (depth != 0) check_pointer(op, "input", input);
    if (depth != 0 && cols != 0) check_pointer(op, "right", right);
    check_pointer(op, "output", output);
    cpu::kernels().adapter_product({input, input_stride, depth, dtype, right, right_dtype, is_right_transposed != 0,
                                    scaling, output, output_stride, cols},
                                   row_begin, row_end);
  });
}

qlora_status qlora_lora_linear_4bit_cpu(const void* x, int64_t m, qlora_dtype dtype, const qlora_weight_4bit* weight,
                                        const void* bias, const qlora_lora* lora, const void* left, void* y,
                                        int64_t row_begin, int64_t row_end) {
  return guarded([&] {
    const char* op = "lora_linear_4bit";
    check_pointer(op, "lora", lora);
    const LowRank low_rank = cpu::low_rank_of(op, lora, left, "lora.b", lora->b, lora->b_dtype);
    cpu::linear(op, x, m, dtype, weight, bias, low_rank, y, row_begin, row_end);
  });
}

qlora_status qlora_lora_linear_4bit_backward_cpu(const void* dy, int64_t m, qlora_dtype dtype,
                                                 const qlora_weight_4bit* weight, const qlora_lora* lora,
                                                 const void* dleft, void* dx, int64_t col_begin, int64_t col_end) {
  return guarded([&] {
    const char* op = "lora_linear_4bit_backward";
    check_pointer(op, "lora", lora);
    const LowRank low_rank = cpu::low_rank_of(op, lora, dleft, "lora.a", lora->a, lora->a_dtype);
    cpu::linear_grad_input(op, dy, m, dtype, weight, low_rank, dx, col_begin, col_end);
  });
}

qlora_status qlora_adapter_gradient_cpu(const void* left, int64_t rank, const void* x, int64_t m, int64_t cols,
                                        qlora_dtype dtype, void* output, qlora_dtype output_dtype,
                                        int is_output_transposed, int64_t col_begin, int64_t col_end) {
  return guarded([&] {
    const char* op = "adapter_gradient";
    check_rank(op, rank);
    check_dtype(op, dtype);
    check_dtype(op, output_dtype);
    cpu::check_count(op, "m", m);
    cpu::check_count(op, "cols", cols);
    check_range(op, "columns", col_begin, col_end, cols);
    if (col_begin == col_end) return;
    if (m != 0) check_pointer(op, "left", left);
    if (m != 0) check_pointer(op, "x", x);
    check_pointer(op, "output", output);
    cpu::kernels().adapter_gradient(
        {left, left_columns(rank), rank, x, m, cols, dtype, output, output_dtype, is_output_transposed != 0}, col_begin,
        col_end);
  });
}

qlora_status qlora_embedding_4bit_cpu(const int64_t* indices, int64_t num_indices, const qlora_weight_4bit* weight,
                                      void* y, qlora_dtype dtype, int64_t begin, int64_t end) {
  return guarded([&] {
    const char* op = "embedding_4bit";
    check_weight(op, weight);
    check_dtype(op, dtype);
    cpu::check_count(op, "num_indices", num_indices);
    check_range(op, "indices", begin, end, num_indices);
    if (begin == end) return;
    check_pointer(op, "indices", indices);
    for (int64_t i = begin; i < end; ++i) {
      expect(indices[i] >= 0 && indices[i] < weight->rows, op, ": indices[", i, "]: expected 0 <= index < ",
             weight->rows, ", got ", indices[i]);
    }
    if (weight->cols == 0) return;
    check_pointer(op, "y", y);
    cpu::kernels().embedding(indices, *weight, y, dtype, begin, end);
  });
}
