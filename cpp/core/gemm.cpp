#include "core/gemm.h"

#include "core/status.h"

namespace qlora {

std::string to_string(const Gemm& problem) {
  const qlora_weight_4bit& weight = problem.weight;
  const std::string low_rank = problem.low_rank.rank > 0 ? concat(" rank ", problem.low_rank.rank) : "";
  return concat(problem.direction == Direction::kForward ? "linear_4bit" : "linear_4bit_grad_input", " m=", problem.m,
                " n=", weight.rows, " k=", weight.cols, " ", to_string(problem.dtype), " ", to_string(weight.format),
                " block ", weight.block_size, is_nested(weight) ? " double-quantised" : "",
                problem.has_bias ? " bias" : "", low_rank);
}

}  // namespace qlora
