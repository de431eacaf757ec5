// The problem that a 4-bit linear kernel is given, and what it says of itself in messages.
#pragma once

#include <cstdint>
#include <string>

#include "core/low_rank.h"
#include "core/weight.h"
#include "qlora/qlora.h"

namespace qlora {

enum class Direction {
  kForward,    // y [m, n] = x [m, k] W^T + bias + low-rank term,  W [n, k]
  kGradInput,  // dx [m, k] = dy [m, n] W + low-rank term
};

struct Gemm {
  Direction direction;
  int64_t m;
  qlora_dtype dtype;
  qlora_weight_4bit weight;  // rows n, cols k
  const void* input;         // x [m, k] or dy [m, n]
  const void* bias;          // [n] or null, or not known yet where only has_bias is read
  void* output;              // y [m, n] or dx [m, k]
  void* workspace;
  int64_t workspace_size;
  bool has_bias;
  LowRank low_rank;  // of rank 0 where there is none
};

// For example "linear_4bit m=4 n=4096 k=4096 bfloat16 nf4 block 64 double-quantised bias".
std::string to_string(const Gemm& problem);

}  // namespace qlora
