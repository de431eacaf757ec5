// What the implementations of cpu.cpp and cuda.cpp share: tensors checked and turned into arguments of the C interface.
//
// Python raises ValueError and TypeError before it comes here (python/qlora/ops.py); these checks keep a direct call of
// torch.ops.qlora.* from reading or writing out of bounds.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/format.h"
#include "core/low_rank.h"
#include "qlora/qlora.h"

namespace qlora::torch_ops {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

// Uninitialised, contiguous, on the device of `other`. Straight from the C interface: torch::stable::new_empty looks
// its operator up by name at every call, which takes longer than launching a kernel.
inline Tensor empty_on_device_of(const Tensor& other, const Shape& sizes, ScalarType dtype) {
  Shape strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 0 ? sizes[i] : 1;
  }
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(other.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
                               other.get_device_index(), &handle));
  return Tensor(handle);
}

inline void throw_on_failure(qlora_status status) { STD_TORCH_CHECK(status == QLORA_OK, "qlora.", qlora_last_error()); }

inline qlora_dtype dtype_of(const char* op, const char* argument, ScalarType dtype) {
  if (dtype == ScalarType::Float) return QLORA_FLOAT32;
  if (dtype == ScalarType::Half) return QLORA_FLOAT16;
  if (dtype == ScalarType::BFloat16) return QLORA_BFLOAT16;
  STD_TORCH_CHECK(false, "qlora.", op, ": ", argument, ": expected float32, float16 or bfloat16, got ",
                  torch::headeronly::toString(dtype));
}

inline qlora_format format_of(const char* op, const std::string& quant_type) {
  STD_TORCH_CHECK(quant_type == "nf4" || quant_type == "fp4", "qlora.", op, ": quant_type: expected nf4 or fp4, got ",
                  quant_type);
  return quant_type == "nf4" ? QLORA_NF4 : QLORA_FP4;
}

inline void check_block_size(const char* op, int64_t block_size) {
  STD_TORCH_CHECK(is_valid_block_size(block_size), "qlora.", op,
                  ": block_size: expected a power of two from 32 to 4096, got ", block_size);
}

