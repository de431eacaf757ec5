// The narrow products of a LoRA adapter, each asynchronous on `stream` of the current device, which is `device`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/gemm.h"
#include "core/weight.h"
#include "cuda/device_guard.h"
#include "cuda/kernels.h"

namespace qlora {

// A matrix of an adapter as S [rank, cols]: A as it is, or B [cols, rank] by its columns.
struct AdapterMatrix {
  const void* values;
  qlora_dtype dtype;
  bool is_by_columns;  // S[j, c] is at c * rank + j, else at j * cols + c
};

namespace lora {

// S of AdapterMatrix, on the device.
struct Narrow {
  const void* values;
  int dtype;  // qlora_dtype
  int64_t rank_stride;
  int64_t col_stride;
};

// From column first_col on.
inline Narrow narrow_of(const AdapterMatrix& matrix, int64_t rank, int64_t cols, int64_t first_col = 0) {
  const int64_t rank_stride = matrix.is_by_columns ? 1 : cols;
  const int64_t col_stride = matrix.is_by_columns ? rank : 1;
  const auto* const values = static_cast<const char*>(matrix.values);
  return {values + first_col * col_stride * size_of(matrix.dtype), matrix.dtype, rank_stride, col_stride};
}

}  // namespace lora

// What one pass over x [m, cols] computes, of either or both:
//   projection  output [m, left_columns(rank)] = scaling x S^T, with zeros from column `rank` on
//   gradient    S-shaped = left^T x
struct AdapterPass {
  const void* x;
  int64_t m;  // at least 1
  int64_t cols;
  qlora_dtype dtype;  // of x, output and left
  int64_t rank;
  // Projection; output null: not asked for.
  AdapterMatrix matrix;
  float scaling;
  void* output;  // aligned to 16 bytes
  // Gradient; gradient.values null: not asked for.
  const void* left;  // [m, left_columns(rank)], aligned to 16 bytes
  AdapterMatrix gradient;
};

// adapter_pass.cu: sums of a block's columns and rows in workspace, in fp32, then added up in the order of the blocks.
// The workspace is 256-byte aligned, and at most kMaxPartBytes, or what one tile of rows takes, if that is more.
inline constexpr int64_t kMaxPartBytes = 32 << 20;
int64_t adapter_pass_workspace_size(const AdapterPass& pass, const Device& device);
void adapter_pass(const AdapterPass& pass, const Device& device, void* workspace, cudaStream_t stream);

// naive.cu: the same in any dtype, without workspace. What serves float32.
void adapter_pass_naive(const AdapterPass& pass, cudaStream_t stream);

// add_low_rank.cu: columns `begin` to `end` of output [m, cols] (+)= left [m, rank] S, rounded once more where it is
// added to what is there.
struct LowRankSum {
  const void* left;  // [m, left_columns(rank)], aligned to 16 bytes
  int64_t m;
  int64_t cols;
  int64_t begin;
  int64_t end;
  qlora_dtype dtype;  // of left and output
  int64_t rank;
  AdapterMatrix matrix;
  void* output;
  bool is_added;
};
void add_low_rank(const LowRankSum& sum, const Device& device, cudaStream_t stream);

// naive.cu: the same in any dtype.
void add_low_rank_naive(const LowRankSum& sum, cudaStream_t stream);

// update.cpp: whether the kernels on the tensor cores serve it, 16 bits on sm_80 and newer; the sum by what serves it;
// and the low-rank term of a problem added to its output, to all columns or to those from `begin` to `end`.
bool is_narrow_fast(qlora_dtype dtype, const Device& device);
void run_sum(const LowRankSum& sum, const Device& device, cudaStream_t stream);
void add_update(const Gemm& problem, const Device& device, cudaStream_t stream);
void add_update(const Gemm& problem, int64_t begin, int64_t end, const Device& device, cudaStream_t stream);

// merged_weight.cu: y [rows of the window, leading_dimension] = the window's W + scaling B A, rounded once. The window
// begins at a column, and is as many wide, that 64 divides; y is aligned to 16 bytes, leading_dimension a multiple
// of 8. multiprocessors: see dequantize_4bit.
bool supports_merged_weight(const qlora_weight_4bit& weight, int64_t rank, qlora_dtype dtype, const Device& device);
void merged_weight(const qlora_weight_4bit& weight, const qlora_lora& lora, const Window& window, void* y,
                   int64_t leading_dimension, qlora_dtype dtype, int multiprocessors, const Device& device,
                   cudaStream_t stream);

}  // namespace qlora
