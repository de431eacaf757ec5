// The CUDA half of the C interface. Every function: check the arguments, make the device current, call.
#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/gemm.h"
#include "core/status.h"
#include "core/weight.h"
#include "cuda/device_guard.h"
#include "cuda/gemm/select.h"
#include "cuda/kernels.h"
#include "cuda/lora/lora_linear.h"
#include "qlora/qlora.h"

namespace qlora {
namespace {

constexpr uintptr_t kWorkspaceAlignment = 256;

cudaStream_t to_cuda(qlora_stream stream) { return static_cast<cudaStream_t>(stream); }

void check_count(const char* op, const char* argument, int64_t count) {
  expect(count >= 0, op, ": ", argument, ": expected at least 0, got ", count);
}

// rows x cols values of 4 bytes must be countable.
void check_size(const char* op, const char* argument, int64_t rows, int64_t cols) {
  check_count(op, argument, rows);
  expect(cols == 0 || rows <= std::numeric_limits<int64_t>::max() / 8 / cols, op, ": ", argument,
         ": expected a size below 2^63 bytes, got ", rows, " rows of ", cols);
}

void check_gemm(const char* op, const Gemm& problem) {
  check_dtype(op, problem.dtype);
  check_size(op, "m", problem.m, std::max(problem.weight.rows, problem.weight.cols));
}

const char* name_of(Direction direction) {
  return direction == Direction::kForward ? "linear_4bit" : "linear_4bit_grad_input";
}

// A shape and a dtype without data, for the questions that need no more.
Gemm describe_gemm(const char* op, const qlora_weight_4bit* weight, int64_t m, qlora_dtype dtype, int is_grad,
                   int has_bias) {
  check_pointer(op, "weight", weight);
  check_format(op, weight->format);
  check_block_size(op, weight->block_size);
  check_size(op, "weight.rows", weight->rows, weight->cols);
  check_count(op, "weight.cols", weight->cols);
  Gemm problem = {};
  problem.direction = is_grad != 0 ? Direction::kGradInput : Direction::kForward;
  problem.m = m;
  problem.dtype = dtype;
  problem.weight = *weight;
  problem.has_bias = has_bias != 0;
  check_gemm(op, problem);
  return problem;
}

void check_alignment(const char* op, const char* argument, const void* pointer, uintptr_t bytes) {
  check_pointer(op, argument, pointer);
  expect(reinterpret_cast<uintptr_t>(pointer) % bytes == 0, op, ": ", argument, ": expected an address aligned to ",
         bytes, " bytes, got ", pointer);
}

// The members of a group that have outputs, in `problems`; those of `ys` are null where only sizes are asked for.
std::vector<Gemm> describe_group(const char* op, const void* x, int64_t m, qlora_dtype dtype,
                                 const qlora_weight_4bit* weights, int64_t count, const void* const* biases,
                                 void* const* ys) {
  check_pointer(op, "weights", weights);
  expect(count >= 1, op, ": count: expected at least 1, got ", count);
  std::vector<Gemm> problems;
  for (int64_t i = 0; i < count; ++i) {
    Gemm problem = describe_gemm(op, &weights[i], m, dtype, 0, biases != nullptr && biases[i] != nullptr);
    expect(weights[i].cols == weights[0].cols, op, ": weights: expected the same cols in all, got ", weights[0].cols,
           " and ", weights[i].cols);
    problem.input = x;
    problem.bias = problem.has_bias ? biases[i] : nullptr;
    problem.output = ys == nullptr ? nullptr : ys[i];
    if (m > 0 && weights[i].rows > 0) problems.push_back(problem);
  }
  return problems;
}

void check_workspace(const char* op, const Gemm& problem, int64_t needed) {
  expect(problem.workspace_size >= needed, op, ": workspace_size: expected at least ", needed, ", got ",
         problem.workspace_size);
  if (needed > 0) check_alignment(op, "workspace", problem.workspace, kWorkspaceAlignment);
}

// The adapter's matrices, where they have values.
void check_lora(const char* op, const qlora_lora* lora, const qlora_weight_4bit& weight) {
  check_pointer(op, "lora", lora);
  check_rank(op, lora->rank);
  check_dtype(op, lora->a_dtype);
  check_dtype(op, lora->b_dtype);
  if (weight.cols > 0) check_pointer(op, "lora.a", lora->a);
  if (weight.rows > 0) check_pointer(op, "lora.b", lora->b);
}

void run_lora(const char* op, const LoraLinear& problem, int32_t device_index, qlora_stream stream) {
  const qlora_weight_4bit& weight = problem.gemm.weight;
  check_gemm(op, problem.gemm);
  check_lora(op, &problem.lora, weight);
  check_size(op, "m", problem.gemm.m, left_columns(problem.lora.rank));
  const Device& device = find_device(op, device_index);
  const DeviceGuard guard(device_index);
  if (problem.gemm.m > 0) check_workspace(op, problem.gemm, lora_workspace_size(problem, device));
  if (problem.gemm.direction == Direction::kForward) {
    run_lora_forward(problem, device, to_cuda(stream));
  } else {
    run_lora_backward(problem, device, to_cuda(stream));
  }
}

void run_linear(const Gemm& problem, int32_t device_index, qlora_stream stream) {
  const bool is_forward = problem.direction == Direction::kForward;
  const char* const op = name_of(problem.direction);
  check_gemm(op, problem);
  const Device& device = find_device(op, device_index);
  const int64_t num_inputs = is_forward ? problem.weight.cols : problem.weight.rows;
  const int64_t num_outputs = is_forward ? problem.weight.rows : problem.weight.cols;
  if (problem.m == 0 || num_outputs == 0) return;
  if (num_inputs > 0) check_pointer(op, is_forward ? "x" : "dy", problem.input);
  check_pointer(op, is_forward ? "y" : "dx", problem.output);
  check_workspace(op, problem, gemm_workspace_size(problem, device));
  const DeviceGuard guard(device_index);
  run_gemm(problem, device, to_cuda(stream));
}

// Text into a buffer of `size` bytes, cut to it and null-terminated.
void copy_text(const char* op, const std::string& whole, char* text, int64_t size) {
  check_pointer(op, "text", text);
  expect(size >= 1, op, ": size: expected at least 1, got ", size);
  const size_t length = std::min(whole.size(), static_cast<size_t>(size - 1));
  std::memcpy(text, whole.data(), length);
  text[length] = '\0';
}

}  // namespace
}  // namespace qlora