// The tensor, contiguous, of `dtype` (any for nullopt), on the device of `other`, with at least `count` values.
inline Tensor checked(const char* op, const char* argument, const Tensor& tensor, std::optional<ScalarType> dtype,
                      const Tensor& other, int64_t count) {
  STD_TORCH_CHECK(!dtype || tensor.scalar_type() == *dtype, "qlora.", op, ": ", argument, ": expected ",
                  torch::headeronly::toString(dtype.value_or(tensor.scalar_type())), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_cuda() == other.is_cuda() && tensor.get_device_index() == other.get_device_index(),
                  "qlora.", op, ": ", argument,
                  ": expected a tensor on the device of the call, got one on another device");
  STD_TORCH_CHECK(tensor.numel() >= count, "qlora.", op, ": ", argument, ": expected at least ", count, " values, got ",
                  tensor.numel());
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A 4-bit weight of operator arguments; holds the contiguous tensors that its pointers point into.
class Weight {
 public:
  Weight(const char* op, const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
         const std::optional<Tensor>& nested_quant_map, const std::optional<Tensor>& nested_offset, const Shape& shape,
         int64_t block_size, const std::string& quant_type, const Tensor& other) {
    check_block_size(op, block_size);
    view_.cols = shape.empty() ? 1 : shape.back();
    view_.rows = 1;
    for (size_t i = 0; i + 1 < shape.size(); ++i) view_.rows *= shape[i];
    for (int64_t size : shape)
      STD_TORCH_CHECK(size >= 0, "qlora.", op, ": shape: expected sizes of at least 0, got ", size);
    view_.block_size = block_size;
    view_.format = format_of(op, quant_type);
    const int64_t blocks = num_blocks(num_values(), block_size);
    const auto item = static_cast<int64_t>(packed.element_size());
    view_.packed = pointer<uint8_t>(
        checked(op, "packed", packed, std::nullopt, other, ceil_div(num_packed_bytes(num_values()), item)));
    if (!nested_absmax) {
      view_.absmax = pointer<float>(checked(op, "absmax", absmax, ScalarType::Float, other, blocks));
      return;
    }
    STD_TORCH_CHECK(nested_quant_map && nested_offset, "qlora.", op,
                    ": nested_absmax: expected nested_quant_map and nested_offset beside it, got None");
    view_.absmax_codes = pointer<uint8_t>(checked(op, "absmax", absmax, ScalarType::Byte, other, blocks));
    view_.nested_absmax = pointer<float>(
        checked(op, "nested_absmax", *nested_absmax, ScalarType::Float, other, num_nested_blocks(blocks)));
    view_.nested_code =
        pointer<float>(checked(op, "nested_quant_map", *nested_quant_map, ScalarType::Float, other, 256));
    view_.nested_offset = pointer<float>(checked(op, "nested_offset", *nested_offset, ScalarType::Float, other, 1));
  }

  const qlora_weight_4bit* get() const { return &view_; }
  int64_t rows() const { return view_.rows; }
  int64_t cols() const { return view_.cols; }
  int64_t num_values() const { return view_.rows * view_.cols; }

 private:
  template <typename T>
  const T* pointer(Tensor tensor) {
    kept_.push_back(std::move(tensor));
    return static_cast<const T*>(kept_.back().const_data_ptr());
  }

  qlora_weight_4bit view_{};
  std::vector<Tensor> kept_;
};

// The arguments of round_columns_nf4, contiguous, and its outputs.
struct ColumnRounding {
  ColumnRounding(const Tensor& values_in, const Tensor& scales_in, const Tensor& inverse_in, const Tensor& coupling_in,
                 const std::optional<Tensor>& previous_in)
      : num_columns(values_in.dim() == 2 ? values_in.size(0) : -1), rows(num_columns < 0 ? 0 : values_in.size(1)) {
    const char* op = "round_columns_nf4";
    STD_TORCH_CHECK(num_columns >= 0 && num_columns <= QLORA_MAX_ROUND_COLUMNS, "qlora.", op,
                    ": values: expected [num_columns, rows] of at most ", QLORA_MAX_ROUND_COLUMNS, " columns, got ",
                    values_in.dim(), " dimensions, the first of ", values_in.dim() == 0 ? 0 : values_in.size(0));
    const int64_t count = num_columns * rows;
    const auto float32 = [&](const char* argument, const Tensor& tensor, int64_t expected) {
      STD_TORCH_CHECK(tensor.numel() == expected, "qlora.", op, ": ", argument, ": expected ", expected,
                      " values, got ", tensor.numel());
      return checked(op, argument, tensor, ScalarType::Float, values_in, expected);
    };
    values = float32("values", values_in, count);
    scales = float32("scales", scales_in, count);
    inverse = float32("inverse", inverse_in, count);
    coupling = float32("coupling", coupling_in, num_columns * num_columns);
    if (previous_in) previous = float32("previous", *previous_in, count);
    rounded = empty_on_device_of(values, {num_columns, rows}, ScalarType::Float);
    change = empty_on_device_of(values, {num_columns, rows}, ScalarType::Float);
  }

  const float* previous_data() const { return previous ? previous->const_data_ptr<float>() : nullptr; }

  int64_t num_columns;
  int64_t rows;
  Tensor values, scales, inverse, coupling;
  std::optional<Tensor> previous;
  Tensor rounded, change;
};

// A matrix operand [..., width] as m rows, contiguous.
struct Rows {
  Rows(const char* op, const char* argument, const Tensor& tensor, int64_t width)
      : values(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor)),
        dtype(dtype_of(op, argument, tensor.scalar_type())),
        leading(tensor.sizes().begin(), tensor.sizes().end()) {
    STD_TORCH_CHECK(!leading.empty() && leading.back() == width, "qlora.", op, ": ", argument,
                    ": expected a last dimension of ", width, ", got ", leading.empty() ? 0 : leading.back());
    leading.pop_back();
    for (int64_t size : leading) m *= size;
  }

  // Uninitialised [..., width] of the same dtype.
  Tensor empty_beside(int64_t width) const {
    Shape shape = leading;
    shape.push_back(width);
    return empty_on_device_of(values, shape, values.scalar_type());
  }

  Tensor values;
  qlora_dtype dtype;
  Shape leading;
  int64_t m = 1;
};

// A LoRA adapter of a weight, of operator arguments; holds the contiguous tensors that its pointers point into.
class Lora {
 public:
  Lora(const char* op, const Tensor& a, const Tensor& b, double scaling, const Weight& weight, const Tensor& other)
      : a_(checked(op, "a", a, std::nullopt, other, 0)), b_(checked(op, "b", b, std::nullopt, other, 0)) {
    const int64_t rank = a.dim() == 2 ? a.size(0) : 0;
    STD_TORCH_CHECK(rank >= 1 && rank <= kMaxRank && a.size(1) == weight.cols(), "qlora.", op, ": a: expected [rank, ",
                    weight.cols(), "] with a rank of 1 to ", kMaxRank, ", got ", a.dim(), " sizes and ", a.numel(),
                    " values");
    STD_TORCH_CHECK(b.dim() == 2 && b.size(0) == weight.rows() && b.size(1) == rank, "qlora.", op, ": b: expected [",
                    weight.rows(), ", ", rank, "], got ", b.dim(), " sizes and ", b.numel(), " values");
    view_ = {a_.const_data_ptr(),
             b_.const_data_ptr(),
             dtype_of(op, "a", a.scalar_type()),
             dtype_of(op, "b", b.scalar_type()),
             rank,
             static_cast<float>(scaling)};
  }

