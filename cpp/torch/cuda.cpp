// The operators on CUDA: check, guard + stream, allocate, call. No CUDA header and no CUDA symbol that a CPU-only torch
// lacks, so that one library loads everywhere.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/tensors.h"

// Weak: torch exports it only in its CUDA builds.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace qlora::torch_ops {
namespace {

// Makes a tensor's device current and finds torch's current stream on it.
struct Launch {
  explicit Launch(const Tensor& tensor) : device(tensor.get_device_index()), guard(device) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "qlora: expected a torch built with CUDA, got a CUDA tensor in one without");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  }

  int32_t device;
  torch::stable::accelerator::DeviceGuard guard;
  qlora_stream stream = nullptr;
};

// Device memory for linear layers, from torch's caching allocator, whose blocks are 512-byte aligned; none where the
// kernel needs none.
struct Workspace {
  Workspace(const Weight& weight, const Rows& operand, bool is_grad, bool has_bias, int32_t device) {
    throw_on_failure(qlora_linear_4bit_workspace_size(weight.get(), operand.m, operand.dtype, is_grad ? 1 : 0,
                                                      has_bias ? 1 : 0, device, &size));
    allocate(operand);
  }
  Workspace(const Weight& weight, const Rows& operand, const Lora& lora, bool is_backward, bool has_bias,
            int32_t device) {
    throw_on_failure(qlora_lora_linear_4bit_workspace_size(weight.get(), operand.m, operand.dtype, lora.get(),
                                                           is_backward ? 1 : 0, has_bias ? 1 : 0, device, &size));
    allocate(operand);
  }
  Workspace(const std::vector<qlora_weight_4bit>& weights, const Rows& operand, const std::vector<const void*>& biases,
            int32_t device) {
    throw_on_failure(qlora_linear_4bit_group_workspace_size(weights.data(), static_cast<int64_t>(weights.size()),
                                                            operand.m, operand.dtype, biases.data(), device, &size));
    allocate(operand);
  }

  void allocate(const Rows& operand) {
    if (size == 0) return;
    kept = empty_on_device_of(operand.values, {size}, ScalarType::Byte);
    data = kept->mutable_data_ptr();
  }

  int64_t size = 0;
  std::optional<Tensor> kept;
  void* data = nullptr;
};

// At an address that 16-byte loads take: a copy of a view that begins between two.
Tensor aligned(const Tensor& tensor) {
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return address % 16 == 0 ? tensor : torch::stable::clone(tensor);
}

std::tuple<Tensor, Tensor> quantize_4bit(Tensor input, int64_t block_size, std::string quant_type) {
  const char* op = "quantize_4bit";
  check_block_size(op, block_size);
  const qlora_format format = format_of(op, quant_type);
  const qlora_dtype dtype = dtype_of(op, "input", input.scalar_type());
  const int64_t n = input.numel();
  const Launch launch(input);
  const Tensor x = checked(op, "input", input, std::nullopt, input, n);
  Tensor packed = empty_on_device_of(x, {num_packed_bytes(n), 1}, ScalarType::Byte);
  Tensor absmax = empty_on_device_of(x, {num_blocks(n, block_size)}, ScalarType::Float);
  if (n == 0) return {packed, absmax};
  throw_on_failure(qlora_quantize_4bit_cuda(x.const_data_ptr(), dtype, n, block_size, format,
                                            packed.mutable_data_ptr<uint8_t>(), absmax.mutable_data_ptr<float>(),
                                            launch.device, launch.stream));
  return {packed, absmax};
}

Tensor dequantize_4bit(Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                       std::optional<Tensor> nested_quant_map, std::optional<Tensor> nested_offset, Shape shape,
                       int64_t block_size, std::string quant_type, ScalarType dtype) {
  const char* op = "dequantize_4bit";
  const qlora_dtype out_dtype = dtype_of(op, "dtype", dtype);
  const Launch launch(packed);
  const Weight weight(op, packed, absmax, nested_absmax, nested_quant_map, nested_offset, shape, block_size, quant_type,
                      packed);
  Tensor output = empty_on_device_of(packed, shape, dtype);
  if (weight.num_values() == 0) return output;
  throw_on_failure(
      qlora_dequantize_4bit_cuda(weight.get(), output.mutable_data_ptr(), out_dtype, launch.device, launch.stream));
  return output;
}