using qlora::guarded;

qlora_status qlora_quantize_4bit_cuda(const void* x, qlora_dtype dtype, int64_t n, int64_t block_size,
                                      qlora_format format, uint8_t* packed, float* absmax, int32_t device,
                                      qlora_stream stream) {
  return guarded([&] {
    constexpr const char* kOp = "quantize_4bit";
    qlora::check_dtype(kOp, dtype);
    qlora::check_format(kOp, format);
    qlora::check_block_size(kOp, block_size);
    qlora::check_size(kOp, "n", n, 1);
    qlora::find_device(kOp, device);
    if (n == 0) return;
    qlora::check_pointer(kOp, "x", x);
    qlora::check_pointer(kOp, "packed", packed);
    qlora::check_pointer(kOp, "absmax", absmax);
    const qlora::DeviceGuard guard(device);
    qlora::quantize_4bit(x, dtype, n, block_size, format, packed, absmax, qlora::to_cuda(stream));
  });
}

qlora_status qlora_dequantize_4bit_cuda(const qlora_weight_4bit* weight, void* y, qlora_dtype dtype, int32_t device,
                                        qlora_stream stream) {
  return guarded([&] {
    constexpr const char* kOp = "dequantize_4bit";
    qlora::check_weight(kOp, weight);
    qlora::check_dtype(kOp, dtype);
    const qlora::Device& found = qlora::find_device(kOp, device);
    if (qlora::num_values(*weight) == 0) return;
    qlora::check_pointer(kOp, "y", y);
    const qlora::DeviceGuard guard(device);
    const qlora::Window whole = {0, weight->rows, 0, weight->cols};
    qlora::dequantize_4bit(*weight, whole, y, weight->cols, dtype, 0, found, qlora::to_cuda(stream));
  });
}

