// The operators of qlora.h for arrays of any library, named as in cpp/torch/schema.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace qlora::python {

void register_operators(pybind11::module_& module);

}  // namespace qlora::python
