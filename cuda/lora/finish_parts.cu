// The parts of a projection and of a gradient (adapter_pass.cu), added up in the order of their blocks.
#include "cuda/device/numeric.cuh"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/lora/finish_parts.h"

namespace qlora::lora {
namespace {

constexpr int kFinishThreads = 128;
constexpr int kLoads = 8;  // parts on their way at once

// sums [kCount] of parts `stride` floats apart, in their order.
template <int kCount>
__device__ __forceinline__ void add_up(const float* parts, int num_parts, int64_t stride, float (&sums)[kCount]) {
  for (int first = 0; first < num_parts; first += kLoads) {
    float4 loaded[kLoads][kCount / 4];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float* const source = parts + min(first + i, num_parts - 1) * stride;
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) loaded[i][j] = reinterpret_cast<const float4*>(source)[j];
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (first + i >= num_parts) break;
#pragma unroll
      for (int j = 0; j < kCount / 4; ++j) {
        sums[4 * j] += loaded[i][j].x;
        sums[4 * j + 1] += loaded[i][j].y;
        sums[4 * j + 2] += loaded[i][j].z;
        sums[4 * j + 3] += loaded[i][j].w;
      }
    }
  }
}

// output [m, stride] = scaling times the sum of parts [num_parts, m, padded_rank]; a thread 4 columns.
template <typename T>
__global__ __launch_bounds__(kFinishThreads) void finish_projection_kernel(const float* __restrict__ parts,
                                                                           int num_parts, int64_t m, int rank,
                                                                           int padded_rank, float scaling,
                                                                           T* __restrict__ output, int stride) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
  const int64_t index = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  const int64_t row = index / (stride / 4);
  const int col = static_cast<int>(index % (stride / 4)) * 4;
  if (row >= m) return;
  float sums[4] = {};
  if (col < rank) add_up(parts + row * padded_rank + col, num_parts, m * padded_rank, sums);
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] = col + i < rank ? scaling * sums[i] : 0.0f;
  *reinterpret_cast<uint2*>(output + row * stride + col) = make_uint2(Word<T>::pack(sums), Word<T>::pack(sums + 2));
}

// output [col * col_stride + rank * rank_stride] = the sum of parts [num_parts, cols, padded_rank]; a thread 8 ranks.
template <typename T>
__global__ __launch_bounds__(kFinishThreads) void finish_gradient_kernel(const float* __restrict__ parts, int num_parts,
                                                                         int64_t cols, int rank, int padded_rank,
                                                                         T* __restrict__ output, int64_t col_stride,
                                                                         int64_t rank_stride) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
  const int64_t index = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  const int num_groups = padded_rank / 8;
  // Threads that are neighbours write what is.
  const bool is_rank_fast = rank_stride == 1;
  const int64_t col = is_rank_fast ? index / num_groups : index % cols;
  const int first = static_cast<int>(is_rank_fast ? index % num_groups : index / cols) * 8;
  if (col >= cols || first >= rank) return;
  float sums[8] = {};
  add_up(parts + col * padded_rank + first, num_parts, cols * padded_rank, sums);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (first + i < rank) output[col * col_stride + (first + i) * rank_stride] = from_float<T>(sums[i]);
  }
}

}  // namespace

void finish_projection(const Parts& parts, int64_t m, int64_t rank, float scaling, void* output, int64_t stride,
                       qlora_dtype dtype, const Device& device, cudaStream_t stream) {
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      launch_early("finish_projection_kernel", finish_projection_kernel<T>,
                   LaunchShape{grid_size(m * (stride / 4), kFinishThreads), kFinishThreads}, device, stream,
                   parts.values, parts.count, m, static_cast<int>(rank), parts.padded_rank, scaling,
                   static_cast<T*>(output), static_cast<int>(stride));
    }
  });
}

void finish_gradient(const Parts& parts, int64_t cols, int64_t rank, const AdapterMatrix& gradient, int64_t first_col,
                     int64_t total_cols, const Device& device, cudaStream_t stream) {
  dispatch_dtype(gradient.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t col_stride = gradient.is_by_columns ? rank : 1;
    const int64_t rank_stride = gradient.is_by_columns ? 1 : total_cols;
    T* const output = static_cast<T*>(const_cast<void*>(gradient.values)) + first_col * col_stride;
    launch_early("finish_gradient_kernel", finish_gradient_kernel<T>,
                 LaunchShape{grid_size(cols * (parts.padded_rank / 8), kFinishThreads), kFinishThreads}, device, stream,
                 parts.values, parts.count, cols, static_cast<int>(rank), parts.padded_rank, output, col_stride,
                 rank_stride);
  });
}

}  // namespace qlora::lora