std::tuple<Tensor, Tensor> quantize_absmax(Tensor absmax, Tensor nested_offset, Tensor nested_quant_map) {
  const char* op = "quantize_absmax";
  const int64_t n = absmax.numel();
  const Launch launch(absmax);
  const Tensor x = checked(op, "absmax", absmax, ScalarType::Float, absmax, n);
  const Tensor offset = checked(op, "nested_offset", nested_offset, ScalarType::Float, absmax, 1);
  const Tensor map = checked(op, "nested_quant_map", nested_quant_map, ScalarType::Float, absmax, 256);
  Tensor codes = empty_on_device_of(x, {n}, ScalarType::Byte);
  Tensor nested_absmax = empty_on_device_of(x, {num_nested_blocks(n)}, ScalarType::Float);
  if (n == 0) return {codes, nested_absmax};
  throw_on_failure(qlora_quantize_absmax_cuda(x.const_data_ptr<float>(), n, offset.const_data_ptr<float>(),
                                              map.const_data_ptr<float>(), codes.mutable_data_ptr<uint8_t>(),
                                              nested_absmax.mutable_data_ptr<float>(), launch.device, launch.stream));
  return {codes, nested_absmax};
}

Tensor dequantize_absmax(Tensor codes, Tensor nested_absmax, Tensor nested_quant_map, Tensor nested_offset) {
  const char* op = "dequantize_absmax";
  const int64_t n = codes.numel();
  const Launch launch(codes);
  const Tensor q = checked(op, "absmax", codes, ScalarType::Byte, codes, n);
  const Tensor scales = checked(op, "nested_absmax", nested_absmax, ScalarType::Float, codes, num_nested_blocks(n));
  const Tensor map = checked(op, "nested_quant_map", nested_quant_map, ScalarType::Float, codes, 256);
  const Tensor offset = checked(op, "nested_offset", nested_offset, ScalarType::Float, codes, 1);
  Tensor absmax = empty_on_device_of(q, {n}, ScalarType::Float);
  if (n == 0) return absmax;
  throw_on_failure(qlora_dequantize_absmax_cuda(q.const_data_ptr<uint8_t>(), n, scales.const_data_ptr<float>(),
                                                map.const_data_ptr<float>(), offset.const_data_ptr<float>(),
                                                absmax.mutable_data_ptr<float>(), launch.device, launch.stream));
  return absmax;
}

std::tuple<Tensor, Tensor> round_columns_nf4(Tensor values, Tensor scales, Tensor inverse, Tensor coupling,
                                             std::optional<Tensor> previous) {
  const Launch launch(values);
  const ColumnRounding problem(values, scales, inverse, coupling, previous);
  if (problem.rounded.numel() == 0) return {problem.rounded, problem.change};
  throw_on_failure(qlora_round_columns_nf4_cuda(
      problem.values.const_data_ptr<float>(), problem.scales.const_data_ptr<float>(),
      problem.inverse.const_data_ptr<float>(), problem.coupling.const_data_ptr<float>(), problem.previous_data(),
      problem.num_columns, problem.rows, problem.rounded.mutable_data_ptr<float>(),
      problem.change.mutable_data_ptr<float>(), launch.device, launch.stream));
  return {problem.rounded, problem.change};
}

Tensor linear_4bit(Tensor input, Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                   std::optional<Tensor> nested_quant_map, std::optional<Tensor> nested_offset,
                   std::optional<Tensor> bias, Shape shape, int64_t block_size, std::string quant_type) {
  const char* op = "linear_4bit";
  check_matrix(op, shape);
  const Launch launch(input);
  const Weight weight(op, packed, absmax, nested_absmax, nested_quant_map, nested_offset, shape, block_size, quant_type,
                      input);
  const Rows x(op, "input", input, weight.cols());
  if (bias) bias = checked(op, "bias", *bias, input.scalar_type(), input, weight.rows());
  Tensor output = x.empty_beside(weight.rows());
  if (output.numel() == 0) return output;
  if (weight.cols() == 0) return bias ? torch::stable::copy_(output, *bias) : torch::stable::zero_(output);
  const Workspace workspace(weight, x, false, bias.has_value(), launch.device);
  throw_on_failure(qlora_linear_4bit_cuda(x.values.const_data_ptr(), x.m, x.dtype, weight.get(),
                                          bias ? bias->const_data_ptr() : nullptr, output.mutable_data_ptr(),
                                          workspace.data, workspace.size, launch.device, launch.stream));
  return output;
}

