// How a failed CUDA call or launch becomes an Error(QLORA_CUDA_ERROR) that names the call or the kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "core/status.h"

namespace qlora {

// `what` names the call or the kernel. An asynchronous fault of earlier work surfaces at whichever call comes next.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // The runtime keeps it for the thread; the host framework must not find it later.
  if (error == cudaErrorNoKernelImageForDevice) {
    fail(QLORA_CUDA_ERROR, what, ": expected a GPU of the architectures built (", qlora_cuda_architectures(), "), got ",
         cudaGetErrorString(error));
  }
  fail(QLORA_CUDA_ERROR, what, ": expected success, got ", cudaGetErrorName(error), " (", cudaGetErrorString(error),
       ")");
}

}  // namespace qlora
