// The LoRA update as a term of the products of core/gemm.h, and the sizes of its narrow operands.
#pragma once

#include <cstdint>

#include "core/format.h"
#include "qlora/qlora.h"

namespace qlora {

inline constexpr int64_t kMaxRank = QLORA_MAX_RANK;
inline constexpr int64_t kLeftMultiple = 64;  // columns: what a kernel takes from the sum's dimension at a time

// Row length of a narrow operand [m, rank], whose columns from `rank` on are zeros.
inline int64_t left_columns(int64_t rank) { return round_up(rank, kLeftMultiple); }

// Adds left [m, rank] right^T with right [n, rank] to y, or left right with right [rank, k] to dx. `left` holds the
// scaling: s x A^T, whose right is B, or s dy B, whose right is A. Pointers are null where only sizes are asked for.
struct LowRank {
  const void* left;     // [m, left_stride] of the problem's dtype, zeros from column rank on
  int64_t left_stride;  // left_columns(rank)
  const void* right;
  qlora_dtype right_dtype;
  int64_t rank;  // 1 to kMaxRank; 0: there is no such term
  // Whose scaling B A, added to the weight, is the term; null where `left` was made of another input than the
  // product's.
  const qlora_lora* adapter;
};

}  // namespace qlora
