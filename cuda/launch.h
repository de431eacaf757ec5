// Launching a kernel, checked: failures name the kernel. Only .cu files include this.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "core/format.h"
#include "cuda/device_guard.h"
#include "cuda/error.h"
#include "cuda/remember.h"

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

struct LaunchShape {
  unsigned blocks;
  int threads;
  int shared_bytes = 0;  // dynamic
  int cluster = 1;       // blocks
};

// The same for a kernel that calls cudaGridDependencySynchronize before it reads or writes what kernels before it wrote
// or read: from sm_90 on it is set up while they still run. Code compiled for older GPUs, which a newer one may run,
// has no such call; it begins when they have ended.
template <typename... Parameters, typename... Arguments>
void launch_early(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, const Device& device,
                  cudaStream_t stream, Arguments&&... arguments) {
  std::array<cudaLaunchAttribute, 2> attributes = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = stream;
  config.attrs = attributes.data();
  const bool is_early = device.major >= 9 && is_compiled_for_sm90(device, reinterpret_cast<const void*>(kernel));
  config.numAttrs = !is_early ? 0 : shape.cluster > 1 ? 2 : 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

// Clusters of shape.cluster blocks of a kernel that run at once on the current device.
inline int count_clusters(const void* kernel, const LaunchShape& shape) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(shape.cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.cluster));
  config.blockDim = dim3(static_cast<unsigned>(shape.threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "cudaOccupancyMaxActiveClusters");
  return count;
}

}  // namespace qlora
