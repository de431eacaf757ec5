// y[i, :] = dequantised row indices[i] of the weight; a row of NaN where the index is outside [0, rows).
//
// A warp owns one index and 256 columns (128 for fp32); a lane decodes 16 bytes of y as in dequantize.cu. Widths that
// are no multiple of a lane's unit, and pointers without alignment, go to embedding_plain_kernel, a thread a value.
#include <cmath>
#include <cstdint>

#include "cuda/device/decode.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/scales.cuh"
#include "cuda/dispatch.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// indices [num_indices]; weight [rows, cols]; y [num_indices, cols], 16-byte aligned; cols a multiple of the unit.
template <typename T, Format F>
__global__ __launch_bounds__(kThreads) void embedding_kernel(const int64_t* __restrict__ indices, int64_t num_indices,
                                                             const uint8_t* __restrict__ packed, Scales scales,
                                                             int64_t rows, int64_t cols, T* __restrict__ y) {
  constexpr int kUnit = kValuesPer16Bytes<T>;
  const float lane_value = lane_code_value<F>();
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; i < num_indices;
       i += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t row = indices[i];
    const bool is_row = row >= 0 && row < rows;
    for (int64_t begin = static_cast<int64_t>(blockIdx.y) * 32 * kUnit; begin < cols;
         begin += static_cast<int64_t>(gridDim.y) * 32 * kUnit) {
      const int64_t col = begin + lane * kUnit;
      uint32_t word = 0;
      float scale = __int_as_float(0x7FC00000);  // NaN times every code is NaN
      if (is_row && col < cols) {
        const int64_t index = row * cols + col;
        scale = load_scale(scales, index);
        word = kUnit == 8 ? *reinterpret_cast<const uint32_t*>(packed + index / 2)
                          : *reinterpret_cast<const uint16_t*>(packed + index / 2);
      }
      float values[kUnit];
      decode<kUnit>(word, lane_value, scale, values);
      if (col < cols) store_16_bytes(y + i * cols + col, values);
    }
  }
}

template <typename T, Format F>
__global__ __launch_bounds__(kThreads) void embedding_plain_kernel(const int64_t* __restrict__ indices,
                                                                   int64_t num_indices,
                                                                   const uint8_t* __restrict__ packed, Scales scales,
                                                                   int64_t rows, int64_t cols, T* __restrict__ y) {
  const int64_t n = num_indices * cols;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
    const int64_t row = indices[i / cols];
    const int64_t index = row * cols + i % cols;
    y[i] = row >= 0 && row < rows ? decode_one<T, F>(packed, index, load_scale(scales, index))
                                  : from_float<T>(__int_as_float(0x7FC00000));
  }
}

}  // namespace

void embedding_4bit(const int64_t* indices, int64_t num_indices, const qlora_weight_4bit& weight, void* y,
                    qlora_dtype dtype, cudaStream_t stream) {
  if (num_indices == 0 || weight.cols == 0) return;
  const Scales scales = scales_of(weight);
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_format(weight.format, [&](auto format_tag) {
      constexpr Format kFormat = decltype(format_tag)::value;
      constexpr int64_t kUnit = kValuesPer16Bytes<T>;
      T* const out = static_cast<T*>(y);
      if (weight.cols % kUnit == 0 && is_aligned(weight.packed, 4) && is_aligned(y, 16)) {
        const dim3 grid(grid_size(num_indices, kWarps), grid_size(weight.cols, 32 * kUnit, kMaxGridY));
        launch("embedding_kernel", embedding_kernel<T, kFormat>, grid, kThreads, stream, indices, num_indices,
               weight.packed, scales, weight.rows, weight.cols, out);
      } else {
        launch("embedding_plain_kernel", embedding_plain_kernel<T, kFormat>,
               grid_size(num_indices * weight.cols, kThreads), kThreads, stream, indices, num_indices, weight.packed,
               scales, weight.rows, weight.cols, out);
      }
    });
  });
}

}  // namespace qlora
