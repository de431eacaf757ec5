#include <algorithm>

#include "cuda/device/numeric.cuh"
#include "cuda/device/parts.cuh"
#include "cuda/dispatch.h"
#include "cuda/gemm/split.h"
#include "cuda/launch.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

constexpr int kThreads = 128;          // few enough for a block beside one of the kernel that writes the parts
constexpr int kLoads = 4;              // on their way at once
constexpr double kStepsOfAPart = 1.5;  // that writing and adding up a part of a tile costs

// 4 neighbouring values of a part, the first of index `index` of the output.
template <bool kIsDealt>
__device__ __forceinline__ void load_four(const float* part, int64_t index, float (&values)[4]) {
  if constexpr (kIsDealt) {
    const float* const source = part + index / 32 * 32 + index % 32 / 2;
    *reinterpret_cast<float2*>(values) = *reinterpret_cast<const float2*>(source);
    *reinterpret_cast<float2*>(values + 2) = *reinterpret_cast<const float2*>(source + 16);
  } else {
    *reinterpret_cast<float4*>(values) = *reinterpret_cast<const float4*>(part + index);
  }
}

// Each thread kValues values of the output, which do not cross a row.
template <typename T, int kValues, bool kIsDealt>
__global__ __launch_bounds__(kThreads) void add_parts_kernel(const float* __restrict__ parts, int num_parts,
                                                             int64_t count, int64_t width, const T* __restrict__ bias,
                                                             T* __restrict__ output, bool is_aligned) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
  const int64_t index = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kValues;
  if (index >= count) return;
  float sums[kValues] = {};
  add_up_parts<kLoads>(num_parts, sums, [&](int part, auto& values) {
    const float* const from = parts + part * count;
    if constexpr (kValues == 4) {
      load_four<kIsDealt>(from, index, values);
    } else {
      values[0] = from[index];
    }
  });
  T values[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    values[i] = from_float<T>(bias == nullptr ? sums[i] : sums[i] + to_float(bias[index % width + i]));
  }
  if (kValues == 4 && is_aligned) {
    *reinterpret_cast<uint2*>(output + index) = *reinterpret_cast<const uint2*>(values);
  } else {
#pragma unroll
    for (int i = 0; i < kValues; ++i) output[index + i] = values[i];
  }
}

template <typename T, int kValues, bool kIsDealt>
void launch_add_parts(const float* parts, int num_parts, int64_t m, int64_t width, const void* bias, void* output,
                      const Device& device, cudaStream_t stream) {
  const int64_t count = m * width;
  launch_early("add_parts_kernel", add_parts_kernel<T, kValues, kIsDealt>,
               LaunchShape{grid_size(count, kThreads * kValues), kThreads}, device, stream, parts, num_parts, count,
               width, static_cast<const T*>(bias), static_cast<T*>(output), is_aligned(output, 8));
}

}  // namespace

int best_num_parts(int64_t num_tiles, int64_t num_steps, int num_multiprocessors, int max_parts) {
  int best = 1;
  double least = 0.0;
  for (int parts = 1; parts <= std::min<int64_t>(max_parts, num_steps); ++parts) {
    const auto waves = static_cast<double>(ceil_div(num_tiles * parts, num_multiprocessors));
    const double cost = waves * (static_cast<double>(ceil_div(num_steps, parts)) + (parts > 1 ? kStepsOfAPart : 0.0));
    if (parts == 1 || cost < least) {
      best = parts;
      least = cost;
    }
  }
  return best;
}

void add_parts(const float* parts, int num_parts, int64_t m, int64_t width, const void* bias, void* output,
               qlora_dtype dtype, const Device& device, cudaStream_t stream) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      const auto launch = width % 4 == 0 ? launch_add_parts<T, 4, false> : launch_add_parts<T, 1, false>;
      launch(parts, num_parts, m, width, bias, output, device, stream);
    }
  });
}

void add_dealt_parts(const float* parts, int num_parts, int64_t m, int64_t width, void* output, qlora_dtype dtype,
                     const Device& device, cudaStream_t stream) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      launch_add_parts<T, 4, true>(parts, num_parts, m, width, nullptr, output, device, stream);
    }
  });
}

}  // namespace qlora
