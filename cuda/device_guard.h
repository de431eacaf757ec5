// The device of a call: its validity, the attributes that kernels choose by, and making it current for the thread.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/error.h"

namespace qlora {

struct Device {
  int index;
  int major;  // compute capability
  int minor;
  int num_multiprocessors;
  int64_t l2_bytes;
  int64_t max_shared_bytes;       // of a block that opts in
  int64_t reserved_shared_bytes;  // before a block's own
};

// Attributes of device `index`, queried once per process. Throws QLORA_INVALID_ARGUMENT for an index without a device.
const Device& find_device(const char* op, int32_t index);

// Makes a device current for the calling thread and restores the former one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check_cuda(cudaGetDevice(&former_), "cudaGetDevice");
    if (former_ != device_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (former_ != device_) (void)cudaSetDevice(former_);  // A destructor cannot report; the device was current before.
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int former_ = 0;
};

}  // namespace qlora
