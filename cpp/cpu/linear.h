// y = x W^T + b and dx = dy W, each with the update of an adapter where low_rank has a rank.
#pragma once

#include "cpu/few_rows.h"
#include "cpu/gemm.h"
#include "cpu/panel.h"

namespace qlora::cpu::QLORA_LEVEL {
namespace {

template <class B>
inline void multiply_by(const Product& product, qlora_dtype dtype, const B& b) {
  with_dtype(dtype, [&](auto type) {
    constexpr qlora_dtype kType = decltype(type)::value;
    if (product.m <= kMaxFewRows && b.is_grouped()) return multiply_few<kType>(product, b);
    multiply_all<kType>(product, b);
  });
}

inline void linear(const void* x, int64_t m, qlora_dtype dtype, const qlora_weight_4bit& weight, const void* bias,
                   const LowRank& low_rank, void* y, int64_t row_begin, int64_t row_end) {
  multiply_by({x, m, weight.cols, y, weight.rows, bias, row_begin, row_end, {low_rank, true}}, dtype,
              TransposedPanel(weight));
}

inline void linear_grad_input(const void* dy, int64_t m, qlora_dtype dtype, const qlora_weight_4bit& weight,
                              const LowRank& low_rank, void* dx, int64_t col_begin, int64_t col_end) {
  multiply_by({dy, m, weight.rows, dx, weight.cols, nullptr, col_begin, col_end, {low_rank, false}}, dtype,
              Panel(weight));
}

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
