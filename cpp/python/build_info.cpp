// QLORA_CXX_COMPILER, QLORA_CUDA_TOOLKIT ("" without CUDA) and QLORA_TORCH_HEADERS come from CMakeLists.txt.
#include "python/build_info.h"

#include <algorithm>
#include <string>

#include "core/format.h"
#include "python/array.h"
#include "python/dlpack.h"
#include "python/parallel.h"
#include "qlora/qlora.h"

namespace qlora::python {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = qlora_version();
  info["cuda_architectures"] = py::str(qlora_cuda_architectures()).attr("split")();
  info["cuda_toolkit"] = QLORA_CUDA_TOOLKIT;
  info["cxx_compiler"] = QLORA_CXX_COMPILER;
  info["torch_headers"] = QLORA_TORCH_HEADERS;
  info["cpu_kernels"] = qlora_cpu_kernels();
  return info;
}

py::list devices() {
  std::int32_t count = 0;
  check(qlora_device_count(&count));
  py::list list;
  for (std::int32_t device = 0; device < count; ++device) {
    qlora_device_properties properties;
    check(qlora_device_info(device, &properties));
    py::dict entry;
    entry["name"] = properties.name;
    entry["compute_capability"] = py::make_tuple(properties.major, properties.minor);
    entry["num_multiprocessors"] = properties.num_multiprocessors;
    entry["l2_bytes"] = properties.l2_bytes;
    entry["total_bytes"] = properties.total_bytes;
    entry["has_kernels"] = properties.has_kernels != 0;
    list.append(entry);
  }
  return list;
}

std::string explain_linear_4bit(std::int64_t m, const std::pair<std::int64_t, std::int64_t>& shape,
                                const std::string& dtype, bool is_grad, std::int32_t device) {
  const std::uint8_t codes = 0;  // Only whether the pointers are null is read.
  const float scale = 0;
  const qlora_weight_4bit weight{&codes,  &scale,      nullptr,      nullptr, nullptr,
                                 nullptr, shape.first, shape.second, 64,      QLORA_NF4};
  const DType type = floating_dtype("explain_linear_4bit", dtype);
  const qlora_dtype c_type = type == DType::kFloat16    ? QLORA_FLOAT16
                             : type == DType::kBFloat16 ? QLORA_BFLOAT16
                                                        : QLORA_FLOAT32;
  std::string text(4096, '\0');
  check(qlora_explain_linear_4bit(&weight, m, c_type, is_grad, device, text.data(),
                                  static_cast<std::int64_t>(text.size())));
  return text.c_str();
}

HostArray nested_code() {
  HostArray code({256}, DType::kFloat32);
  std::copy_n(qlora_nested_code(), 256, static_cast<float*>(code.data()));
  return code;
}

}  // namespace

void register_build_info(py::module_& module) {
  module.def("build_info", build_info, "Version, architectures, compilers and CPU kernels of this build.");
  module.def("devices", devices, "CUDA devices that this process sees, with what is known of each.");
  module.def("explain_linear_4bit", explain_linear_4bit, py::arg("m"), py::arg("shape"), py::arg("dtype") = "bfloat16",
             py::kw_only(), py::arg("is_grad") = false, py::arg("device") = 0,
             "Which CUDA kernel serves an NF4 linear of this shape, and why those before it do not.");
  module.def("nested_code", nested_code, "The code book of double-quantised scales, float32 [256].");
}

}  // namespace qlora::python
