#include "cuda/device_guard.h"

#include <vector>

namespace qlora {
namespace {

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

std::vector<Device> find_devices() {
  int count = 0;
  check_cuda(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  std::vector<Device> devices;
  for (int index = 0; index < count; ++index) {
    devices.push_back({index, attribute(cudaDevAttrComputeCapabilityMajor, index),
                       attribute(cudaDevAttrComputeCapabilityMinor, index),
                       attribute(cudaDevAttrMultiProcessorCount, index), attribute(cudaDevAttrL2CacheSize, index),
                       attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
                       attribute(cudaDevAttrReservedSharedMemoryPerBlock, index)});
  }
  return devices;
}

}  // namespace

const Device& find_device(const char* op, int32_t index) {
  static const std::vector<Device> devices = find_devices();  // A throwing initialisation is tried again next time.
  expect(index >= 0 && index < static_cast<int64_t>(devices.size()), op, ": device: expected an index below ",
         devices.size(), ", got ", index);
  return devices[static_cast<size_t>(index)];
}

}  // namespace qlora
