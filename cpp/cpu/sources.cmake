# CPU kernels. Each instruction set is one file with its own flags, chosen at run time.
target_sources(qlora PRIVATE
  cpp/cpu/api.cpp
  cpp/cpu/kernels.cpp
  cpp/cpu/kernels_plain.cpp
  cpp/cpu/scratch.cpp)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64)$")
  target_sources(qlora PRIVATE cpp/cpu/kernels_avx2.cpp cpp/cpu/kernels_avx512.cpp)
  set_source_files_properties(cpp/cpu/kernels_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
  set_source_files_properties(cpp/cpu/kernels_avx512.cpp PROPERTIES COMPILE_OPTIONS
    "-mavx512f;-mavx512bw;-mavx512dq;-mavx512vl;-mfma;-mf16c")
  target_compile_definitions(qlora PRIVATE QLORA_X86_64)
endif()
