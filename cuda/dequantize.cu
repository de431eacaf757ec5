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

#include "cuda/dequantize_sm90.h"
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
  int64_t end;  // flat index behind the last value
};

// first, cols, row_stride, leading_dimension, end: multiples of the unit. packed 4-byte, y 16-byte aligned.
// kIsDense: cols, row_stride and leading_dimension are those of one warp, known to the compiler.
template <typename T, Format F, bool kIsNested, bool kIsDense>
__global__ __launch_bounds__(kThreads) void dequantize_kernel(const uint8_t* __restrict__ packed, Scales scales,
                                                              FlatWindow window, T* __restrict__ y) {
  constexpr int kUnit = kValuesPer16Bytes<T>;
  constexpr int64_t kColsPerWarp = 32 * kUnit;
  const int64_t row_stride = kIsDense ? kColsPerWarp : window.row_stride;
  const int64_t leading_dimension = kIsDense ? kColsPerWarp : window.leading_dimension;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t row = blockIdx.x * kRowsPerBlock + threadIdx.x / 32 * kRowsPerWarp;
  const int64_t col = kIsDense ? lane * kUnit : blockIdx.y * kColsPerWarp + lane * kUnit;
  const int64_t first = window.first + row * row_stride + col;

  const float lane_value = lane_code_value<F>();
  const ScaleReader<kIsNested> scale_reader(scales);
  uint32_t words[kRowsPerWarp];
  float unit_scales[kRowsPerWarp];
  bool is_inside[kRowsPerWarp];
#pragma unroll
  for (int i = 0; i < kRowsPerWarp; ++i) {
    const int64_t index = first + i * row_stride;
    is_inside[i] = kIsDense ? index < window.end : row + i < window.rows && col < window.cols;
    const int64_t safe_index = is_inside[i] ? index : window.first;  // No branch: all loads go out together.
    const uint8_t* const address = packed + (safe_index >> 1);
    words[i] = kUnit == 8 ? load_4_bytes_once(address) : load_2_bytes_once(address);
    unit_scales[i] = scale_reader.load(safe_index);
  }
  T* const out = y + row * leading_dimension + col;
#pragma unroll
  for (int i = 0; i < kRowsPerWarp; ++i) {
    float values[kUnit];
    decode<kUnit>(words[i], lane_value, unit_scales[i], values);
    if (is_inside[i]) store_16_bytes(out + i * leading_dimension, values);
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

// multiprocessors: 0, all, or as many at most, whole ones.
template <typename T, Format F>
void dequantize_plainly(const qlora_weight_4bit& weight, const FlatWindow& window, T* y, cudaStream_t stream) {
  launch("dequantize_plain_kernel", dequantize_plain_kernel<T, F>, grid_size(window.rows * window.cols, kThreads),
         kThreads, stream, weight.packed, scales_of(weight), window, y);
}

template <typename T, Format F, bool kIsDense>
void dequantize_units(const qlora_weight_4bit& weight, const FlatWindow& window, T* y, cudaStream_t stream) {
  const dim3 grid(grid_size(window.rows, kRowsPerBlock), grid_size(window.cols, 32 * kValuesPer16Bytes<T>));
  dispatch_bool(is_nested(weight), [&](auto nested_tag) {
    launch("dequantize_kernel", dequantize_kernel<T, F, decltype(nested_tag)::value, kIsDense>, grid, kThreads, stream,
           weight.packed, scales_of(weight), window, y);
  });
}

// is_dense: the window is contiguous in the weight and in y.
template <typename T, Format F>
void dequantize_window(const qlora_weight_4bit& weight, const FlatWindow& window, bool is_dense, T* y,
                       cudaStream_t stream) {
  constexpr int64_t kUnit = kValuesPer16Bytes<T>;
  constexpr int64_t kColsPerWarp = 32 * kUnit;
  const bool has_alignment = window.first % kUnit == 0 && is_aligned(weight.packed, 4) && is_aligned(y, 16);
  if (has_alignment && is_dense) {
    const int64_t n = window.rows * window.cols;
    const int64_t rest = n % kUnit;
    if (n > rest) {
      dequantize_units<T, F, true>(
          weight,
          {window.first, ceil_div(n - rest, kColsPerWarp), kColsPerWarp, kColsPerWarp, kColsPerWarp, window.end - rest},
          y, stream);
    }
    if (rest > 0) {
      dequantize_plainly<T, F>(weight, {window.end - rest, 1, rest, rest, rest, window.end}, y + n - rest, stream);
    }
  } else if (has_alignment && window.cols % kUnit == 0 && window.row_stride % kUnit == 0 &&
             window.leading_dimension % kUnit == 0 && window.cols <= kMaxGridY * kColsPerWarp) {
    dequantize_units<T, F, false>(weight, window, y, stream);
  } else {
    dequantize_plainly<T, F>(weight, window, y, stream);
  }
}

// The same on few multiprocessors; false, and nothing done, where dequantize_sm90 does not serve the window.
template <typename T, Format F>
bool dequantize_on_few(const qlora_weight_4bit& weight, const FlatWindow& window, bool is_dense, T* y,
                       qlora_dtype dtype, int multiprocessors, const Device& device, cudaStream_t stream) {
  DequantizeFew few = {window.first, window.rows,    window.cols, window.row_stride, window.leading_dimension, y,
                       dtype,        multiprocessors};
  int64_t rest = 0;
  if (is_dense) {
    const int64_t n = window.rows * window.cols;
    few.cols = few.row_stride = few.leading_dimension = kDequantizeFewCols;
    few.rows = n / kDequantizeFewCols;
    rest = n % kDequantizeFewCols;
  }
  if (!supports_dequantize_sm90(weight, few, device)) return false;
  if (few.rows > 0) dequantize_sm90(weight, few, device, stream);
  if (rest > 0) {
    dequantize_plainly<T, F>(weight, {window.end - rest, 1, rest, rest, rest, window.end},
                             y + window.rows * window.cols - rest, stream);
  }
  return true;
}

}  // namespace

void dequantize_4bit(const qlora_weight_4bit& weight, const Window& window, void* y, int64_t leading_dimension,
                     qlora_dtype dtype, int multiprocessors, const Device& device, cudaStream_t stream) {
  const int64_t rows = window.row_end - window.row_begin;
  const int64_t cols = window.col_end - window.col_begin;
  if (rows <= 0 || cols <= 0) return;
  const int64_t first = window.row_begin * weight.cols + window.col_begin;
  const int64_t end = first + (rows - 1) * weight.cols + cols;
  const FlatWindow flat = {first, rows, cols, weight.cols, leading_dimension, end};
  const bool is_dense = leading_dimension == cols && (rows == 1 || cols == weight.cols);
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_format(weight.format, [&](auto format_tag) {
      constexpr Format kFormat = decltype(format_tag)::value;
      T* const out = static_cast<T*>(y);
      if (multiprocessors > 0 &&
          dequantize_on_few<T, kFormat>(weight, flat, is_dense, out, dtype, multiprocessors, device, stream)) {
        return;
      }
      dequantize_window<T, kFormat>(weight, flat, is_dense, out, stream);
    });
  });
}

}  // namespace qlora
