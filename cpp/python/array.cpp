#include "python/array.h"

#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace qlora::python {
namespace {

using dlpack::Managed;
using dlpack::ManagedVersioned;
using dlpack::Tensor;
using dlpack::Type;

constexpr std::int64_t kAlignment = 64;
constexpr const char* kCapsule = "dltensor";
constexpr const char* kUsedCapsule = "used_dltensor";
constexpr const char* kCapsuleVersioned = "dltensor_versioned";
constexpr const char* kUsedCapsuleVersioned = "used_dltensor_versioned";

DType dtype_of(const Type& type) {
  if (type.lanes != 1) return DType::kOther;
  if (type.code == dlpack::kFloat && type.bits == 32) return DType::kFloat32;
  if (type.code == dlpack::kFloat && type.bits == 16) return DType::kFloat16;
  if (type.code == dlpack::kBfloat && type.bits == 16) return DType::kBFloat16;
  if (type.code == dlpack::kUInt && type.bits == 8) return DType::kUInt8;
  if (type.code == dlpack::kInt && type.bits == 64) return DType::kInt64;
  return DType::kOther;
}

Type type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return {dlpack::kFloat, 32, 1};
    case DType::kFloat16:
      return {dlpack::kFloat, 16, 1};
    case DType::kBFloat16:
      return {dlpack::kBfloat, 16, 1};
    case DType::kUInt8:
      return {dlpack::kUInt, 8, 1};
    default:
      return {dlpack::kInt, 64, 1};
  }
}

bool is_contiguous(const Tensor& tensor) {
  if (tensor.strides == nullptr) return true;
  std::int64_t expected = 1;
  bool is_packed = true;
  for (int i = tensor.num_dims - 1; i >= 0; --i) {
    if (tensor.shape[i] == 0) return true;
    if (tensor.shape[i] != 1 && tensor.strides[i] != expected) is_packed = false;
    expected *= tensor.shape[i];
  }
  return is_packed;
}

py::object call_dlpack(const py::object& object, bool is_cuda, std::uintptr_t stream) {
  const py::object method = object.attr("__dlpack__");
  py::dict options;
  if (is_cuda) options["stream"] = stream;
  py::dict versioned(**options);
  versioned["max_version"] = py::make_tuple(dlpack::kMajor, dlpack::kMinor);
  try {
    return method(**versioned);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;  // A library from before DLPack 1.0 knows no max_version.
  }
  return method(**options);
}

// Takes the capsule over, as the protocol asks: renamed, and its deleter ours to call.
template <typename M>
std::shared_ptr<void> take(const py::object& capsule, const char* name, const char* used_name, M** managed) {
  *managed = static_cast<M*>(PyCapsule_GetPointer(capsule.ptr(), name));
  if (*managed == nullptr || PyCapsule_SetName(capsule.ptr(), used_name) != 0) throw py::error_already_set();
  return std::shared_ptr<void>(*managed, [](void* pointer) {
    M* taken = static_cast<M*>(pointer);
    if (taken->deleter != nullptr) taken->deleter(taken);
  });
}

// What an exported capsule keeps alive.
template <typename M>
struct Export {
  M managed{};
  Shape shape;
  Shape strides;
  std::shared_ptr<void> data;
};

template <typename M>
py::capsule make_capsule(const Shape& shape, DType dtype, std::shared_ptr<void> data, const char* name,
                         std::uint64_t flags) {
  auto* out = new Export<M>{{}, shape, Shape(shape.size(), 1), std::move(data)};
  for (std::size_t i = shape.size(); i-- > 1;) out->strides[i - 1] = out->strides[i] * shape[i];
  out->managed.tensor = {out->data.get(),  {dlpack::kCPU, 0}, static_cast<std::int32_t>(shape.size()),
                         type_of(dtype),   out->shape.data(), out->strides.data(),
                         /*byte_offset=*/0};
  out->managed.context = out;
  out->managed.deleter = [](M* self) { delete static_cast<Export<M>*>(self->context); };
  if constexpr (std::is_same_v<M, ManagedVersioned>) {
    out->managed.major = dlpack::kMajor;
    out->managed.minor = dlpack::kMinor;
    out->managed.flags = flags;
  }
  // An untaken capsule still bears its first name and frees itself.
  return py::reinterpret_steal<py::capsule>(PyCapsule_New(&out->managed, name, [](PyObject* object) {
    for (const char* untaken : {kCapsule, kCapsuleVersioned}) {
      if (!PyCapsule_IsValid(object, untaken)) continue;
      M* managed = static_cast<M*>(PyCapsule_GetPointer(object, untaken));
      managed->deleter(managed);
      return;
    }
  }));
}

}  // namespace

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kUInt8:
      return "uint8";
    case DType::kInt64:
      return "int64";
    case DType::kOther:
      break;
  }
  return "another dtype";
}

DType floating_dtype(const std::string& op, const std::string& name) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    if (name == name_of(dtype)) return dtype;
  }
  fail_value(op, "dtype", "'float32', 'float16' or 'bfloat16'", "'" + name + "'");
}

std::int64_t size_of(DType dtype) { return type_of(dtype).bits / 8; }

std::int64_t count_of(const Shape& shape) {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count *= size;
  return count;
}

std::string text_of(const Shape& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  return text + "]";
}

