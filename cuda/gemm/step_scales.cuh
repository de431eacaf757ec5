// The scales of a weight's rows on their way to shared memory, for kernels whose tiles are kScaledRows rows and whose
// steps are 4 blocks of 64 columns.
#pragma once

#include <cstdint>

#include "cuda/device/scales.cuh"

namespace qlora {

inline constexpr int kBlockCols = 64;  // columns of the weight that share a row's scale
inline constexpr int kStepBlocks = 4;
inline constexpr int kScaledRows = 128;
inline constexpr int kScaleThreads = 64;

#if defined(__CUDA_ARCH__)

// The values of nested_code, by kScaleThreads threads: load asks for them, store waits. A float at a time, since the
// caller's may lie at any multiple of 4 bytes.
class NestedCode {
 public:
  __device__ __forceinline__ void load(const float* nested_code) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values_[i] = nested_code[threadIdx.x + i * kScaleThreads];
  }
  __device__ __forceinline__ void store(float* shared) const {
#pragma unroll
    for (int i = 0; i < kValues; ++i) shared[threadIdx.x + i * kScaleThreads] = values_[i];
  }

 private:
  static constexpr int kValues = 256 / kScaleThreads;
  float values_[kValues];
};

// By kScaleThreads threads: load asks for the 4 scales of each of a thread's rows, store waits for them. Arguments has
// scales, rows and cols of the weight, scale_factor, and
//   are_scales_aligned   4 scales of a row: 4 or 16 aligned bytes in one nested block
template <bool kIsNested>
class StepScales {
 public:
  template <typename Arguments>
  __device__ __forceinline__ void load(const Arguments& arguments, int first, int step) {
    if (!arguments.are_scales_aligned) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t index = block(arguments, row(arguments, first, i), step);
      if constexpr (kIsNested) {
        codes_[i] = *reinterpret_cast<const uint32_t*>(arguments.scales.codes + index);
        values_[i].x = arguments.scales.nested_absmax[index / kNestedBlockSize];
      } else {
        values_[i] = *reinterpret_cast<const float4*>(arguments.scales.absmax + index);
      }
    }
  }

  // To scales [kScaledRows][4], times scale_factor.
  template <typename Arguments>
  __device__ __forceinline__ void store(const Arguments& arguments, int first, int step, const float* nested_code,
                                        float nested_offset, float* scales) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float4 four = values_[i];
      if (!arguments.are_scales_aligned) {
        four = load_plainly(arguments.scales, row(arguments, first, i), arguments.cols, step);
      } else if constexpr (kIsNested) {
        const auto scale = [&](int b) {
          return __fadd_rn(__fmul_rn(nested_code[codes_[i] >> b * 8 & 0xFF], values_[i].x), nested_offset);
        };
        four = make_float4(scale(0), scale(1), scale(2), scale(3));
      }
      const float factor = arguments.scale_factor;
      reinterpret_cast<float4*>(scales)[threadIdx.x + i * kScaleThreads] =
          make_float4(four.x * factor, four.y * factor, four.z * factor, four.w * factor);
    }
  }

 private:
  static constexpr int kRows = kScaledRows / kScaleThreads;

  // Rows behind the last repeat it.
  template <typename Arguments>
  static __device__ __forceinline__ int row(const Arguments& arguments, int first, int i) {
    return min(first + static_cast<int>(threadIdx.x) + i * kScaleThreads, arguments.rows - 1);
  }

  template <typename Arguments>
  static __device__ __forceinline__ int64_t block(const Arguments& arguments, int row, int step) {
    return int64_t{row} * (arguments.cols / kBlockCols) + step * kStepBlocks;
  }

  // 0 behind the last column.
  static __device__ __noinline__ float4 load_plainly(const Scales& all, int row, int cols, int step) {
    float scales[kStepBlocks] = {};
#pragma unroll
    for (int i = 0; i < kStepBlocks; ++i) {
      const int col = (step * kStepBlocks + i) * kBlockCols;
      if (col < cols) scales[i] = load_scale(all, int64_t{row} * cols + col);
    }
    return make_float4(scales[0], scales[1], scales[2], scales[3]);
  }

  uint32_t codes_[kRows];
  float4 values_[kRows];  // absmax; nested_absmax in x
};

#endif

}  // namespace qlora
