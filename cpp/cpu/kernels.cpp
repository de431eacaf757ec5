// Which instruction set the CPU kernels use.
#include "cpu/kernels.h"

#include <cstdlib>
#include <cstring>

namespace qlora::cpu {
namespace {

#if defined(QLORA_X86_64)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const Kernels& choose() {
#if defined(QLORA_X86_64)
  const char* wanted = std::getenv("QLORA_CPU_KERNELS");
  const bool is_plain = wanted != nullptr && std::strcmp(wanted, kKernelsPlain.name) == 0;
  const bool is_avx2 = wanted != nullptr && std::strcmp(wanted, kKernelsAvx2.name) == 0;
  if (!is_plain && !is_avx2 && has_avx512()) return kKernelsAvx512;
  if (!is_plain && has_avx2()) return kKernelsAvx2;
#endif
  return kKernelsPlain;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace qlora::cpu

const char* qlora_cpu_kernels(void) { return qlora::cpu::kernels().name; }