std::vector<Tensor> linear_4bit_group(Tensor input, std::vector<Tensor> packed, std::vector<Tensor> absmax,
                                      std::vector<Tensor> nested_absmax, std::vector<Tensor> nested_quant_map,
                                      std::vector<Tensor> nested_offset, std::vector<Tensor> bias, Shape biased,
                                      Shape rows, int64_t block_size, std::string quant_type) {
  const char* op = "linear_4bit_group";
  const GroupLists lists{packed, absmax, nested_absmax, nested_quant_map, nested_offset, bias, biased, rows};
  lists.check(op, input);
  const Launch launch(input);
  const int64_t cols = input.size(-1);
  const Rows x(op, "input", input, cols);
  std::vector<Weight> kept;
  std::vector<qlora_weight_4bit> weights;
  std::vector<std::optional<Tensor>> biases = lists.biases();
  std::vector<const void*> bias_data;
  std::vector<Tensor> outputs;
  std::vector<void*> ys;
  for (size_t i = 0; i < rows.size(); ++i) {
    kept.emplace_back(op, packed[i], absmax[i], lists.nested(nested_absmax, i), lists.nested(nested_quant_map, i),
                      lists.nested(nested_offset, i), Shape{rows[i], cols}, block_size, quant_type, input);
    weights.push_back(*kept.back().get());
    std::optional<Tensor>& b = biases[i];
    if (b) b = checked(op, "bias", *b, input.scalar_type(), input, rows[i]);
    bias_data.push_back(b ? b->const_data_ptr() : nullptr);
    outputs.push_back(x.empty_beside(rows[i]));
    if (cols == 0) b ? torch::stable::copy_(outputs[i], *b) : torch::stable::zero_(outputs[i]);
    ys.push_back(outputs[i].mutable_data_ptr());
  }
  if (cols == 0 || rows.empty()) return outputs;
  const Workspace workspace(weights, x, bias_data, launch.device);
  throw_on_failure(qlora_linear_4bit_group_cuda(x.values.const_data_ptr(), x.m, x.dtype, weights.data(),
                                                static_cast<int64_t>(weights.size()), bias_data.data(), ys.data(),
                                                workspace.data, workspace.size, launch.device, launch.stream));
  return outputs;
}

Tensor linear_4bit_grad_input(Tensor grad_output, Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                              std::optional<Tensor> nested_quant_map, std::optional<Tensor> nested_offset, Shape shape,
                              int64_t block_size, std::string quant_type) {
  const char* op = "linear_4bit_grad_input";
  check_matrix(op, shape);
  const Launch launch(grad_output);
  const Weight weight(op, packed, absmax, nested_absmax, nested_quant_map, nested_offset, shape, block_size, quant_type,
                      grad_output);
  const Rows dy(op, "grad_output", grad_output, weight.rows());
  Tensor grad_input = dy.empty_beside(weight.cols());
  if (grad_input.numel() == 0) return grad_input;
  if (weight.rows() == 0) return torch::stable::zero_(grad_input);
  const Workspace workspace(weight, dy, true, false, launch.device);
  throw_on_failure(qlora_linear_4bit_grad_input_cuda(dy.values.const_data_ptr(), dy.m, dy.dtype, weight.get(),
                                                     grad_input.mutable_data_ptr(), workspace.data, workspace.size,
                                                     launch.device, launch.stream));
  return grad_input;
}

