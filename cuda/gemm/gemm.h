// The linear kernels. Each is a trio:
//   supports_x(problem, device, why_not)  whether the kernel serves the problem; if not, the first reason why, where
//                                         why_not is not null (a call chooses three times and wants no text made)
//   x_workspace_size(problem, device)     bytes that x needs; absent for kernels that need none
//   x(problem, device, stream)            runs it on the current device, which is `device`
// Predicates read only shapes, dtypes and whether pointers are null. Their order is select.cpp's business.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "core/gemm.h"
#include "core/status.h"
#include "cuda/device_guard.h"

namespace qlora {

// False, for a predicate to return, with the reason for those who ask.
template <typename... Parts>
bool refuse(std::string* why_not, const Parts&... parts) {
  if (why_not != nullptr) *why_not = concat(parts...);
  return false;
}

// naive.cu: any shape, a thread an output. The oracle on the GPU.
bool supports_naive(const Gemm& problem, const Device& device, std::string* why_not);
void naive(const Gemm& problem, const Device& device, cudaStream_t stream);

// skinny_sm90.cu: 1 to 16 rows of x in 16 bits, block 64, k a multiple of 256; forward.
bool supports_skinny_sm90(const Gemm& problem, const Device& device, std::string* why_not);
void skinny_sm90(const Gemm& problem, const Device& device, cudaStream_t stream);

// The same for `count` forward problems that share their input, in one launch: up to 3, of one k, format and kind of
// scales.
bool supports_skinny_sm90_group(const Gemm* problems, int count, const Device& device, std::string* why_not);
void skinny_sm90_group(const Gemm* problems, int count, const Device& device, cudaStream_t stream);

// skinny_sm80.cu: 1 to 32 rows of x in 16 bits, blocks of 64 and more, k a multiple of 64; forward, any GPU from sm_80
// on.
bool supports_skinny_sm80(const Gemm& problem, const Device& device, std::string* why_not);
int64_t skinny_sm80_workspace_size(const Gemm& problem, const Device& device);
void skinny_sm80(const Gemm& problem, const Device& device, cudaStream_t stream);

// narrow_sm90.cu: 1 to 64 rows of x in 16 bits, blocks of 64 and more, k a multiple of 64; forward, Hopper alone.
bool supports_narrow_sm90(const Gemm& problem, const Device& device, std::string* why_not);
int64_t narrow_sm90_workspace_size(const Gemm& problem, const Device& device);
void narrow_sm90(const Gemm& problem, const Device& device, cudaStream_t stream);

// wide_sm90.cu: any number of rows of x in 16 bits, blocks of 64 and more, k a multiple of 64; forward, Hopper alone.
bool supports_wide_sm90(const Gemm& problem, const Device& device, std::string* why_not);
int64_t wide_sm90_workspace_size(const Gemm& problem, const Device& device);
void wide_sm90(const Gemm& problem, const Device& device, cudaStream_t stream);

// skinny_grad_sm90.cu: 1 to 32 rows of dy in bf16, blocks of 64 and more, k a multiple of 64; input gradient, Hopper
// alone.
bool supports_skinny_grad_sm90(const Gemm& problem, const Device& device, std::string* why_not);
int64_t skinny_grad_sm90_workspace_size(const Gemm& problem, const Device& device);
void skinny_grad_sm90(const Gemm& problem, const Device& device, cudaStream_t stream);

// wide_grad_sm90.cu: any number of rows of dy in 16 bits, the same else.
bool supports_wide_grad_sm90(const Gemm& problem, const Device& device, std::string* why_not);
int64_t wide_grad_sm90_workspace_size(const Gemm& problem, const Device& device);
void wide_grad_sm90(const Gemm& problem, const Device& device, cudaStream_t stream);

// dense.cu: dequantise a chunk that fits L2, multiply it with cuBLAS, next chunk.
bool supports_dense(const Gemm& problem, const Device& device, std::string* why_not);
int64_t dense_workspace_size(const Gemm& problem, const Device& device);
void dense(const Gemm& problem, const Device& device, cudaStream_t stream);

}  // namespace qlora
