// Arguments that the operators share: one call's device and stream, the parts of a 4-bit weight, outputs.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "python/array.h"
#include "qlora/qlora.h"

namespace qlora::python {

// One operator call: borrows arrays, holds them till its end, and sees that all live on one device.
class Call {
 public:
  // stream: a cudaStream_t as an integer, or None for the legacy default stream.
  Call(std::string op, const py::object& stream);

  const std::string& op() const { return op_; }
  Array input(const std::string& argument, const py::object& object);
  Array input(const std::string& argument, const py::object& object, DType dtype, std::int64_t count);
  const Array& floating(const std::string& argument, const Array& array) const;  // ValueError for another dtype.

  // The caller's `out`, or, on the CPU and for None, a fresh HostArray.
  struct Output {
    void* data;
    py::object object;
  };
  Output output(const std::string& argument, const py::object& object, const Shape& shape, DType dtype);

  bool is_cuda() const { return is_cuda_; }
  std::int32_t device() const { return device_; }
  qlora_stream stream() const { return reinterpret_cast<qlora_stream>(stream_); }

 private:
  std::string op_;
  std::uintptr_t stream_;
  std::string where_;
  bool is_cuda_ = false;
  std::int32_t device_ = 0;
  std::vector<Array> held_;
};

struct WeightArguments {
  py::object packed, absmax, nested_absmax, nested_quant_map, nested_offset;
  std::pair<std::int64_t, std::int64_t> shape;  // rows, cols
  std::int64_t block_size;
  std::string quant_type;
};

// Borrows a weight's parts and checks their sizes.
qlora_weight_4bit weight_of(Call& call, const WeightArguments& arguments);

qlora_format format_of(const std::string& op, const std::string& quant_type);
qlora_dtype c_dtype(DType dtype);
void check_block_size(const std::string& op, std::int64_t block_size);

}  // namespace qlora::python
