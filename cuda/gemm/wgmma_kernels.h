// What the kernels on Hopper's wgmma ask of a problem and of the device alike. Only their .cu files include this.
#pragma once

#include <cstdint>
#include <string>

#include "core/gemm.h"
#include "cuda/device_guard.h"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/step_scales.cuh"
#include "cuda/remember.h"

namespace qlora {

inline constexpr int kReservedBytes = 1024;  // of shared memory, that CUDA puts before a block's

// As supports_x of gemm.h, but for the direction: 16 bits, up to max_rows rows of the input; `kernel` is any of the
// family's instances.
inline bool supports_wgmma(const Gemm& problem, const Device& device, int max_rows, const void* kernel,
                           std::string* why_not) {
  constexpr int64_t kMaxSize = int64_t{1} << 30;
  const qlora_weight_4bit& weight = problem.weight;
  if (device.major != 9)
    return refuse(why_not, "expected compute capability 9.0, got ", device.major, ".", device.minor);
  if (problem.dtype == QLORA_FLOAT32) return refuse(why_not, "expected float16 or bfloat16");
  if (problem.m < 1 || problem.m > max_rows) return refuse(why_not, "m: expected 1 to ", max_rows);
  if (weight.block_size < kBlockCols) return refuse(why_not, "block_size: expected at least ", kBlockCols);
  if (weight.cols < 1 || weight.cols % kBlockCols != 0)
    return refuse(why_not, "k: expected a multiple of ", kBlockCols);
  if (weight.rows < 1 || weight.rows > kMaxSize || weight.cols > kMaxSize)
    return refuse(why_not, "n, k: expected 1 to 2^30");
  if (device.reserved_shared_bytes != kReservedBytes) {
    return refuse(why_not, "expected ", kReservedBytes, " reserved bytes of shared memory, got ",
                  device.reserved_shared_bytes);
  }
  if (!is_compiled_for_sm90(device, kernel))
    return refuse(why_not, "expected a libqlora built for this GPU's architecture (QLORA_CUDA_ARCHS)");
  return true;
}

}  // namespace qlora
