// Launching a kernel, checked: failures name the kernel. Only .cu files include this.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "core/format.h"
#include "cuda/error.h"

namespace qlora {

inline constexpr int64_t kMaxGridX = 2147483647;
inline constexpr int64_t kMaxGridY = 65535;

// Blocks for `work` items at `per_block` each, at most `limit`: a kernel that may have more strides over the grid.
inline unsigned grid_size(int64_t work, int64_t per_block, int64_t limit = kMaxGridX) {
  return static_cast<unsigned>(std::min(ceil_div(work, per_block), limit));
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
            Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

}  // namespace qlora
