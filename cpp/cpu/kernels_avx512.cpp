// The CPU kernels for x86-64 with AVX-512 F, BW, DQ and VL.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 header starts undefined vectors this way (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define QLORA_LEVEL avx512
#include "cpu/vec_avx512.h"
// The vectors come first: all below is written in terms of them.
#include "cpu/kernels_all.h"

const qlora::cpu::Kernels qlora::cpu::kKernelsAvx512 = qlora::cpu::avx512::all_kernels("avx512");
