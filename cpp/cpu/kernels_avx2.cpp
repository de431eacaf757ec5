// The CPU kernels for x86-64 with AVX2, FMA and F16C.
#define QLORA_LEVEL avx2
#include "cpu/vec_avx2.h"
// The vectors come first: all below is written in terms of them.
#include "cpu/kernels_all.h"

const qlora::cpu::Kernels qlora::cpu::kKernelsAvx2 = qlora::cpu::avx2::all_kernels("avx2");
