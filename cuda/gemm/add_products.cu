#include "cuda/device/parts.cuh"
#include "cuda/dispatch.h"
#include "cuda/gemm/add_products.h"
#include "cuda/launch.h"

namespace qlora {
namespace {

// So few threads and registers that a block fits beside one of the kernel that writes the parts.
constexpr int kThreads = 64;
constexpr int kMinBlocks = 16;
constexpr int kLoads = 4;  // parts on their way at once

// Each warp 16 rows of the product by 16 tokens.
template <typename T>
__global__ __launch_bounds__(kThreads,
                             kMinBlocks) void add_products_kernel(const __grid_constant__ ProductTarget target,
                                                                  int num_parts) {
#if __CUDA_ARCH__ >= 900
  __shared__ __align__(16) unsigned char shared[kThreads / 32][kStoreBytes];
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
  const int num_token_groups = (target.m + kProductTokens - 1) / kProductTokens;
  const int warp = static_cast<int>(blockIdx.x * kThreads + threadIdx.x) / 32;
  const int first = warp / num_token_groups * kProductRows;
  const int token_group = warp % num_token_groups;
  if (first >= target.width) return;
  float sums[8] = {};
  add_up_parts<kLoads>(num_parts, sums, [&](int part, float (&values)[8]) {
    const float4* const place = find_part(target, part, first, token_group);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float4 four = place[32 * h];
      values[4 * h] = four.x;
      values[4 * h + 1] = four.y;
      values[4 * h + 2] = four.z;
      values[4 * h + 3] = four.w;
    }
  });
  store_product<T, kProductTokens>(sums, target, first, token_group, shared[threadIdx.x / 32]);
#else
  __trap();  // Kernels of sm_90 alone write such parts.
#endif
}

}  // namespace

void add_products(const ProductTarget& target, int num_parts, qlora_dtype dtype, const Device& device,
                  cudaStream_t stream) {
  const int64_t num_warps = num_part_floats(target.m, target.width) / (kProductRows * kProductTokens);
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      launch_early("add_products_kernel", add_products_kernel<T>,
                   LaunchShape{grid_size(num_warps, kThreads / 32), kThreads}, device, stream, target, num_parts);
    }
  });
}

}  // namespace qlora
