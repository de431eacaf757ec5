// Double quantisation of block scales and its inverse, in groups of 256 scales:
//   nested_absmax[g] = max |absmax - offset| over group g, codes[b] = nearest entry of nested_code to
//   (absmax[b] - offset) / nested_absmax[b / 256], scaled as in device/normalise.cuh;
//   absmax[b] = nested_code[codes[b]] * nested_absmax[b / 256] + offset, product and sum rounded separately.
//
// Quantise: a block of 256 threads a group, a thread a scale, the code book in shared memory. Dequantise: a thread a
// scale. A weight has one scale for 64 values: neither is worth more.
#include <cstdint>

#include "cuda/device/nested_search.cuh"
#include "cuda/device/normalise.cuh"
#include "cuda/device/scales.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace qlora {
namespace {

constexpr int kThreads = kNestedBlockSize;

// absmax [n], nested_offset [1], nested_code [256] -> codes [n], nested_absmax [ceil(n / 256)]
__global__ __launch_bounds__(kThreads) void quantize_absmax_kernel(const float* __restrict__ absmax, int64_t n,
                                                                   const float* __restrict__ nested_offset,
                                                                   const float* __restrict__ nested_code,
                                                                   uint8_t* __restrict__ codes,
                                                                   float* __restrict__ nested_absmax) {
  static_assert(kThreads == kNumNestedCodes);
  __shared__ float code[kNumNestedCodes];
  __shared__ uint32_t warp_largest[kThreads / 32];
  const int thread = static_cast<int>(threadIdx.x);
  code[thread] = nested_code[thread];
  const float offset = *nested_offset;

  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads; first < n;
       first += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t index = first + thread;
    const float centred = index < n ? __fsub_rn(absmax[index], offset) : 0.0f;
    const uint32_t largest_of_warp = __reduce_max_sync(0xFFFFFFFFu, magnitude_bits(centred));
    if (thread % 32 == 0) warp_largest[thread / 32] = largest_of_warp;
    __syncthreads();
    uint32_t largest = 0;
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) largest = max(largest, warp_largest[warp]);
    if (thread == 0) nested_absmax[first / kNestedBlockSize] = absmax_of_bits(largest);
    const float scaled = largest < kInfBits ? normalise(centred, largest) : 0.0f;  // Inf or NaN: no scale survives
    if (index < n) codes[index] = nearest_nested_code(scaled, code);
    __syncthreads();  // The next group overwrites warp_largest.
  }
}

// codes [n], nested_absmax [ceil(n / 256)], nested_code [256], nested_offset [1] -> absmax [n]
__global__ __launch_bounds__(kThreads) void dequantize_absmax_kernel(const uint8_t* __restrict__ codes, int64_t n,
                                                                     const float* __restrict__ nested_absmax,
                                                                     const float* __restrict__ nested_code,
                                                                     const float* __restrict__ nested_offset,
                                                                     float* __restrict__ absmax) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
    absmax[i] = decode_scale(codes[i], nested_code, __ldg(nested_absmax + i / kNestedBlockSize), __ldg(nested_offset));
  }
}

}  // namespace

void quantize_absmax(const float* absmax, int64_t n, const float* nested_offset, const float* nested_code,
                     uint8_t* codes, float* nested_absmax, cudaStream_t stream) {
  if (n == 0) return;
  launch("quantize_absmax_kernel", quantize_absmax_kernel, grid_size(n, kThreads), kThreads, stream, absmax, n,
         nested_offset, nested_code, codes, nested_absmax);
}

void dequantize_absmax(const uint8_t* codes, int64_t n, const float* nested_absmax, const float* nested_code,
                       const float* nested_offset, float* absmax, cudaStream_t stream) {
  if (n == 0) return;
  launch("dequantize_absmax_kernel", dequantize_absmax_kernel, grid_size(n, kThreads), kThreads, stream, codes, n,
         nested_absmax, nested_code, nested_offset, absmax);
}

}  // namespace qlora
