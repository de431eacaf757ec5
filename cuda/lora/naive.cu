// The products of lora.h in any dtype and at any address, sums in fp32: what serves float32. A warp a row of the
// projection and 8 ranks, its lanes every 32nd column; else a thread an output, in ascending order. S is rounded to the
// dtype of the activations.
#include <cstdint>

#include "cuda/device/numeric.cuh"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/lora/lora.h"
#include "cuda/lora/tile.cuh"

namespace qlora {
namespace {

using lora::Narrow;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRanks = 8;  // of a warp

template <typename T>
__device__ __forceinline__ float load_rounded(const Narrow& narrow, int64_t rank, int64_t col) {
  const int64_t at = rank * narrow.rank_stride + col * narrow.col_stride;
  float value;
  if (narrow.dtype == QLORA_FLOAT32) {
    value = static_cast<const float*>(narrow.values)[at];
  } else if (narrow.dtype == QLORA_BFLOAT16) {
    value = to_float(static_cast<const __nv_bfloat16*>(narrow.values)[at]);
  } else {
    value = to_float(static_cast<const __half*>(narrow.values)[at]);
  }
  return to_float(from_float<T>(value));
}

__device__ __forceinline__ int64_t first_index() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t index_step() { return int64_t{gridDim.x} * kThreads; }

// output [m, stride], stride a multiple of kRanks
template <typename T>
__global__ __launch_bounds__(kThreads) void project_naive_kernel(const T* __restrict__ x, int64_t m, int64_t cols,
                                                                 Narrow narrow, int64_t rank, float scaling,
                                                                 T* __restrict__ output, int64_t stride) {
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t{gridDim.x} * kWarps;
  for (int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; index < m * stride / kRanks; index += step) {
    const int64_t row = index / (stride / kRanks);
    const int64_t first = index % (stride / kRanks) * kRanks;
    float sums[kRanks] = {};
    for (int64_t c = lane; first < rank && c < cols; c += 32) {
      const float value = to_float(x[row * cols + c]);
#pragma unroll
      for (int j = 0; j < kRanks; ++j) {
        if (first + j < rank) sums[j] = fmaf(value, load_rounded<T>(narrow, first + j, c), sums[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kRanks; ++j) {
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        sums[j] += __shfl_xor_sync(0xFFFFFFFFu, sums[j], distance);
      }
      const float sum = first + j < rank ? scaling * sums[j] : 0.0f;
      if (lane == j) output[row * stride + first + j] = from_float<T>(sum);
    }
  }
}

// gradient, a thread a value, columns fastest
template <typename T, typename Gradient>
__global__ __launch_bounds__(kThreads) void reduce_naive_kernel(const T* __restrict__ x, int64_t m, int64_t cols,
                                                                const T* __restrict__ left, int64_t stride,
                                                                int64_t rank, Gradient* __restrict__ gradient,
                                                                int64_t rank_stride, int64_t col_stride) {
  for (int64_t index = first_index(); index < cols * rank; index += index_step()) {
    const int64_t j = index / cols;
    const int64_t c = index % cols;
    float sum = 0.0f;
#pragma unroll 8
    for (int64_t row = 0; row < m; ++row) {
      sum = fmaf(to_float(left[row * stride + j]), to_float(x[row * cols + c]), sum);
    }
    gradient[j * rank_stride + c * col_stride] = from_float<Gradient>(sum);
  }
}

// output [m, cols], of row length row_length
template <typename T>
__global__ __launch_bounds__(kThreads) void add_naive_kernel(const T* __restrict__ left, int64_t stride, int64_t m,
                                                             int64_t cols, Narrow narrow, int64_t rank,
                                                             T* __restrict__ output, int64_t row_length,
                                                             bool is_added) {
  for (int64_t index = first_index(); index < m * cols; index += index_step()) {
    const int64_t row = index / cols;
    const int64_t col = index % cols;
    T& place = output[row * row_length + col];
    float sum = is_added ? to_float(place) : 0.0f;
    for (int64_t j = 0; j < rank; ++j) {
      sum = fmaf(to_float(left[row * stride + j]), load_rounded<T>(narrow, j, col), sum);
    }
    place = from_float<T>(sum);
  }
}

}  // namespace

void adapter_pass_naive(const AdapterPass& pass, cudaStream_t stream) {
  const int64_t stride = left_columns(pass.rank);
  dispatch_dtype(pass.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* const x = static_cast<const T*>(pass.x);
    if (pass.output != nullptr) {
      launch("project_naive_kernel", project_naive_kernel<T>, grid_size(pass.m * stride / kRanks, kWarps), kThreads,
             stream, x, pass.m, pass.cols, lora::narrow_of(pass.matrix, pass.rank, pass.cols), pass.rank, pass.scaling,
             static_cast<T*>(pass.output), stride);
    }
    if (pass.gradient.values == nullptr) return;
    dispatch_dtype(pass.gradient.dtype, [&](auto gradient_type) {
      using Gradient = typename decltype(gradient_type)::type;
      const Narrow to = lora::narrow_of(pass.gradient, pass.rank, pass.cols);
      launch("reduce_naive_kernel", reduce_naive_kernel<T, Gradient>, grid_size(pass.cols * pass.rank, kThreads),
             kThreads, stream, x, pass.m, pass.cols, static_cast<const T*>(pass.left), stride, pass.rank,
             static_cast<Gradient*>(const_cast<void*>(to.values)), to.rank_stride, to.col_stride);
    });
  });
}

void add_low_rank_naive(const LowRankSum& sum, cudaStream_t stream) {
  dispatch_dtype(sum.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t cols = sum.end - sum.begin;
    launch("add_naive_kernel", add_naive_kernel<T>, grid_size(sum.m * cols, kThreads), kThreads, stream,
           static_cast<const T*>(sum.left), left_columns(sum.rank), sum.m, cols,
           lora::narrow_of(sum.matrix, sum.rank, sum.cols, sum.begin), sum.rank,
           static_cast<T*>(sum.output) + sum.begin, sum.cols, sum.is_added);
  });
}

}  // namespace qlora
