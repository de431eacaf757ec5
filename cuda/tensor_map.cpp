#include "cuda/tensor_map.h"

#include <cuda_runtime_api.h>

#include "core/status.h"
#include "cuda/error.h"

namespace qlora {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function; libqlora does not link libcuda, which machines without a GPU lack.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
             "cudaGetDriverEntryPointByVersion");
#else
  check_cuda(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
             "cudaGetDriverEntryPoint");
#endif
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    fail(QLORA_CUDA_ERROR, "cuTensorMapEncodeTiled: expected a driver for CUDA 12.0 or newer, got an older one");
  }
  return reinterpret_cast<Encode>(function);
}

}  // namespace

CUtensorMap describe_matrix(const void* matrix, int value_bytes, int box_bytes, int64_t rows, int64_t cols,
                            int box_rows) {
  static const Encode encode = find_encode();
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[1] = {static_cast<cuuint64_t>(cols * value_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_bytes / value_bytes), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  CUtensorMap map = {};
  const CUresult result =
      encode(&map,
             value_bytes == 1   ? CU_TENSOR_MAP_DATA_TYPE_UINT8
             : value_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16
                                : CU_TENSOR_MAP_DATA_TYPE_UINT32,
             2, const_cast<void*>(matrix), sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             box_bytes == 64    ? CU_TENSOR_MAP_SWIZZLE_64B
             : box_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B
                                : CU_TENSOR_MAP_SWIZZLE_NONE,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    fail(QLORA_CUDA_ERROR, "cuTensorMapEncodeTiled: expected a matrix that it takes, got [", rows, ", ", cols, "] of ",
         value_bytes, " bytes: error ", static_cast<int>(result));
  }
  return map;
}

}  // namespace qlora