std::tuple<Tensor, Tensor> lora_linear_4bit(Tensor input, Tensor packed, Tensor absmax,
                                            std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_quant_map,
                                            std::optional<Tensor> nested_offset, std::optional<Tensor> bias, Tensor a,
                                            Tensor b, double scaling, std::optional<Tensor> adapter_input, Shape shape,
                                            int64_t block_size, std::string quant_type) {
  const char* op = "lora_linear_4bit";
  check_matrix(op, shape);
  const Launch launch(input);
  const Weight weight(op, packed, absmax, nested_absmax, nested_quant_map, nested_offset, shape, block_size, quant_type,
                      input);
  const Lora lora(op, a, b, scaling, weight, input);
  const Rows x(op, "input", input, weight.cols());
  if (bias) bias = checked(op, "bias", *bias, input.scalar_type(), input, weight.rows());
  if (adapter_input)
    adapter_input = checked(op, "adapter_input", *adapter_input, input.scalar_type(), input, input.numel());
  Tensor output = x.empty_beside(weight.rows());
  Tensor left = empty_on_device_of(x.values, {x.m, lora.left_stride()}, x.values.scalar_type());
  if (x.m == 0) return {output, left};
  const Workspace workspace(weight, x, lora, false, bias.has_value(), launch.device);
  throw_on_failure(qlora_lora_linear_4bit_cuda(
      x.values.const_data_ptr(), adapter_input ? adapter_input->const_data_ptr() : nullptr, x.m, x.dtype, weight.get(),
      bias ? bias->const_data_ptr() : nullptr, lora.get(), output.mutable_data_ptr(), left.mutable_data_ptr(),
      workspace.data, workspace.size, launch.device, launch.stream));
  return {output, left};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lora_linear_4bit_backward(
    Tensor grad_output, Tensor adapter_input, Tensor left, Tensor packed, Tensor absmax,
    std::optional<Tensor> nested_absmax, std::optional<Tensor> nested_quant_map, std::optional<Tensor> nested_offset,
    Tensor a, Tensor b, double scaling, bool is_separate, bool needs_input, bool needs_adapter_input, bool needs_a,
    bool needs_b, Shape shape, int64_t block_size, std::string quant_type) {
  const char* op = "lora_linear_4bit_backward";
  check_matrix(op, shape);
  const Launch launch(grad_output);
  const Weight weight(op, packed, absmax, nested_absmax, nested_quant_map, nested_offset, shape, block_size, quant_type,
                      grad_output);
  const Lora lora(op, a, b, scaling, weight, grad_output);
  const Rows dy(op, "grad_output", grad_output, weight.rows());
  const ScalarType dtype = grad_output.scalar_type();
  const Tensor x = checked(op, "adapter_input", adapter_input, dtype, grad_output, dy.m * weight.cols());
  const Tensor narrow = aligned(checked(op, "left", left, dtype, grad_output, dy.m * lora.left_stride()));
  LoraGradients gradients(dy, weight, lora, needs_input, needs_adapter_input, needs_a, needs_b);
  if (dy.m == 0) return gradients.zeros();
  const auto place = [](Tensor& tensor, bool is_needed) { return is_needed ? tensor.mutable_data_ptr() : nullptr; };
  const Workspace workspace(weight, dy, lora, true, false, launch.device);
  throw_on_failure(qlora_lora_linear_4bit_backward_cuda(
      dy.values.const_data_ptr(), x.const_data_ptr(), narrow.const_data_ptr(), dy.m, dy.dtype, weight.get(), lora.get(),
      is_separate ? 1 : 0, place(gradients.input, needs_input), place(gradients.adapter_input, needs_adapter_input),
      place(gradients.a, needs_a), place(gradients.b, needs_b), workspace.data, workspace.size, launch.device,
      launch.stream));
  return gradients.all();
}

Tensor embedding_4bit(Tensor indices, Tensor packed, Tensor absmax, std::optional<Tensor> nested_absmax,
                      std::optional<Tensor> nested_quant_map, std::optional<Tensor> nested_offset, Shape shape,
                      int64_t block_size, std::string quant_type, ScalarType dtype) {
  const char* op = "embedding_4bit";
  check_matrix(op, shape);
  const qlora_dtype out_dtype = dtype_of(op, "dtype", dtype);
  const Launch launch(indices);
  const Weight weight(op, packed, absmax, nested_absmax, nested_quant_map, nested_offset, shape, block_size, quant_type,
                      indices);
  const int64_t count = indices.numel();
  const Tensor rows = checked(op, "indices", indices, ScalarType::Long, indices, count);
  Shape out_shape(indices.sizes().begin(), indices.sizes().end());
  out_shape.push_back(weight.cols());
  Tensor output = empty_on_device_of(rows, out_shape, dtype);
  if (output.numel() == 0) return output;
  throw_on_failure(qlora_embedding_4bit_cuda(rows.const_data_ptr<int64_t>(), count, weight.get(),
                                             output.mutable_data_ptr(), out_dtype, launch.device, launch.stream));
  return output;
}

STABLE_TORCH_LIBRARY_IMPL(qlora, CUDA, m) {
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
