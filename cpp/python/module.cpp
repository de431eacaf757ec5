// qlora._qlora_ext: the core for arrays of any library, and what this build is. Works where torch is not installed.
#include <pybind11/pybind11.h>

#include "python/array.h"
#include "python/build_info.h"
#include "python/operators.h"

PYBIND11_MODULE(_qlora_ext, module) {
  qlora::python::register_array(module);
  qlora::python::register_operators(module);
  qlora::python::register_build_info(module);
}