qlora_status qlora_quantize_absmax_cuda(const float* absmax, int64_t n, const float* nested_offset,
                                        const float* nested_code, uint8_t* codes, float* nested_absmax, int32_t device,
                                        qlora_stream stream) {
  return guarded([&] {
    constexpr const char* kOp = "quantize_absmax";
    qlora::check_size(kOp, "n", n, 1);
    qlora::find_device(kOp, device);
    if (n == 0) return;
    qlora::check_pointer(kOp, "absmax", absmax);
    qlora::check_pointer(kOp, "nested_offset", nested_offset);
    qlora::check_pointer(kOp, "nested_code", nested_code);
    qlora::check_pointer(kOp, "codes", codes);
    qlora::check_pointer(kOp, "nested_absmax", nested_absmax);
    const qlora::DeviceGuard guard(device);
    qlora::quantize_absmax(absmax, n, nested_offset, nested_code, codes, nested_absmax, qlora::to_cuda(stream));
  });
}

qlora_status qlora_dequantize_absmax_cuda(const uint8_t* codes, int64_t n, const float* nested_absmax,
                                          const float* nested_code, const float* nested_offset, float* absmax,
                                          int32_t device, qlora_stream stream) {
  return guarded([&] {
    constexpr const char* kOp = "dequantize_absmax";
    qlora::check_size(kOp, "n", n, 1);
    qlora::find_device(kOp, device);
    if (n == 0) return;
    qlora::check_pointer(kOp, "codes", codes);
    qlora::check_pointer(kOp, "nested_absmax", nested_absmax);
    qlora::check_pointer(kOp, "nested_code", nested_code);
    qlora::check_pointer(kOp, "nested_offset", nested_offset);
    qlora::check_pointer(kOp, "absmax", absmax);
    const qlora::DeviceGuard guard(device);
    qlora::dequantize_absmax(codes, n, nested_absmax, nested_code, nested_offset, absmax, qlora::to_cuda(stream));
  });
}

qlora_status qlora_round_columns_nf4_cuda(const float* values, const float* scales, const float* inverse,
                                          const float* coupling, const float* previous, int64_t num_columns,
                                          int64_t rows, float* rounded, float* change, int32_t device,
                                          qlora_stream stream) {
  return guarded([&] {
    constexpr const char* kOp = "round_columns_nf4";
    qlora::check_round_columns(kOp, num_columns);
    qlora::check_size(kOp, "rows", rows, num_columns);
    qlora::find_device(kOp, device);
    if (rows == 0 || num_columns == 0) return;
    qlora::check_pointer(kOp, "values", values);
    qlora::check_pointer(kOp, "scales", scales);
    qlora::check_pointer(kOp, "inverse", inverse);
    qlora::check_pointer(kOp, "coupling", coupling);
    qlora::check_pointer(kOp, "rounded", rounded);
    qlora::check_pointer(kOp, "change", change);
    const qlora::DeviceGuard guard(device);
    qlora::round_columns_nf4(values, scales, inverse, coupling, previous, static_cast<int>(num_columns), rows, rounded,
                             change, qlora::to_cuda(stream));
  });
}

qlora_status qlora_linear_4bit_cuda(const void* x, int64_t m, qlora_dtype dtype, const qlora_weight_4bit* weight,
                                    const void* bias, void* y, void* workspace, int64_t workspace_size, int32_t device,
                                    qlora_stream stream) {
  return guarded([&] {
    qlora::check_weight("linear_4bit", weight);
    qlora::run_linear(
        {qlora::Direction::kForward, m, dtype, *weight, x, bias, y, workspace, workspace_size, bias != nullptr, {}},
        device, stream);
  });
}

qlora_status qlora_linear_4bit_grad_input_cuda(const void* dy, int64_t m, qlora_dtype dtype,
                                               const qlora_weight_4bit* weight, void* dx, void* workspace,
                                               int64_t workspace_size, int32_t device, qlora_stream stream) {
  return guarded([&] {
    qlora::check_weight("linear_4bit_grad_input", weight);
    qlora::run_linear(
        {qlora::Direction::kGradInput, m, dtype, *weight, dy, nullptr, dx, workspace, workspace_size, false, {}},
        device, stream);
  });
}

