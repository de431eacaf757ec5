// The CUDA operations that api.cpp checks arguments for. Each works on the current device, asynchronously on `stream`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/weight.h"
#include "cuda/device_guard.h"
#include "qlora/qlora.h"

namespace qlora {

// Half-open ranges of rows and columns of a weight.
struct Window {
  int64_t row_begin;
  int64_t row_end;
  int64_t col_begin;
  int64_t col_end;
};

void quantize_4bit(const void* x, qlora_dtype dtype, int64_t n, int64_t block_size, qlora_format format,
                   uint8_t* packed, float* absmax, cudaStream_t stream);

// y [rows of the window, leading_dimension]: the window's columns; those beyond are not touched. multiprocessors: as
// many at most do the work, whole ones, beside kernels on the others, where dequantize_sm90.cu serves the window; else,
// and where 0, all. The values are the same.
void dequantize_4bit(const qlora_weight_4bit& weight, const Window& window, void* y, int64_t leading_dimension,
                     qlora_dtype dtype, int multiprocessors, const Device& device, cudaStream_t stream);

void quantize_absmax(const float* absmax, int64_t n, const float* nested_offset, const float* nested_code,
                     uint8_t* codes, float* nested_absmax, cudaStream_t stream);

void dequantize_absmax(const uint8_t* codes, int64_t n, const float* nested_absmax, const float* nested_code,
                       const float* nested_offset, float* absmax, cudaStream_t stream);

// num_columns at most QLORA_MAX_ROUND_COLUMNS; `previous` may be null.
void round_columns_nf4(const float* values, const float* scales, const float* inverse, const float* coupling,
                       const float* previous, int num_columns, int64_t rows, float* rounded, float* change,
                       cudaStream_t stream);

void embedding_4bit(const int64_t* indices, int64_t num_indices, const qlora_weight_4bit& weight, void* y,
                    qlora_dtype dtype, cudaStream_t stream);

}  // namespace qlora
