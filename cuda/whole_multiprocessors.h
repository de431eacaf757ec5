// Kernels that take few multiprocessors, and these whole, beside a kernel that has the others.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"

namespace qlora {

// Shared memory of a block beside which neither another such block fits nor one of cuBLAS' large products.
inline constexpr int kWholeSharedBytes = 120 << 10;

// Launches a block on each of `multiprocessors`, in clusters of 4 or 2, if there are as many: a cluster is of one
// graphics processing cluster, so that clusters of other kernels still find theirs. Rounded down to whole clusters.
template <typename... Parameters, typename... Arguments>
void launch_on_few(const char* name, void (*kernel)(Parameters...), int multiprocessors, int threads, int shared_bytes,
                   const Device& device, cudaStream_t stream, Arguments&&... arguments) {
  const auto* const address = reinterpret_cast<const void*>(kernel);
  const bool has_clusters = device.major >= 9 && is_compiled_for_sm90(device, address);
  const int cluster = !has_clusters ? 1 : multiprocessors >= 4 ? 4 : multiprocessors >= 2 ? 2 : 1;
  const int bytes =
      static_cast<int>(std::min<int64_t>(std::max(shared_bytes, kWholeSharedBytes), device.max_shared_bytes));
  allow_shared_bytes(device, address, bytes);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::max(1, multiprocessors / cluster) * cluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

}  // namespace qlora