qlora_status qlora_linear_4bit_workspace_size(const qlora_weight_4bit* weight, int64_t m, qlora_dtype dtype,
                                              int is_grad, int has_bias, int32_t device, int64_t* size) {
  return guarded([&] {
    constexpr const char* kOp = "linear_4bit_workspace_size";
    const qlora::Gemm problem = qlora::describe_gemm(kOp, weight, m, dtype, is_grad, has_bias);
    qlora::check_pointer(kOp, "size", size);
    *size = qlora::gemm_workspace_size(problem, qlora::find_device(kOp, device));
  });
}

qlora_status qlora_lora_linear_4bit_cuda(const void* x, const void* adapter_x, int64_t m, qlora_dtype dtype,
                                         const qlora_weight_4bit* weight, const void* bias, const qlora_lora* lora,
                                         void* y, void* left, void* workspace, int64_t workspace_size, int32_t device,
                                         qlora_stream stream) {
  return guarded([&] {
    constexpr const char* kOp = "lora_linear_4bit";
    qlora::check_weight(kOp, weight);
    qlora::check_pointer(kOp, "lora", lora);
    if (m > 0) {
      if (weight->cols > 0) qlora::check_pointer(kOp, "x", x);
      if (weight->rows > 0) qlora::check_pointer(kOp, "y", y);
      qlora::check_alignment(kOp, "left", left, qlora::kLeftAlignment);
    }
    qlora::LoraLinear problem = {};
    problem.gemm = {
        qlora::Direction::kForward, m, dtype, *weight, x, bias, y, workspace, workspace_size, bias != nullptr, {}};
    problem.lora = *lora;
    problem.adapter_x = adapter_x == nullptr ? x : adapter_x;
    problem.left = left;
    qlora::run_lora(kOp, problem, device, stream);
  });
}

qlora_status qlora_lora_linear_4bit_backward_cuda(const void* dy, const void* adapter_x, const void* left, int64_t m,
                                                  qlora_dtype dtype, const qlora_weight_4bit* weight,
                                                  const qlora_lora* lora, int is_x_separate, void* dx, void* dadapter_x,
                                                  void* da, void* db, void* workspace, int64_t workspace_size,
                                                  int32_t device, qlora_stream stream) {
  return guarded([&] {
    constexpr const char* kOp = "lora_linear_4bit_backward";
    qlora::check_weight(kOp, weight);
    qlora::check_pointer(kOp, "lora", lora);
    qlora::expect(dadapter_x == nullptr || is_x_separate != 0, kOp,
                  ": dadapter_x: expected null where is_x_separate is 0, got ", dadapter_x);
    if (m > 0) {
      if (weight->rows > 0) qlora::check_pointer(kOp, "dy", dy);
      if (da != nullptr && weight->cols > 0) qlora::check_pointer(kOp, "adapter_x", adapter_x);
      if (db != nullptr) qlora::check_alignment(kOp, "left", left, qlora::kLeftAlignment);
    }
    qlora::LoraLinear problem = {};
    problem.gemm = {
        qlora::Direction::kGradInput, m, dtype, *weight, dy, nullptr, dx, workspace, workspace_size, false, {}};
    problem.lora = *lora;
    problem.adapter_x = adapter_x;
    problem.left = const_cast<void*>(left);
    problem.is_x_separate = is_x_separate != 0;
    problem.dadapter_x = dadapter_x;
    problem.da = da;
    problem.db = db;
    qlora::run_lora(kOp, problem, device, stream);
  });
}

qlora_status qlora_lora_linear_4bit_workspace_size(const qlora_weight_4bit* weight, int64_t m, qlora_dtype dtype,
                                                   const qlora_lora* lora, int is_backward, int has_bias,
                                                   int32_t device, int64_t* size) {
  return guarded([&] {
    constexpr const char* kOp = "lora_linear_4bit_workspace_size";
    qlora::LoraLinear problem = {};
    problem.gemm = qlora::describe_gemm(kOp, weight, m, dtype, is_backward, has_bias);
    qlora::check_pointer(kOp, "lora", lora);
    qlora::check_rank(kOp, lora->rank);
    qlora::check_pointer(kOp, "size", size);
    problem.lora.rank = lora->rank;
    const qlora::Device& described = qlora::find_device(kOp, device);
    *size = m == 0 ? 0 : qlora::lora_workspace_size(problem, described);
  });
}

