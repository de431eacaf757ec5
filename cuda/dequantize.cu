// y[r, c] = round(code_value[packed[r, c]] * absmax[block]) over a window of the weight, nested scales decoded in the
// same pass.
//
// A lane decodes 16 bytes of y: 8 values of a 2-byte dtype from 4 bytes of codes, 4 of fp32 from 2. A warp covers 32 of
// these side by side (256 or 128 columns) in kRowsPerWarp rows, so that its loads are in flight together and each store
// instruction writes whole lines. A unit begins at a multiple of its size in the flat weight and so has one scale.
//
//   y (bf16):  row r    lane 0 [c..c+7]  lane 1 [c+8..c+15] ... lane 31
//              row r+1  the same columns, ...
//
// The whole weight is a window of rows of 256 (128) flat values, whatever its shape. Windows and pointers that break
// the alignment go to dequantize_plain_kernel.
#include <cstdint>
#include <type_traits>

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
constexpr int kRowsPerWarp = 4;  // loads in flight a lane; a guess until measured
constexpr int64_t kRowsPerBlock = kWarps * kRowsPerWarp;

// Value (r, c) of the window has flat index first + r * row_stride + c in the weight and r * leading_dimension + c in
// y.
struct FlatWindow {
  int64_t first;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
  int64_t leading_dimension;
  int64_t end;  // values of the weight: none is read from here on
};

// first, cols, row_stride, leading_dimension: multiples of the unit. packed 4-byte, y 16-byte aligned.
template <typename T, Format F, bool kIsNested>
__global__ __launch_bounds__(kThreads) void dequantize_kernel(const uint8_t* __restrict__ packed, Scales scales,
                                                              FlatWindow window, T* __restrict__ y) {
  constexpr int kUnit = kValuesPer16Bytes<T>;
  const float lane_value = lane_code_value<F>();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t block_row = static_cast<int64_t>(threadIdx.x / 32) * kRowsPerWarp;

  for (int64_t row_begin = blockIdx.x * kRowsPerBlock + block_row; row_begin < window.rows;
       row_begin += gridDim.x * kRowsPerBlock) {
    for (int64_t col = (static_cast<int64_t>(blockIdx.y) * 32 + lane) * kUnit; col - lane * kUnit < window.cols;
         col += static_cast<int64_t>(gridDim.y) * 32 * kUnit) {
      uint32_t words[kRowsPerWarp];
      float unit_scales[kRowsPerWarp];
      int valid[kRowsPerWarp];  // values of the unit inside the window and the weight
#pragma unroll
      for (int i = 0; i < kRowsPerWarp; ++i) {
        const int64_t index = window.first + (row_begin + i) * window.row_stride + col;
        const bool is_inside = row_begin + i < window.rows && col < window.cols && index < window.end;
        valid[i] = !is_inside ? 0 : window.end - index < kUnit ? static_cast<int>(window.end - index) : kUnit;
        words[i] = 0;
        unit_scales[i] = 0.0f;
        if (valid[i] == 0) continue;
        unit_scales[i] = load_scale<kIsNested>(scales, index);
        const uint8_t* const address = packed + index / 2;
        if (valid[i] == kUnit) {
          words[i] = kUnit == 8 ? load_4_bytes_once(address) : load_2_bytes_once(address);
        } else {
          for (int byte = 0; 2 * byte < valid[i]; ++byte) words[i] |= static_cast<uint32_t>(address[byte]) << 8 * byte;
        }
      }
#pragma unroll
      for (int i = 0; i < kRowsPerWarp; ++i) {
        float values[kUnit];
        decode<kUnit>(words[i], lane_value, unit_scales[i], values);
        T* const out = y + (row_begin + i) * window.leading_dimension + col;
        if (valid[i] == kUnit) {
          uint4 piece;
          piece.x = Word<T>::pack(values);
          piece.y = Word<T>::pack(values + Word<T>::kValues);
          piece.z = Word<T>::pack(values + 2 * Word<T>::kValues);
          piece.w = Word<T>::pack(values + 3 * Word<T>::kValues);
          *reinterpret_cast<uint4*>(out) = piece;
        } else {
#pragma unroll
          for (int j = 0; j < kUnit; ++j) {
            if (j < valid[i]) out[j] = from_float<T>(values[j]);
          }
        }
      }
    }
  }
}

// A thread a value, any window, any alignment.
template <typename T, Format F>
__global__ __launch_bounds__(kThreads) void dequantize_plain_kernel(const uint8_t* __restrict__ packed, Scales scales,
                                                                    FlatWindow window, T* __restrict__ y) {
  const int64_t n = window.rows * window.cols;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += stride) {
    const int64_t row = i / window.cols;
    const int64_t col = i - row * window.cols;
    const int64_t index = window.first + row * window.row_stride + col;
    y[row * window.leading_dimension + col] = decode_one<T, F>(packed, index, load_scale(scales, index));
  }
}

template <typename T, Format F>
void dequantize_window(const qlora_weight_4bit& weight, FlatWindow window, bool is_dense, T* y, cudaStream_t stream) {
  constexpr int64_t kUnit = kValuesPer16Bytes<T>;
  constexpr int64_t kColsPerWarp = 32 * kUnit;
  const Scales scales = scales_of(weight);
  const bool has_alignment = window.first % kUnit == 0 && is_aligned(weight.packed, 4) && is_aligned(y, 16);
  if (is_dense && has_alignment) {
    window.end = window.first + window.rows * window.cols;
    window.rows = ceil_div(window.rows * window.cols, kColsPerWarp);
    window.cols = window.row_stride = window.leading_dimension = kColsPerWarp;
  } else if (!has_alignment || window.cols % kUnit != 0 || window.row_stride % kUnit != 0 ||
             window.leading_dimension % kUnit != 0) {
    launch("dequantize_plain_kernel", dequantize_plain_kernel<T, F>, grid_size(window.rows * window.cols, kThreads),
           kThreads, stream, weight.packed, scales, window, y);
    return;
  }
  const dim3 grid(grid_size(window.rows, kRowsPerBlock), grid_size(window.cols, kColsPerWarp, kMaxGridY));
  dispatch_bool(is_nested(weight), [&](auto nested_tag) {
    launch("dequantize_kernel", dequantize_kernel<T, F, decltype(nested_tag)::value>, grid, kThreads, stream,
           weight.packed, scales, window, y);
  });
}

}  // namespace

void dequantize_4bit(const qlora_weight_4bit& weight, const Window& window, void* y, int64_t leading_dimension,
                     qlora_dtype dtype, cudaStream_t stream) {
  const int64_t rows = window.row_end - window.row_begin;
  const int64_t cols = window.col_end - window.col_begin;
  if (rows <= 0 || cols <= 0) return;
  const FlatWindow flat = {window.row_begin * weight.cols + window.col_begin,
                           rows,
                           cols,
                           weight.cols,
                           leading_dimension,
                           num_values(weight)};
  const bool is_dense = leading_dimension == cols && (rows == 1 || cols == weight.cols);
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_format(weight.format, [&](auto format_tag) {
      dequantize_window<T, decltype(format_tag)::value>(weight, flat, is_dense, static_cast<T*>(y), stream);
    });
  });
}

}  // namespace qlora
