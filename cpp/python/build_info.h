// What this build is and which devices it finds.
#pragma once

#include <pybind11/pybind11.h>

namespace qlora::python {

void register_build_info(pybind11::module_& module);

}  // namespace qlora::python
