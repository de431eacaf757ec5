// Working memory of the CPU kernels: one buffer a thread, which grows to the largest request and lives as long as the
// thread, so that a call allocates nothing once it is warm. Requests are bounded by the tile sizes of gemm.h, but for
// those of lora.h: 4 columns or a row of its operands as fp32.
#pragma once

#include <cstddef>

namespace qlora::cpu {

// 64-byte aligned, uninitialised, valid until the thread's next call of scratch(). Throws std::bad_alloc.
float* scratch(std::size_t num_floats);

}  // namespace qlora::cpu
