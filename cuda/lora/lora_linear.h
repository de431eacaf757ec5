// A linear layer with a LoRA adapter, forward and backward: its products in order, and the memory between them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/gemm.h"
#include "cuda/device_guard.h"
#include "qlora/qlora.h"

namespace qlora {

inline constexpr uintptr_t kLeftAlignment = 16;  // bytes

// As the parameters of qlora_lora_linear_4bit_cuda and of its backward form are described in qlora.h.
struct LoraLinear {
  Gemm gemm;  // the product with W, without a low-rank term; its workspace is that of the whole. Output dx may be null
  qlora_lora lora;
  const void* adapter_x;
  void* left;  // written by the forward pass
  // Backward
  bool is_x_separate;
  void* dadapter_x;
  void* da;
  void* db;
};

// Of a forward or backward pass with at least one row, whichever gradients are asked for.
int64_t lora_workspace_size(const LoraLinear& problem, const Device& device);
void run_lora_forward(const LoraLinear& problem, const Device& device, cudaStream_t stream);
void run_lora_backward(const LoraLinear& problem, const Device& device, cudaStream_t stream);

}  // namespace qlora
