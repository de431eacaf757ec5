// The CUDA half of the C interface in a build without CUDA: every function says so.
#include "core/status.h"
#include "qlora/qlora.h"

namespace {

qlora_status no_cuda(const char* op) {
  return qlora::guarded([&] {
    qlora::fail(QLORA_UNSUPPORTED, op, ": expected a build with CUDA, got a CPU-only libqlora ", qlora_version(),
                " (build it again where nvcc is found)");
  });
}

}  // namespace

qlora_status qlora_device_count(int32_t* count) {
  return qlora::guarded([&] {
    qlora::expect(count != nullptr, "device_count: count: expected a pointer, got null");
    *count = 0;
  });
}

qlora_status qlora_device_info(int32_t, qlora_device_properties*) { return no_cuda("device_info"); }

qlora_status qlora_explain_linear_4bit(const qlora_weight_4bit*, int64_t, qlora_dtype, int, int32_t, char*, int64_t) {
  return no_cuda("explain_linear_4bit");
}

qlora_status qlora_quantize_4bit_cuda(const void*, qlora_dtype, int64_t, int64_t, qlora_format, uint8_t*, float*,
                                      int32_t, qlora_stream) {
  return no_cuda("quantize_4bit");
}

qlora_status qlora_dequantize_4bit_cuda(const qlora_weight_4bit*, void*, qlora_dtype, int32_t, qlora_stream) {
  return no_cuda("dequantize_4bit");
}

qlora_status qlora_quantize_absmax_cuda(const float*, int64_t, const float*, const float*, uint8_t*, float*, int32_t,
                                        qlora_stream) {
  return no_cuda("quantize_absmax");
}

qlora_status qlora_dequantize_absmax_cuda(const uint8_t*, int64_t, const float*, const float*, const float*, float*,
                                          int32_t, qlora_stream) {
  return no_cuda("dequantize_absmax");
}

qlora_status qlora_round_columns_nf4_cuda(const float*, const float*, const float*, const float*, const float*, int64_t,
                                          int64_t, float*, float*, int32_t, qlora_stream) {
  return no_cuda("round_columns_nf4");
}

qlora_status qlora_linear_4bit_cuda(const void*, int64_t, qlora_dtype, const qlora_weight_4bit*, const void*, void*,
                                    void*, int64_t, int32_t, qlora_stream) {
  return no_cuda("linear_4bit");
}

qlora_status qlora_linear_4bit_workspace_size(const qlora_weight_4bit*, int64_t, qlora_dtype, int, int, int32_t,
                                              int64_t*) {
  return no_cuda("linear_4bit_workspace_size");
}

qlora_status qlora_linear_4bit_group_cuda(const void*, int64_t, qlora_dtype, const qlora_weight_4bit*, int64_t,
                                          const void* const*, void* const*, void*, int64_t, int32_t, qlora_stream) {
  return no_cuda("linear_4bit_group");
}

qlora_status qlora_linear_4bit_group_workspace_size(const qlora_weight_4bit*, int64_t, int64_t, qlora_dtype,
                                                    const void* const*, int32_t, int64_t*) {
  return no_cuda("linear_4bit_group_workspace_size");
}

qlora_status qlora_explain_linear_4bit_group(const qlora_weight_4bit*, int64_t, int64_t, qlora_dtype, int32_t, char*,
                                             int64_t) {
  return no_cuda("explain_linear_4bit_group");
}

qlora_status qlora_linear_4bit_grad_input_cuda(const void*, int64_t, qlora_dtype, const qlora_weight_4bit*, void*,
                                               void*, int64_t, int32_t, qlora_stream) {
  return no_cuda("linear_4bit_grad_input");
}

qlora_status qlora_lora_linear_4bit_cuda(const void*, const void*, int64_t, qlora_dtype, const qlora_weight_4bit*,
                                         const void*, const qlora_lora*, void*, void*, void*, int64_t, int32_t,
                                         qlora_stream) {
  return no_cuda("lora_linear_4bit");
}

qlora_status qlora_lora_linear_4bit_backward_cuda(const void*, const void*, const void*, int64_t, qlora_dtype,
                                                  const qlora_weight_4bit*, const qlora_lora*, int, void*, void*, void*,
                                                  void*, void*, int64_t, int32_t, qlora_stream) {
  return no_cuda("lora_linear_4bit_backward");
}

qlora_status qlora_lora_linear_4bit_workspace_size(const qlora_weight_4bit*, int64_t, qlora_dtype, const qlora_lora*,
                                                   int, int, int32_t, int64_t*) {
  return no_cuda("lora_linear_4bit_workspace_size");
}

qlora_status qlora_embedding_4bit_cuda(const int64_t*, int64_t, const qlora_weight_4bit*, void*, qlora_dtype, int32_t,
                                       qlora_stream) {
  return no_cuda("embedding_4bit");
}
