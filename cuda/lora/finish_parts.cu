// The parts of a projection and of a gradient (adapter_pass.cu), added up in their order, both by one launch.
#include "cuda/device/numeric.cuh"
#include "cuda/device/parts.cuh"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/lora/finish_parts.h"

namespace qlora::lora {
namespace {

constexpr int kThreads = 128;
constexpr int kLoads = 8;  // parts on their way at once

// sums [kCount] of parts `stride` floats apart.
template <int kCount>
__device__ __forceinline__ void add_up(const float* parts, int num_parts, int64_t stride, float (&sums)[kCount]) {
  add_up_parts<kLoads>(num_parts, sums,
                       [&](int part, auto& values) { load_floats<kCount>(parts + part * stride, values); });
}

// A thread 4 columns of the projection.
template <typename T>
__device__ __forceinline__ void finish_projection(const ProjectionParts& projection, int64_t index, int64_t rank) {
  const int fours = static_cast<int>(projection.stride) / 4;
  const int64_t row = index / fours;
  const int col = static_cast<int>(index % fours) * 4;
  if (row >= projection.m) return;
  const Parts& parts = projection.parts;
  float sums[4] = {};
  if (col < rank) {
    add_up(parts.values + row * parts.padded_rank + col, parts.count, projection.m * parts.padded_rank, sums);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] = col + i < rank ? projection.scaling * sums[i] : 0.0f;
  *reinterpret_cast<uint2*>(static_cast<T*>(projection.output) + row * projection.stride + col) =
      make_uint2(Word<T>::pack(sums), Word<T>::pack(sums + 2));
}

// A thread 8 ranks of the gradient.
template <typename T>
__device__ __forceinline__ void finish_gradient(const GradientParts& gradient, int64_t index, int64_t rank) {
  const Parts& parts = gradient.parts;
  const int num_groups = parts.padded_rank / 8;
  // Threads that are neighbours write what is.
  const bool is_rank_fast = gradient.target.rank_stride == 1;
  const int64_t col = is_rank_fast ? index / num_groups : index % gradient.cols;
  const int first = static_cast<int>(is_rank_fast ? index % num_groups : index / gradient.cols) * 8;
  if (col >= gradient.cols || first >= rank) return;
  float sums[8] = {};
  add_up(parts.values + col * parts.padded_rank + first, parts.count, gradient.cols * parts.padded_rank, sums);
  T* const output = static_cast<T*>(const_cast<void*>(gradient.target.values)) + col * gradient.target.col_stride;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (first + i < rank) output[(first + i) * gradient.target.rank_stride] = from_float<T>(sums[i]);
  }
}

// The first blocks have the projection, the others the gradient.
template <typename T, typename Gradient>
__global__ __launch_bounds__(kThreads) void finish_parts_kernel(const __grid_constant__ ProjectionParts projection,
                                                                const __grid_constant__ GradientParts gradient,
                                                                int64_t rank, unsigned num_projection_blocks) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
  if (blockIdx.x < num_projection_blocks) {
    finish_projection<T>(projection, int64_t{blockIdx.x} * kThreads + threadIdx.x, rank);
  } else {
    finish_gradient<Gradient>(gradient, int64_t{blockIdx.x - num_projection_blocks} * kThreads + threadIdx.x, rank);
  }
}

}  // namespace

void finish_parts(const ProjectionParts& projection, const GradientParts& gradient, int64_t rank, qlora_dtype dtype,
                  const Device& device, cudaStream_t stream) {
  unsigned projection_blocks = 0;
  unsigned gradient_blocks = 0;
  if (projection.parts.values != nullptr) {
    projection_blocks = grid_size(projection.m * (projection.stride / 4), kThreads);
  }
  if (gradient.parts.values != nullptr) {
    gradient_blocks = grid_size(gradient.cols * (gradient.parts.padded_rank / 8), kThreads);
  }
  if (projection_blocks + gradient_blocks == 0) return;
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      dispatch_dtype(static_cast<qlora_dtype>(gradient.target.dtype), [&](auto gradient_type) {
        using Gradient = typename decltype(gradient_type)::type;
        launch_early("finish_parts_kernel", finish_parts_kernel<T, Gradient>,
                     LaunchShape{projection_blocks + gradient_blocks, kThreads}, device, stream, projection, gradient,
                     rank, projection_blocks);
      });
    }
  });
}

}  // namespace qlora::lora
