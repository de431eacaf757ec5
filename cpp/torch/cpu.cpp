// The operators on CPU: check, allocate, call, spread over torch's threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <mutex>
#include <tuple>

#include "torch/tensors.h"

namespace qlora::torch_ops {
namespace {

// Work worth a thread of its own, in values dequantised or multiplied. An OpenMP region costs about 5 us.
constexpr int64_t kValuesPerThread = 32768;

// Runs call(begin, end) over [0, num_units) in parallel; the first failure of any thread becomes the exception.
template <typename Call>
void for_units(int64_t num_units, int64_t values_per_unit, const Call& call) {
  std::mutex mutex;
  std::string failure;
  const int64_t grain = std::max<int64_t>(1, kValuesPerThread / std::max<int64_t>(1, values_per_unit));
  torch::stable::parallel_for(0, num_units, grain, [&](int64_t begin, int64_t end) {
    if (call(begin, end) == QLORA_OK) return;
    const std::lock_guard<std::mutex> lock(mutex);  // qlora_last_error() is the text of this thread alone
    if (failure.empty()) failure = qlora_last_error();
  });
  STD_TORCH_CHECK(failure.empty(), "qlora.", failure);
}

std::tuple<Tensor, Tensor> quantize_4bit(Tensor input, int64_t block_size, std::string quant_type) {
  const char* op = "quantize_4bit";
  check_block_size(op, block_size);
  const qlora_format format = format_of(op, quant_type);
  const qlora_dtype dtype = dtype_of(op, "input", input.scalar_type());
  const int64_t n = input.numel();
  const Tensor x = checked(op, "input", input, std::nullopt, input, n);
  Tensor packed = empty_on_device_of(x, {num_packed_bytes(n), 1}, ScalarType::Byte);
  Tensor absmax = empty_on_device_of(x, {num_blocks(n, block_size)}, ScalarType::Float);
  auto* packed_out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  auto* absmax_out = static_cast<float*>(absmax.mutable_data_ptr());
  for_units(num_blocks(n, block_size), block_size, [&](int64_t begin, int64_t end) {
    return qlora_quantize_4bit_cpu(x.const_data_ptr(), dtype, n, block_size, format, packed_out, absmax_out, begin,
                                   end);
  });
  return {packed, absmax};
}

Tensor dequantize_4bit(Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                       std::optional<Tensor> nested_quant_map, std::optional<Tensor> nested_offset, Shape shape,
                       int64_t block_size, std::string quant_type, ScalarType dtype) {
  const char* op = "dequantize_4bit";
  const qlora_dtype out_dtype = dtype_of(op, "dtype", dtype);
  const Weight weight(op, packed, absmax, nested_absmax, nested_quant_map, nested_offset, shape, block_size, quant_type,
                      packed);
  Tensor output = empty_on_device_of(packed, shape, dtype);
  void* out = output.mutable_data_ptr();
  for_units(num_blocks(weight.num_values(), block_size), block_size, [&](int64_t begin, int64_t end) {
    return qlora_dequantize_4bit_cpu(weight.get(), out, out_dtype, begin, end);
  });
  return output;
}

std::tuple<Tensor, Tensor> quantize_absmax(Tensor absmax, Tensor nested_offset, Tensor nested_quant_map) {
  const char* op = "quantize_absmax";
  const int64_t n = absmax.numel();
  const Tensor x = checked(op, "absmax", absmax, ScalarType::Float, absmax, n);
  const Tensor offset = checked(op, "nested_offset", nested_offset, ScalarType::Float, absmax, 1);
  const Tensor map = checked(op, "nested_quant_map", nested_quant_map, ScalarType::Float, absmax, 256);
  Tensor codes = empty_on_device_of(x, {n}, ScalarType::Byte);
  Tensor nested_absmax = empty_on_device_of(x, {num_nested_blocks(n)}, ScalarType::Float);
  auto* codes_out = static_cast<uint8_t*>(codes.mutable_data_ptr());
  auto* nested_out = static_cast<float*>(nested_absmax.mutable_data_ptr());
  for_units(num_nested_blocks(n), kNestedBlockSize, [&](int64_t begin, int64_t end) {
    return qlora_quantize_absmax_cpu(x.const_data_ptr<float>(), n, offset.const_data_ptr<float>(),
                                     map.const_data_ptr<float>(), codes_out, nested_out, begin, end);
  });
  return {codes, nested_absmax};
}

Tensor dequantize_absmax(Tensor codes, Tensor nested_absmax, Tensor nested_quant_map, Tensor nested_offset) {
  const char* op = "dequantize_absmax";
  const int64_t n = codes.numel();
  const Tensor q = checked(op, "absmax", codes, ScalarType::Byte, codes, n);
  const Tensor scales = checked(op, "nested_absmax", nested_absmax, ScalarType::Float, codes, num_nested_blocks(n));
  const Tensor map = checked(op, "nested_quant_map", nested_quant_map, ScalarType::Float, codes, 256);
  const Tensor offset = checked(op, "nested_offset", nested_offset, ScalarType::Float, codes, 1);
  Tensor absmax = empty_on_device_of(q, {n}, ScalarType::Float);
  auto* out = static_cast<float*>(absmax.mutable_data_ptr());
  for_units(n, 1, [&](int64_t begin, int64_t end) {
    return qlora_dequantize_absmax_cpu(q.const_data_ptr<uint8_t>(), n, scales.const_data_ptr<float>(),
                                       map.const_data_ptr<float>(), offset.const_data_ptr<float>(), out, begin, end);
  });
  return absmax;
}

std::tuple<Tensor, Tensor> round_columns_nf4(Tensor values, Tensor scales, Tensor inverse, Tensor coupling,
                                             std::optional<Tensor> previous) {
  const ColumnRounding problem(values, scales, inverse, coupling, previous);
  auto* rounded = problem.rounded.mutable_data_ptr<float>();
  auto* change = problem.change.mutable_data_ptr<float>();
  for_units(problem.rows, problem.num_columns * problem.num_columns, [&](int64_t begin, int64_t end) {
    return qlora_round_columns_nf4_cpu(problem.values.const_data_ptr<float>(), problem.scales.const_data_ptr<float>(),
                                       problem.inverse.const_data_ptr<float>(),
                                       problem.coupling.const_data_ptr<float>(), problem.previous_data(),
                                       problem.num_columns, problem.rows, rounded, change, begin, end);
  });
  return {problem.rounded, problem.change};
}

Tensor linear_4bit(Tensor input, Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                   std::optional<Tensor> nested_quant_map, std::optional<Tensor> nested_offset,
                   std::optional<Tensor> bias, Shape shape, int64_t block_size, std::string quant_type) {
  const char* op = "linear_4bit";
  check_matrix(op, shape);
  const Weight weight(op, packed, absmax, nested_absmax, nested_quant_map, nested_offset, shape, block_size, quant_type,
                      input);
  const Rows x(op, "input", input, weight.cols());
  if (bias) bias = checked(op, "bias", *bias, input.scalar_type(), input, weight.rows());
  Tensor output = x.empty_beside(weight.rows());
  if (output.numel() == 0) return output;
  if (weight.cols() == 0) return bias ? torch::stable::copy_(output, *bias) : torch::stable::zero_(output);
  const void* b = bias ? bias->const_data_ptr() : nullptr;
  void* y = output.mutable_data_ptr();
  for_units(weight.rows(), x.m * weight.cols(), [&](int64_t begin, int64_t end) {
    return qlora_linear_4bit_cpu(x.values.const_data_ptr(), x.m, x.dtype, weight.get(), b, y, begin, end);
  });
  return output;
}

std::vector<Tensor> linear_4bit_group(Tensor input, std::vector<Tensor> packed, std::vector<Tensor> absmax,
                                      std::vector<Tensor> nested_absmax, std::vector<Tensor> nested_quant_map,
                                      std::vector<Tensor> nested_offset, std::vector<Tensor> bias, Shape biased,
                                      Shape rows, int64_t block_size, std::string quant_type) {
  const GroupLists lists{packed, absmax, nested_absmax, nested_quant_map, nested_offset, bias, biased, rows};
  lists.check("linear_4bit_group", input);
  const std::vector<std::optional<Tensor>> biases = lists.biases();
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < rows.size(); ++i) {
    outputs.push_back(linear_4bit(input, packed[i], absmax[i], lists.nested(nested_absmax, i),
                                  lists.nested(nested_quant_map, i), lists.nested(nested_offset, i), biases[i],
                                  {rows[i], input.size(-1)}, block_size, quant_type));
  }
  return outputs;
}

Tensor linear_4bit_grad_input(Tensor grad_output, Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                              std::optional<Tensor> nested_quant_map, std::optional<Tensor> nested_offset, Shape shape,
                              int64_t block_size, std::string quant_type) {
  const char* op = "linear_4bit_grad_input";
  check_matrix(op, shape);
  const Weight weight(op, packed, absmax, nested_absmax, nested_quant_map, nested_offset, shape, block_size, quant_type,
                      grad_output);
  const Rows dy(op, "grad_output", grad_output, weight.rows());
  Tensor grad_input = dy.empty_beside(weight.cols());
  if (grad_input.numel() == 0) return grad_input;
  if (weight.rows() == 0) return torch::stable::zero_(grad_input);
  void* dx = grad_input.mutable_data_ptr();
  for_units(weight.cols(), dy.m * weight.rows(), [&](int64_t begin, int64_t end) {
    return qlora_linear_4bit_grad_input_cpu(dy.values.const_data_ptr(), dy.m, dy.dtype, weight.get(), dx, begin, end);
  });
  return grad_input;
}

std::tuple<Tensor, Tensor> lora_linear_4bit(Tensor input, Tensor packed, Tensor absmax,
                                            std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_quant_map,
                                            std::optional<Tensor> nested_offset, std::optional<Tensor> bias, Tensor a,
                                            Tensor b, double scaling, std::optional<Tensor> adapter_input, Shape shape,
                                            int64_t block_size, std::string quant_type) {
  const char* op = "lora_linear_4bit";
  check_matrix(op, shape);
  const Weight weight(op, packed, absmax, nested_absmax, nested_quant_map, nested_offset, shape, block_size, quant_type,
                      input);
  const Lora lora(op, a, b, scaling, weight, input);
  const Rows x(op, "input", input, weight.cols());
  if (bias) bias = checked(op, "bias", *bias, input.scalar_type(), input, weight.rows());
  if (adapter_input)
    adapter_input = checked(op, "adapter_input", *adapter_input, input.scalar_type(), input, input.numel());
  Tensor output = x.empty_beside(weight.rows());
  Tensor left = empty_on_device_of(x.values, {x.m, lora.left_stride()}, x.values.scalar_type());
  const Tensor& narrow_input = adapter_input ? *adapter_input : x.values;
  const void* x_data = narrow_input.const_data_ptr();
  void* left_data = left.mutable_data_ptr();
  const qlora_lora& view = *lora.get();
  for_units(x.m, lora.rank() * weight.cols(), [&](int64_t begin, int64_t end) {
    return qlora_adapter_product_cpu(x_data, weight.cols(), x.m, weight.cols(), x.dtype, view.a, view.a_dtype, 1,
                                     view.scaling, left_data, lora.left_stride(), lora.rank(), begin, end);
  });
  if (output.numel() == 0) return {output, left};
  const void* bias_data = bias ? bias->const_data_ptr() : nullptr;
  void* y = output.mutable_data_ptr();
  for_units(weight.rows(), x.m * (weight.cols() + lora.rank()), [&](int64_t begin, int64_t end) {
    return qlora_lora_linear_4bit_cpu(x.values.const_data_ptr(), x.m, x.dtype, weight.get(), bias_data, &view,
                                      left_data, y, begin, end);
  });
  return {output, left};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_4bit_backward(
    Tensor grad_output, Tensor adapter_input, Tensor left, Tensor packed, Tensor absmax,
    std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_quant_map, std::optional<Tensor> nested_offset,
    Tensor a, Tensor b, double scaling, bool is_separate, bool needs_input, bool needs_adapter_input, bool needs_a,
    bool needs_b, Shape shape, int64_t block_size, std::string quant_type) {
  const char* op = "lora_linear_4bit_backward";
  check_matrix(op, shape);
  const Weight weight(op, packed, absmax, nested_absmax, nested_quant_map, nested_offset, shape, block_size, quant_type,
                      grad_output);
  const Lora lora(op, a, b, scaling, weight, grad_output);
  const Rows dy(op, "grad_output", grad_output, weight.rows());
  const ScalarType dtype = grad_output.scalar_type();
  const Tensor x = checked(op, "adapter_input", adapter_input, dtype, grad_output, dy.m * weight.cols());
  const Tensor narrow = checked(op, "left", left, dtype, grad_output, dy.m * lora.left_stride());
  LoraGradients gradients(dy, weight, lora, needs_input, needs_adapter_input, needs_a, needs_b);
  if (dy.m == 0) return gradients.zeros();
  const qlora_lora& view = *lora.get();
  Tensor grad_left = empty_on_device_of(dy.values, {dy.m, lora.left_stride()}, dtype);
  const void* dy_data = dy.values.const_data_ptr();
  void* dleft = grad_left.mutable_data_ptr();
  if (needs_input || needs_adapter_input || needs_a) {
    for_units(dy.m, lora.rank() * weight.rows(), [&](int64_t begin, int64_t end) {
      return qlora_adapter_product_cpu(dy_data, weight.rows(), dy.m, weight.rows(), dy.dtype, view.b, view.b_dtype, 0,
                                       view.scaling, dleft, lora.left_stride(), lora.rank(), begin, end);
    });
  }
  if (needs_input) {
    void* dx = gradients.input.mutable_data_ptr();
    for_units(weight.cols(), dy.m * (weight.rows() + lora.rank()), [&](int64_t begin, int64_t end) {
      return is_separate ? qlora_linear_4bit_grad_input_cpu(dy_data, dy.m, dy.dtype, weight.get(), dx, begin, end)
                         : qlora_lora_linear_4bit_backward_cpu(dy_data, dy.m, dy.dtype, weight.get(), &view, dleft, dx,
                                                               begin, end);
    });
  }
  if (needs_adapter_input) {
    void* dx = gradients.adapter_input.mutable_data_ptr();
    for_units(dy.m, lora.rank() * weight.cols(), [&](int64_t begin, int64_t end) {
      return qlora_adapter_product_cpu(dleft, lora.left_stride(), dy.m, lora.rank(), dy.dtype, view.a, view.a_dtype, 0,
                                       1.0f, dx, weight.cols(), weight.cols(), begin, end);
    });
  }
  if (needs_a) {
    void* da = gradients.a.mutable_data_ptr();
    for_units(weight.cols(), dy.m * lora.rank(), [&](int64_t begin, int64_t end) {
      return qlora_adapter_gradient_cpu(dleft, lora.rank(), x.const_data_ptr(), dy.m, weight.cols(), dy.dtype, da,
                                        view.a_dtype, 0, begin, end);
    });
  }
  if (needs_b) {
    void* db = gradients.b.mutable_data_ptr();
    for_units(weight.rows(), dy.m * lora.rank(), [&](int64_t begin, int64_t end) {
      return qlora_adapter_gradient_cpu(narrow.const_data_ptr(), lora.rank(), dy_data, dy.m, weight.rows(), dy.dtype,
                                        db, view.b_dtype, 1, begin, end);
    });
  }
  return gradients.all();
}

Tensor embedding_4bit(Tensor indices, Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                      std::optional<Tensor> nested_quant_map, std::optional<Tensor> nested_offset, Shape shape,
                      int64_t block_size, std::string quant_type, ScalarType dtype) {
  const char* op = "embedding_4bit";
  check_matrix(op, shape);
  const qlora_dtype out_dtype = dtype_of(op, "dtype", dtype);
  const Weight weight(op, packed, absmax, nested_absmax, nested_quant_map, nested_offset, shape, block_size, quant_type,
                      indices);
  const int64_t count = indices.numel();
  const Tensor rows = checked(op, "indices", indices, ScalarType::Long, indices, count);
  Shape out_shape(indices.sizes().begin(), indices.sizes().end());
  out_shape.push_back(weight.cols());
  Tensor output = empty_on_device_of(rows, out_shape, dtype);
  void* out = output.mutable_data_ptr();
  for_units(count, weight.cols(), [&](int64_t begin, int64_t end) {
    return qlora_embedding_4bit_cpu(rows.const_data_ptr<int64_t>(), count, weight.get(), out, out_dtype, begin, end);
  });
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(qlora, CPU, m) {
  m.impl("quantize_4bit", TORCH_BOX(&quantize_4bit));
  m.impl("dequantize_4bit", TORCH_BOX(&dequantize_4bit));
  m.impl("quantize_absmax", TORCH_BOX(&quantize_absmax));
  m.impl("dequantize_absmax", TORCH_BOX(&dequantize_absmax));
  m.impl("round_columns_nf4", TORCH_BOX(&round_columns_nf4));
  m.impl("linear_4bit", TORCH_BOX(&linear_4bit));
  m.impl("linear_4bit.raw", TORCH_BOX(&linear_4bit));
  m.impl("linear_4bit_group", TORCH_BOX(&linear_4bit_group));
  m.impl("linear_4bit_grad_input", TORCH_BOX(&linear_4bit_grad_input));
  m.impl("linear_4bit_grad_input.raw", TORCH_BOX(&linear_4bit_grad_input));
  m.impl("lora_linear_4bit", TORCH_BOX(&lora_linear_4bit));
  m.impl("lora_linear_4bit.raw", TORCH_BOX(&lora_linear_4bit));
  m.impl("lora_linear_4bit_backward", TORCH_BOX(&lora_linear_4bit_backward));
  m.impl("lora_linear_4bit_backward.raw", TORCH_BOX(&lora_linear_4bit_backward));
  m.impl("embedding_4bit", TORCH_BOX(&embedding_4bit));
}

}  // namespace
}  // namespace qlora::torch_ops
