// The kernels of one level, as a table. Included by kernels_<level>.cpp after the level's vectors.
#pragma once

#include "cpu/absmax.h"
#include "cpu/dequantize.h"
#include "cpu/embedding.h"
#include "cpu/kernels.h"
#include "cpu/linear.h"
#include "cpu/lora.h"
#include "cpu/quantize.h"
#include "cpu/round_columns.h"

namespace qlora::cpu::QLORA_LEVEL {
namespace {

constexpr Kernels all_kernels(const char* name) {
  return {name,   quantize,          dequantize,      quantize_absmax,  dequantize_absmax, embedding,
          linear, linear_grad_input, adapter_product, adapter_gradient, round_columns};
}

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
