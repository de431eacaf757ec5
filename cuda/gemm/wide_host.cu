#include "core/status.h"
#include "cuda/gemm/wide_sm90.cuh"

namespace qlora::wide {
namespace {

bool is_forward(const Gemm& problem) { return problem.direction == Direction::kForward; }
int64_t width_of(const Gemm& problem) { return is_forward(problem) ? problem.weight.rows : problem.weight.cols; }
int64_t depth_of(const Gemm& problem) { return is_forward(problem) ? problem.weight.cols : problem.weight.rows; }

int num_parts_of(const Gemm& problem, const Device& device) {
  return best_num_parts(ceil_div(width_of(problem), kTile), ceil_div(depth_of(problem), kStep),
                        device.num_multiprocessors);
}

}  // namespace

std::string supports(const Gemm& problem, const Device& device, const void* any) {
  constexpr int64_t kMaxSize = int64_t{1} << 30;
  const qlora_weight_4bit& weight = problem.weight;
  if (device.major != 9) return concat("expected compute capability 9.0, got ", device.major, ".", device.minor);
  if (problem.dtype == QLORA_FLOAT32) return "expected float16 or bfloat16";
  if (problem.m < 1 || problem.m > kMaxTokens) return concat("m: expected 1 to ", kMaxTokens);
  if (weight.block_size < kBlockCols) return concat("block_size: expected at least ", kBlockCols);
  if (weight.cols < 1 || weight.cols % kBlockCols != 0) return concat("k: expected a multiple of ", kBlockCols);
  if (weight.rows < 1 || weight.rows > kMaxSize || weight.cols > kMaxSize) return "n, k: expected 1 to 2^30";
  if (!is_compiled_for_sm90(device, any))
    return "expected a libqlora built for this GPU's architecture (QLORA_CUDA_ARCHS)";
  return "";
}

int64_t workspace_size(const Gemm& problem, const Device& device) {
  const int parts = num_parts_of(problem, device);
  return parts == 1 ? 0 : parts * problem.m * width_of(problem) * static_cast<int64_t>(sizeof(float));
}

Arguments arguments_of(const Gemm& problem, const Device& device) {
  const qlora_weight_4bit& weight = problem.weight;
  Arguments arguments = {};
  arguments.packed = static_cast<const uint8_t*>(weight.packed);
  arguments.scales = scales_of(weight);
  arguments.scale_factor = 1.0f;
  arguments.input = problem.input;
  arguments.bias = problem.bias;
  arguments.output = problem.output;
  arguments.num_parts = num_parts_of(problem, device);
  arguments.parts = arguments.num_parts == 1 ? nullptr : static_cast<float*>(problem.workspace);
  arguments.m = static_cast<int>(problem.m);
  arguments.rows = static_cast<int>(weight.rows);
  arguments.cols = static_cast<int>(weight.cols);
  arguments.width = static_cast<int>(width_of(problem));
  arguments.depth = static_cast<int>(depth_of(problem));
  arguments.is_weight_aligned = is_aligned(weight.packed, 16);
  arguments.is_output_aligned = is_aligned(problem.output, 8);
  arguments.is_input_aligned = is_aligned(problem.input, 16) && arguments.depth % 8 == 0;
  arguments.are_scales_aligned = weight.block_size == kBlockCols && weight.cols % (4 * kBlockCols) == 0 &&
                                 is_aligned(weight.absmax_codes, 4) && is_aligned(weight.absmax, 16);
  return arguments;
}

}  // namespace qlora::wide