  const qlora_lora* get() const { return &view_; }
  int64_t rank() const { return view_.rank; }
  int64_t left_stride() const { return left_columns(view_.rank); }
  Tensor empty_like_a() const { return empty_on_device_of(a_, sizes_of(a_), a_.scalar_type()); }
  Tensor empty_like_b() const { return empty_on_device_of(b_, sizes_of(b_), b_.scalar_type()); }

 private:
  static Shape sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

  Tensor a_;
  Tensor b_;
  qlora_lora view_{};
};

// The results of lora_linear_4bit_backward, uninitialised: of no values where not asked for.
struct LoraGradients {
  LoraGradients(const Rows& dy, const Weight& weight, const Lora& lora, bool needs_input, bool needs_adapter_input,
                bool needs_a, bool needs_b)
      : input(needs_input ? dy.empty_beside(weight.cols()) : none(dy)),
        adapter_input(needs_adapter_input ? dy.empty_beside(weight.cols()) : none(dy)),
        a(needs_a ? lora.empty_like_a() : none(dy)),
        b(needs_b ? lora.empty_like_b() : none(dy)) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor> zeros() {
    for (Tensor* tensor : {&input, &adapter_input, &a, &b}) torch::stable::zero_(*tensor);
    return all();
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor> all() const { return {input, adapter_input, a, b}; }

  Tensor input;
  Tensor adapter_input;
  Tensor a;
  Tensor b;

 private:
  static Tensor none(const Rows& dy) { return empty_on_device_of(dy.values, {0}, dy.values.scalar_type()); }
};

// The lists of a group's operator arguments, each as long as `rows`.
struct GroupLists {
  using Tensors = std::vector<Tensor>;

  Tensors packed;
  Tensors absmax;
  Tensors nested_absmax;  // empty where the scales are plain, as the next two
  Tensors nested_quant_map;
  Tensors nested_offset;
  Tensors bias;
  Shape biased;  // indices of the weights that have one
  Shape rows;

  void check(const char* op, const Tensor& input) const {
    STD_TORCH_CHECK(input.dim() > 0, "qlora.", op, ": input: expected at least one dimension, got a scalar");
    const auto check_size = [&](const char* argument, size_t size) {
      STD_TORCH_CHECK(size == rows.size(), "qlora.", op, ": ", argument, ": expected ", rows.size(),
                      " items, one a weight, got ", size);
    };
    check_size("packed", packed.size());
    check_size("absmax", absmax.size());
    STD_TORCH_CHECK(bias.size() == biased.size(), "qlora.", op, ": bias: expected ", biased.size(),
                    " tensors, one for each index in biased, got ", bias.size());
    for (int64_t i : biased) {
      STD_TORCH_CHECK(i >= 0 && i < static_cast<int64_t>(rows.size()), "qlora.", op,
                      ": biased: expected indices from 0 to ", rows.size(), " - 1, got ", i);
    }
    STD_TORCH_CHECK(!nested_absmax.empty() || (nested_quant_map.empty() && nested_offset.empty()), "qlora.", op,
                    ": nested_absmax: expected beside nested_quant_map and nested_offset, got an empty list");
    if (nested_absmax.empty()) return;
    check_size("nested_absmax", nested_absmax.size());
    check_size("nested_quant_map", nested_quant_map.size());
    check_size("nested_offset", nested_offset.size());
  }

  std::optional<Tensor> nested(const Tensors& tensors, size_t i) const {
    return nested_absmax.empty() ? std::nullopt : std::optional<Tensor>(tensors[i]);
  }

  // Of each weight.
  std::vector<std::optional<Tensor>> biases() const {
    std::vector<std::optional<Tensor>> all(rows.size());
    for (size_t i = 0; i < biased.size(); ++i) all[static_cast<size_t>(biased[i])] = bias[i];
    return all;
  }
};

inline void check_matrix(const char* op, const Shape& shape) {
  STD_TORCH_CHECK(shape.size() == 2, "qlora.", op, ": shape: expected [rows, cols], got ", shape.size(), " sizes");
}

}  // namespace qlora::torch_ops