void fail_value(const std::string& op, const std::string& argument, const std::string& expected,
                const std::string& got) {
  throw py::value_error("qlora." + op + ": " + argument + ": expected " + expected + ", got " + got);
}

void fail_type(const std::string& op, const std::string& argument, const std::string& expected,
               const std::string& got) {
  throw py::type_error("qlora." + op + ": " + argument + ": expected " + expected + ", got " + got);
}

std::string Array::where() const { return is_cuda() ? "cuda:" + std::to_string(device.index) : "cpu"; }

Array borrow(const std::string& op, const std::string& argument, const py::object& object, std::uintptr_t stream) {
  if (!py::hasattr(object, "__dlpack__") || !py::hasattr(object, "__dlpack_device__")) {
    fail_type(op, argument, "an array with __dlpack__ (numpy, cupy, jax, torch)",
              py::str(py::type::handle_of(object).attr("__name__")));
  }
  const auto device = object.attr("__dlpack_device__")().cast<std::pair<int, int>>();
  const bool is_cuda = device.first == dlpack::kCUDA;
  if (!is_cuda && device.first != dlpack::kCPU && device.first != dlpack::kPinned) {
    fail_value(op, argument, "an array on CPU or CUDA", "one on DLPack device type " + std::to_string(device.first));
  }

  const py::object capsule = call_dlpack(object, is_cuda, stream);
  Array array;
  const Tensor* tensor = nullptr;
  if (PyCapsule_IsValid(capsule.ptr(), kCapsuleVersioned)) {
    ManagedVersioned* managed = nullptr;
    array.lender = take(capsule, kCapsuleVersioned, kUsedCapsuleVersioned, &managed);
    if (managed->major != dlpack::kMajor) {
      fail_value(op, argument, "DLPack 1.x", "DLPack " + std::to_string(managed->major) + ".x");
    }
    array.is_read_only = (managed->flags & dlpack::kReadOnly) != 0;
    tensor = &managed->tensor;
  } else {
    Managed* managed = nullptr;
    array.lender = take(capsule, kCapsule, kUsedCapsule, &managed);
    tensor = &managed->tensor;
  }

  array.shape.assign(tensor->shape, tensor->shape + tensor->num_dims);
  if (!is_contiguous(*tensor)) {
    fail_value(op, argument, "a C-contiguous array",
               "shape " + text_of(array.shape) + " with strides " +
                   text_of(Shape(tensor->strides, tensor->strides + tensor->num_dims)));
  }
  array.data = static_cast<char*>(tensor->data) + tensor->byte_offset;
  array.dtype = dtype_of(tensor->type);
  array.item_bytes = tensor->type.bits * tensor->type.lanes / 8;
  if (is_cuda) array.device = tensor->device;
  return array;
}

HostArray::HostArray(Shape shape, DType dtype) : shape_(std::move(shape)), dtype_(dtype) {
  const std::int64_t bytes = (num_bytes() + kAlignment) / kAlignment * kAlignment;  // At least one line: never null.
  data_ = std::shared_ptr<void>(std::aligned_alloc(kAlignment, static_cast<std::size_t>(bytes)), std::free);
  if (data_ == nullptr) throw std::bad_alloc();
}

py::capsule HostArray::to_dlpack(const py::object& stream, const py::object& max_version, const py::object& device,
                                 const py::object& copy) const {
  if (!stream.is_none()) fail_value("HostArray", "stream", "None for an array on the CPU", py::str(stream));
  if (!device.is_none() && device.cast<std::pair<int, int>>().first != dlpack::kCPU) {
    throw py::buffer_error("qlora.HostArray: dl_device: expected (1, 0), the CPU, got " +
                           py::str(device).cast<std::string>());
  }
  const bool is_copy = !copy.is_none() && copy.cast<bool>();
  std::shared_ptr<void> data = data_;
  if (is_copy) {
    const HostArray duplicate(shape_, dtype_);
    std::memcpy(duplicate.data(), data_.get(), static_cast<std::size_t>(num_bytes()));
    data = duplicate.data_;
  }
  const bool is_versioned = !max_version.is_none() && max_version.cast<std::pair<int, int>>().first >= 1;
  if (!is_versioned) return make_capsule<Managed>(shape_, dtype_, data, kCapsule, 0);
  return make_capsule<ManagedVersioned>(shape_, dtype_, data, kCapsuleVersioned, is_copy ? dlpack::kIsCopied : 0);
}

void register_array(py::module_& module) {
  py::class_<HostArray>(module, "HostArray", "Host memory that exports __dlpack__: numpy.from_dlpack(array) takes it.")
      .def_property_readonly("shape", [](const HostArray& self) { return py::tuple(py::cast(self.shape())); })
      .def_property_readonly("dtype", [](const HostArray& self) { return name_of(self.dtype()); })
      .def_property_readonly("nbytes", &HostArray::num_bytes)
      .def("__dlpack__", &HostArray::to_dlpack, py::kw_only(), py::arg("stream") = py::none(),
           py::arg("max_version") = py::none(), py::arg("dl_device") = py::none(), py::arg("copy") = py::none())
      .def("__dlpack_device__", [](const HostArray&) { return py::make_tuple(int{dlpack::kCPU}, 0); })
      .def("__repr__", [](const HostArray& self) {
        return "HostArray(shape=" + text_of(self.shape()) + ", dtype=" + name_of(self.dtype()) + ")";
      });
}

}  // namespace qlora::python
