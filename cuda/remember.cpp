#include "cuda/remember.h"

#include <cuda_runtime_api.h>

#include <mutex>
#include <vector>

#include "cuda/error.h"

namespace qlora {
namespace {

struct Entry {
  int device;
  const void* kernel;
  int detail;
  int (*compute)(const void* kernel, int detail);
  int value;
};

int ptx_version(const void* kernel, int) {
  cudaFuncAttributes attributes = {};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  return attributes.ptxVersion;
}

// The limit is the kernel's, whichever call sets it: another one may have more.
int raise_shared_bytes(const void* kernel, int bytes) {
  cudaFuncAttributes attributes = {};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  if (attributes.maxDynamicSharedSizeBytes >= bytes) return attributes.maxDynamicSharedSizeBytes;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
  return bytes;
}

}  // namespace

int remember(const Device& device, const void* kernel, int detail, int (*compute)(const void* kernel, int detail)) {
  static std::mutex mutex;
  static auto* const entries =
      new std::vector<Entry>;  // Never destroyed: kernels may be launched while the process ends.
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Entry& entry : *entries) {
    if (entry.kernel == kernel && entry.device == device.index && entry.detail == detail && entry.compute == compute) {
      return entry.value;
    }
  }
  const DeviceGuard guard(device.index);
  const int value = compute(kernel, detail);
  entries->push_back({device.index, kernel, detail, compute, value});
  return value;
}

bool is_compiled_for_sm90(const Device& device, const void* kernel) {
  return remember(device, kernel, 0, ptx_version) >= 90;
}

void allow_shared_bytes(const Device& device, const void* kernel, int bytes) {
  remember(device, kernel, bytes, raise_shared_bytes);
}

}  // namespace qlora
