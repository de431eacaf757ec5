// cuBLAS, opened at run time: libqlora links nothing of it, and takes the copy that the process (torch, say) has
// loaded.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "qlora/qlora.h"

namespace qlora {

// c = a op(b), row-major, sums in fp32 (no TF32, no reduced-precision partial sums), one rounding to `c_dtype`.
struct CublasGemm {
  qlora_dtype dtype;    // of a and b
  qlora_dtype c_dtype;  // `dtype` or fp32
  int64_t m;
  int64_t n;
  int64_t k;
  const void* a;  // [m, k] of row length lda
  int64_t lda;
  const void* b;  // [n, k] if is_b_transposed, else [k, n], of row length ldb
  int64_t ldb;
  bool is_b_transposed;
  void* c;  // [m, n] of row length ldc
  int64_t ldc;
  int multiprocessors;  // that the product should use at most; 0: all
};

inline constexpr int64_t kCublasWorkspaceBytes = 32 << 20;  // NVIDIA's advice for Hopper

// Whether cuBLAS can be told how many multiprocessors to use, and "" where it can be used, else why not.
bool cublas_shares_device();
const std::string& cublas_missing();

// Runs on the current device, which is `device`. `workspace`: kCublasWorkspaceBytes of device memory, 256-byte aligned;
// nothing else is allocated, but for a handle at a thread's first calls on a device.
void cublas_gemm(const CublasGemm& gemm, int device, void* workspace, cudaStream_t stream);

}  // namespace qlora
