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
  for (int part = 0; part < num_parts; part += kLoads) {
    float4 loaded[kLoads][2];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float4* const place = find_part(target, min(part + i, num_parts - 1), first, token_group);
      loaded[i][0] = place[0];
      loaded[i][1] = place[32];
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (part + i >= num_parts) break;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sums[4 * h] += loaded[i][h].x;
        sums[4 * h + 1] += loaded[i][h].y;
        sums[4 * h + 2] += loaded[i][h].z;
        sums[4 * h + 3] += loaded[i][h].w;
      }
    }
  }
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
