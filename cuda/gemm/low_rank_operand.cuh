// The right operand of a low-rank term, [rows, rank] of any float, as kernels on the tensor cores take it: in T, to
// shared memory, 64 columns of a row in 128 bytes, the 16-byte piece p of row r at place p ^ r % 8.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/low_rank.h"
#include "cuda/device/numeric.cuh"

namespace qlora {

#if defined(__CUDACC__)

// 8 values in T, the first `count` from `source`. is_whole: 16-byte aligned.
template <typename T, typename Value>
__device__ __forceinline__ uint4 load_eight(const Value* source, int count, bool is_whole) {
  float values[8] = {};
  if (count == 8 && is_whole) {
    constexpr int kVectors = sizeof(Value) * 8 / 16;
    uint4 loaded[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) loaded[i] = reinterpret_cast<const uint4*>(source)[i];
    const auto* const words = reinterpret_cast<const uint32_t*>(loaded);
#pragma unroll
    for (int i = 0; i < kVectors * 4; ++i) Word<Value>::unpack(words[i], values + i * Word<Value>::kValues);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) values[i] = to_float(source[i]);
    }
  }
  return make_uint4(Word<T>::pack(values), Word<T>::pack(values + 2), Word<T>::pack(values + 4),
                    Word<T>::pack(values + 6));
}

// f with a null pointer to the operand's type.
template <typename Function>
__device__ __forceinline__ void dispatch_right(qlora_dtype dtype, Function&& f) {
  if (dtype == QLORA_FLOAT32) {
    f(static_cast<float*>(nullptr));
  } else if (dtype == QLORA_BFLOAT16) {
    f(static_cast<__nv_bfloat16*>(nullptr));
  } else {
    f(static_cast<__half*>(nullptr));
  }
}

template <typename T, typename Value, int kRows, int kThreads>
__device__ __forceinline__ void copy_right_of(const LowRank& term, int first, int num_rows, int first_col,
                                              bool is_whole, unsigned char* to) {
  const int piece = static_cast<int>(threadIdx.x) % 8;
  const int col = first_col + piece * 8;
  const int count = min(max(static_cast<int>(term.rank) - col, 0), 8);
#pragma unroll 4
  for (int row = threadIdx.x / 8; row < kRows; row += kThreads / 8) {
    const auto* const source = static_cast<const Value*>(term.right) + int64_t{first + row} * term.rank + col;
    *reinterpret_cast<uint4*>(to + row * 128 + (piece ^ row % 8) * 16) =
        load_eight<T>(source, first + row < num_rows ? count : 0, is_whole);
  }
}

// Rows first.. and columns first_col.., by the first kThreads threads; zeros behind the last row and column. is_whole:
// 8 values of a row are 16-byte aligned.
template <typename T, int kRows, int kThreads>
__device__ __noinline__ void copy_right(const LowRank& term, int first, int num_rows, int first_col, bool is_whole,
                                        unsigned char* to) {
  dispatch_right(term.right_dtype, [&](auto* typed) {
    using Value = std::remove_pointer_t<decltype(typed)>;
    copy_right_of<T, Value, kRows, kThreads>(term, first, num_rows, first_col, is_whole, to);
  });
}

#endif

}  // namespace qlora
