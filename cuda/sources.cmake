# CUDA kernels, for CMAKE_CUDA_ARCHITECTURES of find_cuda.cmake.
target_sources(qlora PRIVATE
  cuda/absmax.cu
  cuda/api.cpp
  cuda/dequantize.cu cuda/dequantize_sm90.cu
  cuda/device_guard.cpp cuda/device_info.cpp
  cuda/embedding.cu
  cuda/gemm/add_products.cu
  cuda/gemm/cublas.cpp
  cuda/gemm/dense.cu
  cuda/gemm/naive.cu
  cuda/gemm/narrow_sm90.cu
  cuda/gemm/select.cpp
  cuda/gemm/skinny_grad_sm90.cu
  cuda/gemm/skinny_sm80.cu
  cuda/gemm/skinny_sm90.cu
  cuda/gemm/split.cu
  cuda/gemm/wide_grad_sm90.cu
  cuda/gemm/wide_sm90.cu
  cuda/lora/adapter_pass.cu cuda/lora/add_low_rank.cu cuda/lora/finish_parts.cu cuda/lora/lora_linear.cpp cuda/lora/merged_weight.cu cuda/lora/naive.cu cuda/lora/update.cpp
  cuda/quantize.cu
  cuda/remember.cpp cuda/round_columns.cu cuda/side_stream.cpp
  cuda/tensor_map.cpp)
target_include_directories(qlora PRIVATE . ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
# -lineinfo names source lines in profilers; -compress-all keeps the wheel small.
target_compile_options(qlora PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-lineinfo;-Xfatbin=-compress-all;-t2;\
-Xcompiler=-Wall,-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=>")
set_target_properties(qlora PROPERTIES CUDA_RUNTIME_LIBRARY Static)
