// The operators of torch.ops.qlora: this file is their table of contents. CPU implementations: cpu.cpp; CUDA: cuda.cpp;
// fake kernels, autograd and the public wrappers: python/qlora/ops.py, group_ops.py, lora_ops.py.
//
// A 4-bit weight travels as `packed, absmax, nested_absmax?, nested_quant_map?, nested_offset?, shape, block_size,
// quant_type` everywhere, the names of the checkpoint keys:
//   packed            bytes of any dtype, at least (n * k + 1) / 2 of them
//   absmax            float32 [num_blocks], or uint8 [num_blocks] with double quantisation
//   nested_absmax     float32 [ceil(num_blocks / 256)]    with double quantisation only
//   nested_quant_map  float32 [256]                       with double quantisation only
//   nested_offset     float32 [] or [1]                   with double quantisation only
//   shape             [rows, cols] of the weight; any rank for dequantize_4bit
//   quant_type        "nf4" or "fp4"
#include <torch/csrc/stable/library.h>

#include <string>

STABLE_TORCH_LIBRARY(qlora, m) {
  // Also as the overload `raw`, which has no autograd formula: compiled graphs of one direction call it (see
  // python/qlora/compile_passes.py), for which the way through a formula in Python takes longer than the launches.
  const auto def_with_raw = [&m](const std::string& name, const std::string& signature) {
    m.def((name + signature).c_str());
    m.def((name + ".raw" + signature).c_str());
  };

  // [any shape] -> uint8 [(n + 1) / 2, 1], float32 [num_blocks]
  m.def("quantize_4bit(Tensor input, int block_size, str quant_type) -> (Tensor, Tensor)");

  // -> [*shape] of dtype
  m.def(
      "dequantize_4bit(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_quant_map, "
      "Tensor? nested_offset, int[] shape, int block_size, str quant_type, ScalarType dtype) -> Tensor");

  // float32 [n], float32 [], float32 [256] -> uint8 [n], float32 [ceil(n / 256)]
  m.def("quantize_absmax(Tensor absmax, Tensor nested_offset, Tensor nested_quant_map) -> (Tensor, Tensor)");

  // uint8 [n] -> float32 [n]
  m.def(
      "dequantize_absmax(Tensor absmax, Tensor nested_absmax, Tensor nested_quant_map, Tensor nested_offset) -> "
      "Tensor");

  // float32 [num_columns, n] each, num_columns at most 32; coupling [num_columns, num_columns] -> rounded and change
  // [num_columns, n]: columns of a transposed weight rounded in turn, for calibration
  m.def(
      "round_columns_nf4(Tensor values, Tensor scales, Tensor inverse, Tensor coupling, Tensor? previous) -> "
      "(Tensor, Tensor)");

  // y = x W^T + b: [..., k] -> [..., n]
  def_with_raw("linear_4bit",
               "(Tensor input, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_quant_map, "
               "Tensor? nested_offset, Tensor? bias, int[] shape, int block_size, str quant_type) -> Tensor");

  // y_i = x W_i^T + b_i, weights of `rows[i]` rows that share x: [..., k] -> [..., rows[i]] each. The lists have a
  // tensor for each weight, but the nested ones none where the scales are plain, and `bias` one for each index in
  // `biased`.
  m.def(
      "linear_4bit_group(Tensor input, Tensor[] packed, Tensor[] absmax, Tensor[] nested_absmax, "
      "Tensor[] nested_quant_map, Tensor[] nested_offset, Tensor[] bias, int[] biased, int[] rows, int block_size, "
      "str quant_type) -> Tensor[]");

  // dx = dy W: [..., n] -> [..., k]
  def_with_raw(
      "linear_4bit_grad_input",
      "(Tensor grad_output, Tensor packed, Tensor absmax, Tensor? nested_absmax, "
      "Tensor? nested_quant_map, Tensor? nested_offset, int[] shape, int block_size, str quant_type) -> Tensor");

  // y = x W^T + b + left B^T, left = scaling x' A^T with x' = adapter_input or else x: [..., k] -> [..., n] and left,
  // [m, rank rounded up to a multiple of 64] of x's dtype, zeros from column rank on. a [rank, k] and b [n, rank] may
  // be of another dtype.
  def_with_raw(
      "lora_linear_4bit",
      "(Tensor input, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_quant_map, "
      "Tensor? nested_offset, Tensor? bias, Tensor a, Tensor b, float scaling, Tensor? adapter_input, int[] shape, "
      "int block_size, str quant_type) -> (Tensor, Tensor)");

  // The gradients of lora_linear_4bit towards input, adapter_input, a and b: each of no values where not asked for.
  // adapter_input is x', which is_separate says to be another tensor than the input.
  def_with_raw(
      "lora_linear_4bit_backward",
      "(Tensor grad_output, Tensor adapter_input, Tensor left, Tensor packed, Tensor absmax, "
      "Tensor? nested_absmax, Tensor? nested_quant_map, Tensor? nested_offset, Tensor a, Tensor b, float scaling, "
      "bool is_separate, bool needs_input, bool needs_adapter_input, bool needs_a, bool needs_b, int[] shape, "
      "int block_size, str quant_type) -> (Tensor, Tensor, Tensor, Tensor)");

  // int64 [...] -> [..., cols] of dtype
  m.def(
      "embedding_4bit(Tensor indices, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_quant_map, "
      "Tensor? nested_offset, int[] shape, int block_size, str quant_type, ScalarType dtype) -> Tensor");
}
