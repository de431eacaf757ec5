// What is asked of the CUDA runtime once for each device and kernel, and remembered for the process.
#pragma once

#include "cuda/device_guard.h"

namespace qlora {

// compute(kernel, detail) of the first call with these arguments, for which `device` is made current. `compute` itself
// is one of the arguments.
int remember(const Device& device, const void* kernel, int detail, int (*compute)(const void* kernel, int detail));

// Whether the code of `kernel` that `device` runs was compiled for compute capability 9.0 or newer: a library built
// without it brings PTX of an older one, which the driver compiles for the device.
bool is_compiled_for_sm90(const Device& device, const void* kernel);

// Lets blocks of `kernel` have that much dynamic shared memory.
void allow_shared_bytes(const Device& device, const void* kernel, int bytes);

}  // namespace qlora
