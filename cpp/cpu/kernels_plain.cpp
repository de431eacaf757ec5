// The CPU kernels for any processor, in plain C++.
#define QLORA_LEVEL plain
#include "cpu/vec_plain.h"
// The vectors come first: all below is written in terms of them.
#include "cpu/kernels_all.h"

const qlora::cpu::Kernels qlora::cpu::kKernelsPlain = qlora::cpu::plain::all_kernels("plain");
