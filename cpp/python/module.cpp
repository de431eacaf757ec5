#include <pybind11/pybind11.h>

#include "qlora/qlora.h"

PYBIND11_MODULE(_qlora_ext, m) { m.def("version", [] { return qlora_version(); }); }
