#include "python/arguments.h"

#include <limits>

#include "core/format.h"

namespace qlora::python {

Call::Call(std::string op, const py::object& stream)
    : op_(std::move(op)), stream_(stream.is_none() ? 1 : stream.cast<std::uintptr_t>()) {
  if (stream_ == 0) stream_ = 1;  // DLPack's name of the legacy default stream.
}

Array Call::input(const std::string& argument, const py::object& object) {
  Array array = borrow(op_, argument, object, stream_);
  if (where_.empty()) {
    where_ = array.where();
    is_cuda_ = array.is_cuda();
    device_ = array.device.index;
  } else if (array.where() != where_) {
    fail_value(op_, argument, "an array on " + where_ + " like the first one", "one on " + array.where());
  }
  held_.push_back(array);
  return array;
}

Array Call::input(const std::string& argument, const py::object& object, DType dtype, std::int64_t count) {
  Array array = input(argument, object);
  if (array.dtype != dtype) fail_value(op_, argument, name_of(dtype), name_of(array.dtype));
  if (array.count() != count) {
    fail_value(op_, argument, std::to_string(count) + " values", "shape " + text_of(array.shape));
  }
  return array;
}

const Array& Call::floating(const std::string& argument, const Array& array) const {
  if (array.dtype != DType::kFloat32 && array.dtype != DType::kFloat16 && array.dtype != DType::kBFloat16) {
    fail_value(op_, argument, "float32, float16 or bfloat16", name_of(array.dtype));
  }
  return array;
}

Call::Output Call::output(const std::string& argument, const py::object& object, const Shape& shape, DType dtype) {
  if (!object.is_none()) {
    const Array array = input(argument, object, dtype, count_of(shape));
    if (array.is_read_only) fail_value(op_, argument, "a writable array", "a read-only one");
    return {array.data, object};
  }
  if (is_cuda_) {
    fail_value(op_, argument,
               name_of(dtype) + std::string(" ") + text_of(shape) + " on " + where_ +
                   " to write to (device memory is never allocated here)",
               "None");
  }
  py::object fresh = py::cast(HostArray(shape, dtype));
  return {fresh.cast<HostArray&>().data(), fresh};
}

qlora_format format_of(const std::string& op, const std::string& quant_type) {
  if (quant_type == "nf4") return QLORA_NF4;
  if (quant_type == "fp4") return QLORA_FP4;
  fail_value(op, "quant_type", "'nf4' or 'fp4'", "'" + quant_type + "'");
}

qlora_dtype c_dtype(DType dtype) {
  return dtype == DType::kFloat16 ? QLORA_FLOAT16 : dtype == DType::kBFloat16 ? QLORA_BFLOAT16 : QLORA_FLOAT32;
}

void check_block_size(const std::string& op, std::int64_t block_size) {
  if (!is_valid_block_size(block_size)) {
    fail_value(op, "block_size", "a power of two from 32 to 4096", std::to_string(block_size));
  }
}

qlora_weight_4bit weight_of(Call& call, const WeightArguments& arguments) {
  const auto [rows, cols] = arguments.shape;
  const std::string& op = call.op();
  check_block_size(op, arguments.block_size);
  if (rows < 0 || cols < 0 || (cols > 0 && rows > std::numeric_limits<std::int64_t>::max() / 8 / cols)) {
    fail_value(op, "shape", "[rows, cols] of at least 0 and less than 2^60 values", text_of({rows, cols}));
  }
  const std::int64_t blocks = num_blocks(rows * cols, arguments.block_size);

  qlora_weight_4bit weight{};
  weight.rows = rows;
  weight.cols = cols;
  weight.block_size = arguments.block_size;
  weight.format = format_of(op, arguments.quant_type);

  const Array packed = call.input("packed", arguments.packed);
  if (packed.count() * packed.item_bytes < num_packed_bytes(rows * cols)) {
    fail_value(
        op, "packed",
        "at least " + std::to_string(num_packed_bytes(rows * cols)) + " bytes for shape " + text_of({rows, cols}),
        std::to_string(packed.count() * packed.item_bytes));
  }
  weight.packed = static_cast<const std::uint8_t*>(packed.data);

  const bool is_nested = !arguments.nested_absmax.is_none();
  const Array absmax = call.input("absmax", arguments.absmax, is_nested ? DType::kUInt8 : DType::kFloat32, blocks);
  if (!is_nested) {
    weight.absmax = static_cast<const float*>(absmax.data);
    return weight;
  }
  if (arguments.nested_quant_map.is_none() || arguments.nested_offset.is_none()) {
    fail_value(op, "nested_absmax", "nested_quant_map and nested_offset with it", "None for one of them");
  }
  const auto floats = [&](const char* argument, const py::object& object, std::int64_t count) {
    return static_cast<const float*>(call.input(argument, object, DType::kFloat32, count).data);
  };
  weight.absmax_codes = static_cast<const std::uint8_t*>(absmax.data);
  weight.nested_absmax = floats("nested_absmax", arguments.nested_absmax, num_nested_blocks(blocks));
  weight.nested_code = floats("nested_quant_map", arguments.nested_quant_map, 256);
  weight.nested_offset = floats("nested_offset", arguments.nested_offset, 1);
  return weight;
}

}  // namespace qlora::python
