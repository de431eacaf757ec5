// Every operator does four things in this order: borrow and check, output, call, return.
#include "python/operators.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "core/format.h"
#include "python/arguments.h"
#include "python/parallel.h"

namespace qlora::python {
namespace {

// Values of work below which another thread costs more than it brings.
constexpr std::int64_t kMinValues = 1 << 16;
constexpr std::int64_t kMinProducts = 1 << 20;

std::int64_t units_for(std::int64_t work, std::int64_t work_per_unit) {
  return std::max<std::int64_t>(1, work / std::max<std::int64_t>(1, work_per_unit));
}

using Pair = std::optional<std::pair<py::object, py::object>>;

py::object first_of(const Pair& out) { return out ? out->first : py::none(); }
py::object second_of(const Pair& out) { return out ? out->second : py::none(); }

py::tuple quantize_4bit(const py::object& input, std::int64_t block_size, const std::string& quant_type,
                        const Pair& out, const py::object& stream, int num_threads) {
  Call call("quantize_4bit", stream);
  check_block_size(call.op(), block_size);
  const qlora_format format = format_of(call.op(), quant_type);
  const Array x = call.floating("input", call.input("input", input));
  const std::int64_t n = x.count();
  const std::int64_t blocks = num_blocks(n, block_size);

  const auto packed = call.output("out[0]", first_of(out), {num_packed_bytes(n), 1}, DType::kUInt8);
  const auto absmax = call.output("out[1]", second_of(out), {blocks}, DType::kFloat32);
  auto* const packed_data = static_cast<std::uint8_t*>(packed.data);
  auto* const absmax_data = static_cast<float*>(absmax.data);

  if (call.is_cuda()) {
    check(qlora_quantize_4bit_cuda(x.data, c_dtype(x.dtype), n, block_size, format, packed_data, absmax_data,
                                   call.device(), call.stream()));
  } else {
    parallel_for(blocks, units_for(kMinValues, block_size), num_threads, [&](std::int64_t begin, std::int64_t end) {
      return qlora_quantize_4bit_cpu(x.data, c_dtype(x.dtype), n, block_size, format, packed_data, absmax_data, begin,
                                     end);
    });
  }
  return py::make_tuple(packed.object, absmax.object);
}

py::object dequantize_4bit(const WeightArguments& arguments, const std::string& dtype_name, const py::object& out,
                           const py::object& stream, int num_threads) {
  Call call("dequantize_4bit", stream);
  const DType dtype = floating_dtype(call.op(), dtype_name);
  const qlora_weight_4bit weight = weight_of(call, arguments);
  const auto y = call.output("out", out, {weight.rows, weight.cols}, dtype);

  if (call.is_cuda()) {
    check(qlora_dequantize_4bit_cuda(&weight, y.data, c_dtype(dtype), call.device(), call.stream()));
  } else {
    parallel_for(num_blocks(weight.rows * weight.cols, weight.block_size), units_for(kMinValues, weight.block_size),
                 num_threads, [&](std::int64_t begin, std::int64_t end) {
                   return qlora_dequantize_4bit_cpu(&weight, y.data, c_dtype(dtype), begin, end);
                 });
  }
  return y.object;
}

py::tuple quantize_absmax(const py::object& absmax, const py::object& nested_offset, const py::object& nested_quant_map,
                          const Pair& out, const py::object& stream, int num_threads) {
  Call call("quantize_absmax", stream);
  const Array scales = call.input("absmax", absmax);
  if (scales.dtype != DType::kFloat32) fail_value(call.op(), "absmax", "float32", name_of(scales.dtype));
  const std::int64_t n = scales.count();
  const std::int64_t groups = num_nested_blocks(n);
  const Array offset = call.input("nested_offset", nested_offset, DType::kFloat32, 1);
  const Array code = call.input("nested_quant_map", nested_quant_map, DType::kFloat32, 256);

  const auto codes = call.output("out[0]", first_of(out), {n}, DType::kUInt8);
  const auto nested = call.output("out[1]", second_of(out), {groups}, DType::kFloat32);
  const auto* const absmax_data = static_cast<const float*>(scales.data);
  const auto* const offset_data = static_cast<const float*>(offset.data);
  const auto* const code_data = static_cast<const float*>(code.data);
  auto* const codes_data = static_cast<std::uint8_t*>(codes.data);
  auto* const nested_data = static_cast<float*>(nested.data);

  if (call.is_cuda()) {
    check(qlora_quantize_absmax_cuda(absmax_data, n, offset_data, code_data, codes_data, nested_data, call.device(),
                                     call.stream()));
  } else {
    parallel_for(
        groups, units_for(kMinValues, kNestedBlockSize), num_threads, [&](std::int64_t begin, std::int64_t end) {
          return qlora_quantize_absmax_cpu(absmax_data, n, offset_data, code_data, codes_data, nested_data, begin, end);
        });
  }
  return py::make_tuple(codes.object, nested.object);
}

py::object dequantize_absmax(const py::object& absmax, const py::object& nested_absmax,
                             const py::object& nested_quant_map, const py::object& nested_offset, const py::object& out,
                             const py::object& stream, int num_threads) {
  Call call("dequantize_absmax", stream);
  const Array codes = call.input("absmax", absmax);
  if (codes.dtype != DType::kUInt8) fail_value(call.op(), "absmax", "uint8", name_of(codes.dtype));
  const std::int64_t n = codes.count();
  const Array nested = call.input("nested_absmax", nested_absmax, DType::kFloat32, num_nested_blocks(n));
  const Array code = call.input("nested_quant_map", nested_quant_map, DType::kFloat32, 256);
  const Array offset = call.input("nested_offset", nested_offset, DType::kFloat32, 1);

  const auto scales = call.output("out", out, {n}, DType::kFloat32);
  const auto* const codes_data = static_cast<const std::uint8_t*>(codes.data);
  const auto* const nested_data = static_cast<const float*>(nested.data);
  const auto* const code_data = static_cast<const float*>(code.data);
  const auto* const offset_data = static_cast<const float*>(offset.data);
  auto* const scales_data = static_cast<float*>(scales.data);

  if (call.is_cuda()) {
    check(qlora_dequantize_absmax_cuda(codes_data, n, nested_data, code_data, offset_data, scales_data, call.device(),
                                       call.stream()));
  } else {
    parallel_for(n, kMinValues, num_threads, [&](std::int64_t begin, std::int64_t end) {
      return qlora_dequantize_absmax_cpu(codes_data, n, nested_data, code_data, offset_data, scales_data, begin, end);
    });
  }
  return scales.object;
}

struct Workspace {
  void* data = nullptr;
  std::int64_t size = 0;
};

// CUDA only: the caller's memory, as large as the kernel asks for.
Workspace workspace_of(Call& call, const qlora_weight_4bit& weight, std::int64_t m, DType dtype, bool is_grad,
                       bool has_bias, const py::object& object) {
  std::int64_t needed = 0;
  check(qlora_linear_4bit_workspace_size(&weight, m, c_dtype(dtype), is_grad, has_bias, call.device(), &needed));
  if (needed == 0) return {};
  const std::string expected =
      "at least " + std::to_string(needed) + " bytes on the device (linear_4bit_workspace_size)";
  if (object.is_none()) fail_value(call.op(), "workspace", expected, "None");
  const Array array = call.input("workspace", object);
  const std::int64_t bytes = array.count() * array.item_bytes;
  if (bytes < needed) fail_value(call.op(), "workspace", expected, std::to_string(bytes) + " bytes");
  return {array.data, bytes};
}

// x [..., k] -> y [..., n], or with is_grad dy [..., n] -> dx [..., k].
py::object linear(const char* op, bool is_grad, const py::object& input, const WeightArguments& arguments,
                  const py::object& bias, const py::object& out, const py::object& workspace, const py::object& stream,
                  int num_threads) {
  Call call(op, stream);
  const char* const name = is_grad ? "grad_output" : "input";
  const Array x = call.floating(name, call.input(name, input));
  const qlora_weight_4bit weight = weight_of(call, arguments);
  const std::int64_t inner = is_grad ? weight.rows : weight.cols;
  const std::int64_t outer = is_grad ? weight.cols : weight.rows;
  if (x.shape.empty() || x.shape.back() != inner) {
    fail_value(call.op(), name, "[..., " + std::to_string(inner) + "]", text_of(x.shape));
  }
  const std::int64_t m = count_of(Shape(x.shape.begin(), x.shape.end() - 1));
  const qlora_dtype dtype = c_dtype(x.dtype);
  const void* const bias_data = bias.is_none() ? nullptr : call.input("bias", bias, x.dtype, weight.rows).data;
  Shape shape = x.shape;
  shape.back() = outer;
  const auto y = call.output("out", out, shape, x.dtype);

  if (call.is_cuda()) {
    const Workspace space = workspace_of(call, weight, m, x.dtype, is_grad, bias_data != nullptr, workspace);
    check(is_grad ? qlora_linear_4bit_grad_input_cuda(x.data, m, dtype, &weight, y.data, space.data, space.size,
                                                      call.device(), call.stream())
                  : qlora_linear_4bit_cuda(x.data, m, dtype, &weight, bias_data, y.data, space.data, space.size,
                                           call.device(), call.stream()));
  } else {
    parallel_for(outer, units_for(kMinProducts, m * inner), num_threads, [&](std::int64_t begin, std::int64_t end) {
      return is_grad ? qlora_linear_4bit_grad_input_cpu(x.data, m, dtype, &weight, y.data, begin, end)
                     : qlora_linear_4bit_cpu(x.data, m, dtype, &weight, bias_data, y.data, begin, end);
    });
  }
  return y.object;
}

std::int64_t linear_workspace_size(std::int64_t m, const std::pair<std::int64_t, std::int64_t>& shape,
                                   const std::string& dtype_name, std::int64_t block_size,
                                   const std::string& quant_type, bool is_nested, bool is_grad, bool has_bias,
                                   std::int32_t device) {
  const std::string op = "linear_4bit_workspace_size";
  check_block_size(op, block_size);
  const std::uint8_t codes = 0;  // Only whether the pointers are null is read.
  const float scale = 0;
  qlora_weight_4bit weight{&codes,  &scale,      nullptr,      nullptr,    nullptr,
                           nullptr, shape.first, shape.second, block_size, format_of(op, quant_type)};
  if (is_nested) {
    weight.absmax = nullptr;
    weight.absmax_codes = &codes;
    weight.nested_absmax = weight.nested_code = weight.nested_offset = &scale;
  }
  std::int64_t size = 0;
  check(qlora_linear_4bit_workspace_size(&weight, m, c_dtype(floating_dtype(op, dtype_name)), is_grad, has_bias, device,
                                         &size));
  return size;
}

py::object embedding_4bit(const py::object& indices, const WeightArguments& arguments, const std::string& dtype_name,
                          const py::object& out, const py::object& stream, int num_threads) {
  Call call("embedding_4bit", stream);
  const DType dtype = floating_dtype(call.op(), dtype_name);
  const Array index = call.input("indices", indices);
  if (index.dtype != DType::kInt64) fail_value(call.op(), "indices", "int64", name_of(index.dtype));
  const qlora_weight_4bit weight = weight_of(call, arguments);
  Shape shape = index.shape;
  shape.push_back(weight.cols);
  const auto y = call.output("out", out, shape, dtype);
  const auto* const index_data = static_cast<const std::int64_t*>(index.data);

  if (call.is_cuda()) {
    check(qlora_embedding_4bit_cuda(index_data, index.count(), &weight, y.data, c_dtype(dtype), call.device(),
                                    call.stream()));
  } else {
    parallel_for(
        index.count(), units_for(kMinValues, weight.cols), num_threads, [&](std::int64_t begin, std::int64_t end) {
          return qlora_embedding_4bit_cpu(index_data, index.count(), &weight, y.data, c_dtype(dtype), begin, end);
        });
  }
  return y.object;
}

}  // namespace

void register_operators(py::module_& module) {
  using py::arg;
  using py::kw_only;
  const py::object none = py::none();
  using Size = std::int64_t;
  using Sizes = std::pair<Size, Size>;
  using Object = py::object;
  using Text = std::string;

  module.def("quantize_4bit", quantize_4bit, arg("input"), arg("block_size") = 64, arg("quant_type") = "nf4", kw_only(),
             arg("out") = none, arg("stream") = none, arg("num_threads") = 0,
             "(packed uint8 [(n + 1) // 2, 1], absmax float32 [num_blocks]) of a float array; out=(packed, absmax).");
  module.def(
      "dequantize_4bit",
      [](Object packed, Object absmax, Sizes shape, Text dtype, Size block_size, Text quant_type, Object nested_absmax,
         Object nested_quant_map, Object nested_offset, Object out, Object stream, int num_threads) {
        return dequantize_4bit(
            {packed, absmax, nested_absmax, nested_quant_map, nested_offset, shape, block_size, quant_type}, dtype, out,
            stream, num_threads);
      },
      arg("packed"), arg("absmax"), arg("shape"), arg("dtype") = "float32", arg("block_size") = 64,
      arg("quant_type") = "nf4", kw_only(), arg("nested_absmax") = none, arg("nested_quant_map") = none,
      arg("nested_offset") = none, arg("out") = none, arg("stream") = none, arg("num_threads") = 0,
      "The weight [rows, cols] as dtype.");
  module.def("quantize_absmax", quantize_absmax, arg("absmax"), arg("nested_offset"), arg("nested_quant_map"),
             kw_only(), arg("out") = none, arg("stream") = none, arg("num_threads") = 0,
             "(codes uint8 [n], nested_absmax float32 [ceil(n / 256)]) of scales; out=(codes, nested_absmax).");
  module.def("dequantize_absmax", dequantize_absmax, arg("absmax"), arg("nested_absmax"), arg("nested_quant_map"),
             arg("nested_offset"), kw_only(), arg("out") = none, arg("stream") = none, arg("num_threads") = 0,
             "The scales float32 [n] of uint8 codes.");
  module.def(
      "linear_4bit",
      [](Object input, Object packed, Object absmax, Sizes shape, Size block_size, Text quant_type,
         Object nested_absmax, Object nested_quant_map, Object nested_offset, Object bias, Object out, Object workspace,
         Object stream, int num_threads) {
        return linear("linear_4bit", false, input,
                      {packed, absmax, nested_absmax, nested_quant_map, nested_offset, shape, block_size, quant_type},
                      bias, out, workspace, stream, num_threads);
      },
      arg("input"), arg("packed"), arg("absmax"), arg("shape"), arg("block_size") = 64, arg("quant_type") = "nf4",
      kw_only(), arg("nested_absmax") = none, arg("nested_quant_map") = none, arg("nested_offset") = none,
      arg("bias") = none, arg("out") = none, arg("workspace") = none, arg("stream") = none, arg("num_threads") = 0,
      "y = x W^T + bias: [..., cols] -> [..., rows].");
  module.def(
      "linear_4bit_grad_input",
      [](Object grad_output, Object packed, Object absmax, Sizes shape, Size block_size, Text quant_type,
         Object nested_absmax, Object nested_quant_map, Object nested_offset, Object out, Object workspace,
         Object stream, int num_threads) {
        return linear("linear_4bit_grad_input", true, grad_output,
                      {packed, absmax, nested_absmax, nested_quant_map, nested_offset, shape, block_size, quant_type},
                      py::none(), out, workspace, stream, num_threads);
      },
      arg("grad_output"), arg("packed"), arg("absmax"), arg("shape"), arg("block_size") = 64, arg("quant_type") = "nf4",
      kw_only(), arg("nested_absmax") = none, arg("nested_quant_map") = none, arg("nested_offset") = none,
      arg("out") = none, arg("workspace") = none, arg("stream") = none, arg("num_threads") = 0,
      "dx = dy W: [..., rows] -> [..., cols].");
  module.def("linear_4bit_workspace_size", linear_workspace_size, arg("m"), arg("shape"), arg("dtype"),
             arg("block_size") = 64, arg("quant_type") = "nf4", kw_only(), arg("is_nested") = false,
             arg("is_grad") = false, arg("has_bias") = false, arg("device") = 0,
             "Bytes of device memory that linear_4bit (or its gradient) wants as workspace= on CUDA.");
  module.def(
      "embedding_4bit",
      [](Object indices, Object packed, Object absmax, Sizes shape, Text dtype, Size block_size, Text quant_type,
         Object nested_absmax, Object nested_quant_map, Object nested_offset, Object out, Object stream,
         int num_threads) {
        return embedding_4bit(
            indices, {packed, absmax, nested_absmax, nested_quant_map, nested_offset, shape, block_size, quant_type},
            dtype, out, stream, num_threads);
      },
      arg("indices"), arg("packed"), arg("absmax"), arg("shape"), arg("dtype") = "float32", arg("block_size") = 64,
      arg("quant_type") = "nf4", kw_only(), arg("nested_absmax") = none, arg("nested_quant_map") = none,
      arg("nested_offset") = none, arg("out") = none, arg("stream") = none, arg("num_threads") = 0,
      "Dequantised rows of the weight: int64 [...] -> [..., cols] of dtype.");
}

}  // namespace qlora::python
