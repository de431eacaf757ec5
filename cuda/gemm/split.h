// Splitting the sum of a linear layer over blocks that each write a part of it in fp32, and adding the parts up.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/gemm.h"
#include "cuda/device_guard.h"

namespace qlora {

// Parts for an output of num_tiles tiles, each a sum of num_steps steps, such that blocks of one a multiprocessor are
// busy for as few steps as possible; a part costs as much as some steps. At most max_parts.
inline constexpr int kMaxParts = 16;
int best_num_parts(int64_t num_tiles, int64_t num_steps, int num_multiprocessors, int max_parts = kMaxParts);

// output [m, width] = sum of parts [num_parts, m, width] + bias [width], in the parts' order, rounded once.
void add_parts(const float* parts, int num_parts, int64_t m, int64_t width, const void* bias, void* output,
               qlora_dtype dtype, const Device& device, cudaStream_t stream);

// The same without a bias of parts whose columns are dealt in each 32, a multiple of which the width is: column
// 4 g + 2 e + h lies at place 16 e + 2 g + h.
void add_dealt_parts(const float* parts, int num_parts, int64_t m, int64_t width, void* output, qlora_dtype dtype,
                     const Device& device, cudaStream_t stream);

}  // namespace qlora
