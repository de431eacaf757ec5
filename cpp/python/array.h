// Arrays at the border to Python: borrowed from any object with __dlpack__, or host memory of our own that offers it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "python/dlpack.h"

namespace qlora::python {

namespace py = pybind11;

using Shape = std::vector<std::int64_t>;

enum class DType { kFloat32, kFloat16, kBFloat16, kUInt8, kInt64, kOther };

const char* name_of(DType dtype);                                 // As numpy has it: "float32".
DType floating_dtype(const std::string& op, const std::string&);  // ValueError unless float32, float16 or bfloat16.
std::int64_t size_of(DType dtype);
std::string text_of(const Shape& shape);  // "[2, 3]"
std::int64_t count_of(const Shape& shape);

// Raise "qlora.<op>: <argument>: expected <expected>, got <got>".
[[noreturn]] void fail_value(const std::string& op, const std::string& argument, const std::string& expected,
                             const std::string& got);
[[noreturn]] void fail_type(const std::string& op, const std::string& argument, const std::string& expected,
                            const std::string& got);

// A contiguous array of someone else, lent until this object dies (with the GIL held).
struct Array {
  void* data = nullptr;
  Shape shape;
  DType dtype = DType::kOther;
  std::int64_t item_bytes = 0;
  dlpack::Device device{dlpack::kCPU, 0};
  bool is_read_only = false;
  std::shared_ptr<void> lender;

  std::int64_t count() const { return count_of(shape); }
  bool is_cuda() const { return device.type == dlpack::kCUDA; }
  std::string where() const;  // "cpu" or "cuda:0"
};

// The stream (a cudaStream_t as an integer; 1 is the legacy default) is handed to the lender, which orders its own work
// before it. TypeError for objects without __dlpack__, ValueError for arrays that are not contiguous or not on CPU or
// CUDA.
Array borrow(const std::string& op, const std::string& argument, const py::object& object, std::uintptr_t stream);

// Host memory, 64-byte aligned, that exports itself through DLPack; what the operators return for inputs on the CPU.
class HostArray {
 public:
  HostArray(Shape shape, DType dtype);

  void* data() const { return data_.get(); }
  const Shape& shape() const { return shape_; }
  DType dtype() const { return dtype_; }
  std::int64_t num_bytes() const { return count_of(shape_) * size_of(dtype_); }

  // The array API's __dlpack__; a capsule with a version where max_version is at least (1, 0).
  py::capsule to_dlpack(const py::object& stream, const py::object& max_version, const py::object& device,
                        const py::object& copy) const;

 private:
  Shape shape_;
  DType dtype_;
  std::shared_ptr<void> data_;
};

void register_array(py::module_& module);

}  // namespace qlora::python
