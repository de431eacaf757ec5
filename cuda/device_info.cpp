// Devices and whether this build has code for them.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>

#include "core/status.h"
#include "qlora/qlora.h"

namespace {

void check_cuda(cudaError_t error, const char* call) {
  if (error != cudaSuccess) {
    qlora::fail(QLORA_CUDA_ERROR, "device_info: ", call, ": expected success, got ", cudaGetErrorString(error));
  }
}

int count_devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return count;
  (void)cudaGetLastError();  // The state is sticky per thread; a later launch must not find it.
  int driver = 0;
  const bool has_driver = cudaDriverGetVersion(&driver) == cudaSuccess && driver != 0;
  if (error == cudaErrorNoDevice || !has_driver) return 0;
  int runtime = 0;
  (void)cudaRuntimeGetVersion(&runtime);
  qlora::fail(QLORA_CUDA_ERROR, "device_count: expected a driver for CUDA ", runtime / 1000, ".", runtime / 10 % 100,
              ", got one for CUDA ", driver / 1000, ".", driver / 10 % 100, " (", cudaGetErrorString(error), ")");
}

// Machine code runs on its major version from its minor version up ("a": on exactly that one); PTX on all from there
// up.
bool has_kernels_for(int major, int minor) {
  std::istringstream list(qlora_cuda_architectures());
  for (std::string arch; list >> arch;) {
    const bool is_ptx = arch.rfind("compute_", 0) == 0;
    char* suffix = nullptr;
    const long number = std::strtol(arch.c_str() + std::strlen(is_ptx ? "compute_" : "sm_"), &suffix, 10);
    const long capability = 10L * major + minor;
    const bool runs = is_ptx           ? capability >= number
                      : *suffix == 'a' ? capability == number
                                       : number / 10 == major && capability >= number;
    if (runs) return true;
  }
  return false;
}

}  // namespace

qlora_status qlora_device_count(int32_t* count) {
  return qlora::guarded([&] {
    qlora::expect(count != nullptr, "device_count: count: expected a pointer, got null");
    *count = count_devices();
  });
}

qlora_status qlora_device_info(int32_t device, qlora_device_properties* properties) {
  return qlora::guarded([&] {
    qlora::expect(properties != nullptr, "device_info: properties: expected a pointer, got null");
    const int count = count_devices();
    qlora::expect(device >= 0 && device < count, "device_info: device: expected an index below ", count, ", got ",
                  device);
    cudaDeviceProp found;
    check_cuda(cudaGetDeviceProperties(&found, device), "cudaGetDeviceProperties");
    *properties = {};
    std::strncpy(properties->name, found.name, sizeof(properties->name) - 1);
    properties->major = found.major;
    properties->minor = found.minor;
    properties->num_multiprocessors = found.multiProcessorCount;
    properties->has_kernels = has_kernels_for(found.major, found.minor);
    properties->l2_bytes = found.l2CacheSize;
    properties->total_bytes = static_cast<int64_t>(found.totalGlobalMem);
  });
}
