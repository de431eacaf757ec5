// Forward:   left from x' (one pass), then y = x W^T + bias with left B^T as its low-rank term
// Backward:  dleft and dB from dy (one pass), dx = dy W with dleft A as its low-rank term, then dA from x' (one pass)
//
// Workspace, each piece 256-byte aligned: [dleft, backward only][what the product with W or a pass needs, in turn]
#include "cuda/lora/lora_linear.h"

#include <algorithm>

#include "core/weight.h"
#include "cuda/error.h"
#include "cuda/gemm/select.h"
#include "cuda/lora/lora.h"

namespace qlora {
namespace {

constexpr int64_t kAlignment = 256;

int64_t pass_workspace_size(const AdapterPass& pass, const Device& device) {
  const bool is_empty = pass.cols == 0 || (pass.output == nullptr && pass.gradient.values == nullptr);
  return is_empty || !is_narrow_fast(pass.dtype, device) ? 0 : adapter_pass_workspace_size(pass, device);
}

void run_pass(const AdapterPass& pass, const Device& device, void* workspace, cudaStream_t stream) {
  if (pass.output == nullptr && pass.gradient.values == nullptr) return;
  if (pass.cols == 0) {
    if (pass.output == nullptr) return;
    const int64_t bytes = pass.m * left_columns(pass.rank) * size_of(pass.dtype);
    check_cuda(cudaMemsetAsync(pass.output, 0, static_cast<size_t>(bytes), stream), "cudaMemsetAsync");
  } else if (is_narrow_fast(pass.dtype, device)) {
    adapter_pass(pass, device, workspace, stream);
  } else {
    adapter_pass_naive(pass, stream);
  }
}

AdapterPass pass_over(const LoraLinear& problem, const void* x, int64_t cols) {
  AdapterPass pass = {};
  pass.x = x;
  pass.m = problem.gemm.m;
  pass.cols = cols;
  pass.dtype = problem.gemm.dtype;
  pass.rank = problem.lora.rank;
  return pass;
}

AdapterMatrix matrix_a(const LoraLinear& problem, const void* values) { return {values, problem.lora.a_dtype, false}; }
AdapterMatrix matrix_b(const LoraLinear& problem, const void* values) { return {values, problem.lora.b_dtype, true}; }

// left of x'.
AdapterPass forward_pass(const LoraLinear& problem, void* left) {
  AdapterPass pass = pass_over(problem, problem.adapter_x, problem.gemm.weight.cols);
  pass.matrix = matrix_a(problem, problem.lora.a);
  pass.scaling = problem.lora.scaling;
  pass.output = left;
  return pass;
}

// dleft, or null, and dB, or null, of dy.
AdapterPass dy_pass(const LoraLinear& problem, void* dleft, void* db) {
  AdapterPass pass = pass_over(problem, problem.gemm.input, problem.gemm.weight.rows);
  pass.matrix = matrix_b(problem, problem.lora.b);
  pass.scaling = problem.lora.scaling;
  pass.output = dleft;
  pass.left = problem.left;
  pass.gradient = matrix_b(problem, db);
  return pass;
}

// dA of x'.
AdapterPass x_pass(const LoraLinear& problem, const void* dleft, void* da) {
  AdapterPass pass = pass_over(problem, problem.adapter_x, problem.gemm.weight.cols);
  pass.left = dleft;
  pass.gradient = matrix_a(problem, da);
  return pass;
}

int64_t dleft_bytes(const LoraLinear& problem) {
  return round_up(problem.gemm.m * left_columns(problem.lora.rank) * size_of(problem.gemm.dtype), kAlignment);
}

LowRank term_of(const LoraLinear& problem, const void* left, const void* right, qlora_dtype right_dtype,
                bool is_separate) {
  const qlora_lora* const adapter = is_separate ? nullptr : &problem.lora;
  return {left, left_columns(problem.lora.rank), right, right_dtype, problem.lora.rank, adapter};
}

}  // namespace

int64_t lora_workspace_size(const LoraLinear& problem, const Device& device) {
  const Gemm& gemm = problem.gemm;
  char asked = 0;  // only whether a pointer is null is read
  const bool is_forward = gemm.direction == Direction::kForward;
  const bool has_product = (is_forward ? gemm.weight.rows : gemm.weight.cols) > 0;
  int64_t size = 0;
  if (has_product) {  // with the term and, where x' is separate, without it
    Gemm with_term = gemm;
    with_term.low_rank.rank = problem.lora.rank;
    size = std::max(gemm_workspace_size(gemm, device), gemm_workspace_size(with_term, device));
  }
  if (is_forward) return std::max(size, pass_workspace_size(forward_pass(problem, &asked), device));
  for (const AdapterPass& pass : {dy_pass(problem, &asked, &asked), dy_pass(problem, &asked, nullptr),
                                  dy_pass(problem, nullptr, &asked), x_pass(problem, &asked, &asked)}) {
    size = std::max(size, pass_workspace_size(pass, device));
  }
  return dleft_bytes(problem) + size;
}

void run_lora_forward(const LoraLinear& problem, const Device& device, cudaStream_t stream) {
  Gemm gemm = problem.gemm;
  if (gemm.m == 0) return;
  run_pass(forward_pass(problem, problem.left), device, gemm.workspace, stream);
  if (gemm.weight.rows == 0) return;
  if (gemm.weight.cols > 0) {
    const bool is_separate = problem.adapter_x != gemm.input;
    gemm.low_rank = term_of(problem, problem.left, problem.lora.b, problem.lora.b_dtype, is_separate);
  }
  run_gemm(gemm, device, stream);
}

void run_lora_backward(const LoraLinear& problem, const Device& device, cudaStream_t stream) {
  Gemm gemm = problem.gemm;
  const int64_t k = gemm.weight.cols;
  const int64_t n = gemm.weight.rows;
  const auto zero = [&](void* gradient, int64_t count, qlora_dtype dtype) {
    if (gradient == nullptr || count == 0) return;
    check_cuda(cudaMemsetAsync(gradient, 0, static_cast<size_t>(count * size_of(dtype)), stream), "cudaMemsetAsync");
  };
  if (gemm.m == 0) {
    zero(problem.da, problem.lora.rank * k, problem.lora.a_dtype);
    zero(problem.db, problem.lora.rank * n, problem.lora.b_dtype);
    return;
  }
  void* const dleft = gemm.workspace;
  gemm.workspace = static_cast<char*>(gemm.workspace) + dleft_bytes(problem);
  gemm.workspace_size -= dleft_bytes(problem);
  const bool has_term = gemm.output != nullptr && !problem.is_x_separate;
  const bool needs_dleft = k > 0 && (has_term || problem.dadapter_x != nullptr || problem.da != nullptr);
  run_pass(dy_pass(problem, needs_dleft ? dleft : nullptr, problem.db), device, gemm.workspace, stream);
  if (k == 0) return;
  if (has_term) gemm.low_rank = term_of(problem, dleft, problem.lora.a, problem.lora.a_dtype, false);
  if (gemm.output != nullptr) run_gemm(gemm, device, stream);
  if (problem.dadapter_x != nullptr) {
    const AdapterMatrix a = matrix_a(problem, problem.lora.a);
    run_sum({dleft, gemm.m, k, 0, k, gemm.dtype, problem.lora.rank, a, problem.dadapter_x, false}, device, stream);
  }
  run_pass(x_pass(problem, dleft, problem.da), device, gemm.workspace, stream);
}

}  // namespace qlora
