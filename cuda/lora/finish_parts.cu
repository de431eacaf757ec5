// The parts of a projection and of a gradient (adapter_pass.cu), added up in their order, both by one launch.
#include "cuda/device/numeric.cuh"
#include "cuda/device/parts.cuh"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/lora/adapter_share.cuh"
#include "cuda/lora/finish_parts.h"

namespace qlora::lora {
namespace {

constexpr int kFinishThreads = 128;
constexpr int kLoads = 16;  // parts on their way at once

// sums [4] of `count` parts `stride` floats apart.
__device__ __forceinline__ void add_up(const float* parts, int count, int64_t stride, float (&sums)[4]) {
  add_up_parts<kLoads>(count, sums, [&](int part, auto& values) { load_floats<4>(parts + part * stride, values); });
}

// A thread 4 columns of the projection.
template <typename T>
__device__ __forceinline__ void finish_projection(const ProjectionParts& parts, int64_t index, int64_t rank) {
  const int fours = static_cast<int>(parts.stride) / 4;
  const int64_t row = index / fours;
  const int col = static_cast<int>(index % fours) * 4;
  if (row >= parts.m) return;
  float sums[4] = {};
  if (col < rank) {
    add_up(parts.values + row * parts.padded_rank + col, parts.count, parts.m * parts.padded_rank, sums);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] = col + i < rank ? parts.scaling * sums[i] : 0.0f;
  *reinterpret_cast<uint2*>(static_cast<T*>(parts.output) + row * parts.stride + col) =
      make_uint2(Word<T>::pack(sums), Word<T>::pack(sums + 2));
}

// A thread 4 ranks of a column of the gradient.
template <typename T>
__device__ __forceinline__ void finish_gradient(const GradientParts& parts, int64_t index, int64_t rank) {
  const int fours = static_cast<int>((rank + 3) / 4);
  // Threads that are neighbours write what is.
  const bool is_rank_fast = parts.target.rank_stride == 1;
  const int64_t col = is_rank_fast ? index / fours : index % parts.cols;
  const int first = static_cast<int>(is_rank_fast ? index % fours : index / parts.cols) * 4;
  if (col >= parts.cols || first >= rank) return;
  const int group = static_cast<int>(col / parts.group_cols);
  const int first_share = group * parts.row_tiles / parts.units_per_share;
  const int last_share = ((group + 1) * parts.row_tiles - 1) / parts.units_per_share;
  const int slot = first / parts.ranks * parts.num_slots + slot_of(first_share, group, parts.slots_per_group);
  const int64_t at = (int64_t{slot} * parts.group_cols + col % parts.group_cols) * parts.ranks + first % parts.ranks;
  float sums[4] = {};
  add_up(parts.values + at, last_share - first_share + 1, int64_t{parts.group_cols} * parts.ranks, sums);
  T* const output = static_cast<T*>(const_cast<void*>(parts.target.values)) + col * parts.target.col_stride;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i < rank) output[(first + i) * parts.target.rank_stride] = from_float<T>(sums[i]);
  }
}

// The first blocks have the projection, the others the gradient.
template <typename T, typename Gradient>
__global__ __launch_bounds__(kFinishThreads) void finish_parts_kernel(
    const __grid_constant__ ProjectionParts projection, const __grid_constant__ GradientParts gradient, int64_t rank,
    unsigned num_projection_blocks) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
  if (blockIdx.x < num_projection_blocks) {
    finish_projection<T>(projection, int64_t{blockIdx.x} * kFinishThreads + threadIdx.x, rank);
  } else {
    finish_gradient<Gradient>(gradient, int64_t{blockIdx.x - num_projection_blocks} * kFinishThreads + threadIdx.x,
                              rank);
  }
}

}  // namespace

void finish_parts(const ProjectionParts& projection, const GradientParts& gradient, int64_t rank, qlora_dtype dtype,
                  const Device& device, cudaStream_t stream) {
  unsigned projection_blocks = 0;
  unsigned gradient_blocks = 0;
  if (projection.values != nullptr) {
    projection_blocks = grid_size(projection.m * (projection.stride / 4), kFinishThreads);
  }
  if (gradient.values != nullptr) {
    gradient_blocks = grid_size(gradient.cols * ceil_div(rank, 4), kFinishThreads);
  }
  if (projection_blocks + gradient_blocks == 0) return;
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      dispatch_dtype(static_cast<qlora_dtype>(gradient.target.dtype), [&](auto gradient_type) {
        using Gradient = typename decltype(gradient_type)::type;
        launch_early("finish_parts_kernel", finish_parts_kernel<T, Gradient>,
                     LaunchShape{projection_blocks + gradient_blocks, kFinishThreads}, device, stream, projection,
                     gradient, rank, projection_blocks);
      });
    }
  });
}

}  // namespace qlora::lora
