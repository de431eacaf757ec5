// d = a b + (accumulate ? d : 0) by a warpgroup on the tensor cores (wgmma, sm_90a alone): a 64 x 16 from registers, b
// 16 x kCols from shared memory, d 64 x kCols in fp32.
//
// Warp w of the warpgroup holds rows 16 w.. of a and d; within them, with group = lane / 4 and i = lane % 4, a lane
// holds
//   a[0], a[1]  columns 2i, 2i+1 of rows group and group + 8;  a[2], a[3]  columns 2i+8, 2i+9 of these
//   d[4c], d[4c+1]  columns 8c + 2i, 8c + 2i + 1 of row group;  d[4c+2], d[4c+3]  those of row group + 8
//
// Order: fence_registers() after other instructions have written a or d; products; commit_products(); wait_for_products
// before a is written or d is read again.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/device/shared.cuh"

namespace qlora {

// b in shared memory: its columns one after the other, 64 values (128 bytes) each, at a multiple of 1024 bytes, with
// the 16-byte piece p of column c at place p ^ c % 8. It is described by the low half of a matrix descriptor, to which
// offsets of 16 bytes may be added: of the 64 values of a column a product takes 16, the next kProductStep further.
__device__ __forceinline__ uint32_t describe_columns(const void* columns) {
  constexpr uint32_t kIgnored = 1 << 16;
  return kIgnored | (shared_address(columns) & 0x3FFFF) >> 4;
}
constexpr int kProductStep = 32 / 16;

// The whole descriptor.
__device__ __forceinline__ uint64_t descriptor(uint32_t columns) {
  constexpr uint32_t kEightColumns = 1024 / 16;
  constexpr uint32_t kSwizzle128Bytes = 1u << 30;
  return uint64_t{kSwizzle128Bytes | kEightColumns} << 32 | columns;
}

// What threads or their cp.async wrote to shared memory, and have been waited for, becomes visible to products.
__device__ __forceinline__ void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d as an operand that an empty instruction writes: the compiler neither moves its use before this nor its value away.
template <int kCount>
__device__ __forceinline__ void hold_registers(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The operands of an instruction: d[i].. as C++ expressions, and their numbers in its text.
#define QLORA_FLOATS_8(i)                                                                                     \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define QLORA_FLOATS_16(i) QLORA_FLOATS_8(i), QLORA_FLOATS_8(i + 8)
#define QLORA_FLOATS_32(i) QLORA_FLOATS_16(i), QLORA_FLOATS_16(i + 16)
#define QLORA_FLOATS_64(i) QLORA_FLOATS_32(i), QLORA_FLOATS_32(i + 32)
#define QLORA_NUMBERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define QLORA_NUMBERS_16 QLORA_NUMBERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define QLORA_NUMBERS_32 \
  QLORA_NUMBERS_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QLORA_NUMBERS_64                                                                         \
  QLORA_NUMBERS_32                                                                               \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// COLS columns of d in FLOATS registers a lane, of which A, B and P number the operands behind d.
#define QLORA_MULTIPLY(TYPE, COLS, FLOATS, A, B, P)                                                                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #COLS "k16.f32." TYPE \
               "." TYPE " {" QLORA_NUMBERS_##FLOATS "}, {" A "}, %" B ", p, 1, 1, 0;\n}"                              \
               : QLORA_FLOATS_##FLOATS(0)                                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor(b)), "r"(static_cast<int>(accumulate)))
#define QLORA_MULTIPLY_TYPE(TYPE)                                      \
  if constexpr (kCols == 16) {                                         \
    QLORA_MULTIPLY(TYPE, 16, 8, "%8, %9, %10, %11", "12", "13");       \
  } else if constexpr (kCols == 32) {                                  \
    QLORA_MULTIPLY(TYPE, 32, 16, "%16, %17, %18, %19", "20", "21");    \
  } else if constexpr (kCols == 64) {                                  \
    QLORA_MULTIPLY(TYPE, 64, 32, "%32, %33, %34, %35", "36", "37");    \
  } else {                                                             \
    static_assert(kCols == 128, "expected 16, 32, 64 or 128 columns"); \
    QLORA_MULTIPLY(TYPE, 128, 64, "%64, %65, %66, %67", "68", "69");   \
  }

template <typename T, int kCols>
__device__ __forceinline__ void multiply(float (&d)[kCols / 2], const uint32_t (&a)[4], uint32_t b, bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    QLORA_MULTIPLY_TYPE("f16")
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>);
    QLORA_MULTIPLY_TYPE("bf16")
  }
}

#undef QLORA_MULTIPLY_TYPE
#undef QLORA_MULTIPLY
#undef QLORA_NUMBERS_64
#undef QLORA_NUMBERS_32
#undef QLORA_NUMBERS_16
#undef QLORA_NUMBERS_8
#undef QLORA_FLOATS_64
#undef QLORA_FLOATS_32
#undef QLORA_FLOATS_16
#undef QLORA_FLOATS_8

}  // namespace qlora
