#include "cuda/lora/lora.h"

namespace qlora {

bool is_narrow_fast(qlora_dtype dtype, const Device& device) { return dtype != QLORA_FLOAT32 && device.major >= 8; }

void run_sum(const LowRankSum& sum, const Device& device, cudaStream_t stream) {
  if (sum.m == 0 || sum.begin >= sum.end) return;
  if (is_narrow_fast(sum.dtype, device)) {
    add_low_rank(sum, device, stream);
  } else {
    add_low_rank_naive(sum, stream);
  }
}

void add_update(const Gemm& problem, int64_t begin, int64_t end, const Device& device, cudaStream_t stream) {
  const bool is_forward = problem.direction == Direction::kForward;
  const LowRank& term = problem.low_rank;
  const int64_t cols = is_forward ? problem.weight.rows : problem.weight.cols;
  const AdapterMatrix matrix = {term.right, term.right_dtype, is_forward};
  run_sum({term.left, problem.m, cols, begin, end, problem.dtype, term.rank, matrix, problem.output, true}, device,
          stream);
}

void add_update(const Gemm& problem, const Device& device, cudaStream_t stream) {
  const bool is_forward = problem.direction == Direction::kForward;
  add_update(problem, 0, is_forward ? problem.weight.rows : problem.weight.cols, device, stream);
}

}  // namespace qlora
