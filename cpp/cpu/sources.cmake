# CPU kernels: one source (kernels_all.h and the headers under it), compiled once for each instruction set; kernels.cpp
# chooses at run time. No contraction: quantise and dequantise must be bit-equal everywhere (sums fuse explicitly).
target_sources(qlora PRIVATE
  cpp/cpu/api.cpp
  cpp/cpu/kernels.cpp
  cpp/cpu/kernels_plain.cpp
  cpp/cpu/scratch.cpp)
set_source_files_properties(cpp/cpu/kernels_plain.cpp PROPERTIES COMPILE_OPTIONS "-O3;-ffp-contract=off")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  target_sources(qlora PRIVATE cpp/cpu/kernels_avx2.cpp cpp/cpu/kernels_avx512.cpp)
  set_source_files_properties(cpp/cpu/kernels_avx2.cpp PROPERTIES COMPILE_OPTIONS
    "-O3;-ffp-contract=off;-mavx2;-mfma;-mf16c")
  set_source_files_properties(cpp/cpu/kernels_avx512.cpp PROPERTIES COMPILE_OPTIONS
    "-O3;-ffp-contract=off;-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mfma;-mf16c")
  target_compile_definitions(qlora PRIVATE QLORA_X86_64)
endif()
