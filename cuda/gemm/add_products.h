// Adding up the parts that kernels wrote with store_part.
#pragma once

#include <cuda_runtime_api.h>

#include "core/gemm.h"
#include "cuda/device_guard.h"
#include "cuda/gemm/product.cuh"

namespace qlora {

// target's output = sum of its parts, in their order, + bias, rounded once.
void add_products(const ProductTarget& target, int num_parts, qlora_dtype dtype, const Device& device,
                  cudaStream_t stream);

}  // namespace qlora