qlora_status qlora_explain_linear_4bit(const qlora_weight_4bit* weight, int64_t m, qlora_dtype dtype, int is_grad,
                                       int32_t device, char* text, int64_t size) {
  return guarded([&] {
    constexpr const char* kOp = "explain_linear_4bit";
    const qlora::Gemm problem = qlora::describe_gemm(kOp, weight, m, dtype, is_grad, 0);
    qlora::copy_text(kOp, qlora::explain_gemm(problem, qlora::find_device(kOp, device)), text, size);
  });
}

qlora_status qlora_linear_4bit_group_cuda(const void* x, int64_t m, qlora_dtype dtype, const qlora_weight_4bit* weights,
                                          int64_t count, const void* const* biases, void* const* ys, void* workspace,
                                          int64_t workspace_size, int32_t device, qlora_stream stream) {
  return guarded([&] {
    constexpr const char* kOp = "linear_4bit_group";
    qlora::check_pointer(kOp, "ys", ys);
    std::vector<qlora::Gemm> problems = qlora::describe_group(kOp, x, m, dtype, weights, count, biases, ys);
    const qlora::Device& properties = qlora::find_device(kOp, device);
    if (problems.empty()) return;
    for (qlora::Gemm& problem : problems) {
      qlora::check_weight(kOp, &problem.weight);
      if (problem.weight.cols > 0) qlora::check_pointer(kOp, "x", x);
      qlora::check_pointer(kOp, "ys[i]", problem.output);
      problem.workspace = workspace;
      problem.workspace_size = workspace_size;
    }
    const int num_problems = static_cast<int>(problems.size());
    qlora::check_workspace(kOp, problems[0],
                           qlora::gemm_group_workspace_size(problems.data(), num_problems, properties));
    const qlora::DeviceGuard guard(device);
    qlora::run_gemm_group(problems.data(), num_problems, properties, qlora::to_cuda(stream));
  });
}

qlora_status qlora_linear_4bit_group_workspace_size(const qlora_weight_4bit* weights, int64_t count, int64_t m,
                                                    qlora_dtype dtype, const void* const* biases, int32_t device,
                                                    int64_t* size) {
  return guarded([&] {
    constexpr const char* kOp = "linear_4bit_group_workspace_size";
    const std::vector<qlora::Gemm> problems =
        qlora::describe_group(kOp, nullptr, m, dtype, weights, count, biases, nullptr);
    qlora::check_pointer(kOp, "size", size);
    const qlora::Device& properties = qlora::find_device(kOp, device);
    *size = qlora::gemm_group_workspace_size(problems.data(), static_cast<int>(problems.size()), properties);
  });
}

qlora_status qlora_explain_linear_4bit_group(const qlora_weight_4bit* weights, int64_t count, int64_t m,
                                             qlora_dtype dtype, int32_t device, char* text, int64_t size) {
  return guarded([&] {
    constexpr const char* kOp = "explain_linear_4bit_group";
    const std::vector<qlora::Gemm> problems =
        qlora::describe_group(kOp, nullptr, m, dtype, weights, count, nullptr, nullptr);
    const qlora::Device& properties = qlora::find_device(kOp, device);
    const int num_problems = static_cast<int>(problems.size());
    qlora::copy_text(kOp, qlora::explain_gemm_group(problems.data(), num_problems, properties), text, size);
  });
}

qlora_status qlora_embedding_4bit_cuda(const int64_t* indices, int64_t num_indices, const qlora_weight_4bit* weight,
                                       void* y, qlora_dtype dtype, int32_t device, qlora_stream stream) {
  return guarded([&] {
    constexpr const char* kOp = "embedding_4bit";
    qlora::check_weight(kOp, weight);
    qlora::check_dtype(kOp, dtype);
    qlora::check_size(kOp, "num_indices", num_indices, weight->cols);
    qlora::find_device(kOp, device);
    if (num_indices == 0 || weight->cols == 0) return;
    qlora::check_pointer(kOp, "indices", indices);
    qlora::check_pointer(kOp, "y", y);
    const qlora::DeviceGuard guard(device);
    qlora::embedding_4bit(indices, num_indices, *weight, y, dtype, qlora::to_cuda(stream));
  });
}
