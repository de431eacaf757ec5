// The operands of merged_weight.cu: A^T of a warp's 64 columns from memory to registers, B of a tile's rows to shared
// memory, and from there to registers.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device/copy_async.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/scales.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/gemm/low_rank_operand.cuh"

namespace qlora::merged {

inline constexpr int kWarps = 16;
inline constexpr int kThreads = kWarps * 32;
inline constexpr int kWarpCols = 64;
// Rows of a tile that a warp has: what a tile costs beside its values weighs less with more, but their codes are kept
// in registers. kSteps: see merged_weight_kernel.
__host__ __device__ constexpr int warp_rows(int steps) { return steps == 1 || steps == 2 ? 64 : 32; }
inline constexpr int kLaneCols = 8;
inline constexpr int kPairedRows = 2;            // of a lane in a step
inline constexpr int kColSteps = kLaneCols / 2;  // the left operand's rows are 2 columns of each of 8 lanes

struct Arguments {
  const uint8_t* packed;  // of the window's first value
  Scales scales;
  int log2_groups_per_scale;
  CodeValues codes;
  uint32_t first_group;  // of 64 values, in the weight
  uint32_t row_groups;   // from a row of the weight to the next
  int rows;              // of the window
  int num_groups;        // of a row of the window
  int64_t row_length;    // of the weight and of A
  const void* a;         // [rank, cols of the window]
  qlora_dtype a_dtype;
  bool are_eights_of_a_whole;  // 8 columns: aligned to 16 bytes
  const void* b;               // [rows of the window, rank]
  qlora_dtype b_dtype;
  bool is_b_copied;   // as it is, 16 bytes at a time
  int log2_b_pieces;  // then: as many of a row
  int rank;
  int padded_rank;
  float scaling;
  int log2_groups;  // of a block
  int row_tiles;
  int num_tiles;
  int right_bytes;   // of a row of B in shared memory
  int right_offset;  // of its ring, from the table
  uint32_t y_row_bytes;
};

// 16 ranks from `first` on of the left operand, 8 columns from `a` on a lane.
template <typename T, typename Value>
__device__ __forceinline__ void load_left_of(const Arguments& arguments, const Value* a, int first,
                                             uint32_t (&left)[kColSteps][4]) {
  uint4 eights[4];  // of ranks 2i, 2i+1, 2i+8, 2i+9
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int rank = first + static_cast<int>(threadIdx.x) % 4 * 2 + j % 2 + j / 2 * 8;
    eights[j] =
        load_eight<T>(a + rank * arguments.row_length, rank < arguments.rank ? 8 : 0, arguments.are_eights_of_a_whole);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4& even = eights[2 * half];
    const uint4& odd = eights[2 * half + 1];
    const uint32_t evens[4] = {even.x, even.y, even.z, even.w};
    const uint32_t odds[4] = {odd.x, odd.y, odd.z, odd.w};
#pragma unroll
    for (int step = 0; step < kColSteps; ++step) {
      left[step][2 * half] = __byte_perm(evens[step], odds[step], 0x5410);
      left[step][2 * half + 1] = __byte_perm(evens[step], odds[step], 0x7632);
    }
  }
}
template <typename T>
__device__ __forceinline__ void load_left(const Arguments& arguments, int64_t col, int first,
                                          uint32_t (&left)[kColSteps][4]) {
  dispatch_right(arguments.a_dtype, [&](auto* typed) {
    using Value = std::remove_pointer_t<decltype(typed)>;
    load_left_of<T>(arguments, static_cast<const Value*>(arguments.a) + col, first, left);
  });
}

// Rows of B to shared memory, a value at a time, fp32 as it is, else in T. Columns behind the rank are left.
template <typename T>
__device__ __forceinline__ void load_right_singly(const Arguments& arguments, int first_row, int num_rows,
                                                  uint32_t to) {
  dispatch_right(arguments.b_dtype, [&](auto* typed) {
    using Value = std::remove_pointer_t<decltype(typed)>;
#pragma unroll 1
    for (int i = threadIdx.x; i < num_rows * arguments.rank; i += kThreads) {
      const int row = i / arguments.rank;
      const int rank = i - row * arguments.rank;
      const int64_t from = int64_t{min(first_row + row, arguments.rows - 1)} * arguments.rank + rank;
      const float value = to_float(static_cast<const Value*>(arguments.b)[from]);
      if (arguments.b_dtype == QLORA_FLOAT32) {
        store_shared_float(to + row * arguments.right_bytes + rank * 4, value);
      } else {
        const T rounded = from_float<T>(value);
        store_shared_2_bytes(to + row * arguments.right_bytes + rank * 2, reinterpret_cast<const uint16_t&>(rounded));
      }
    }
  });
}

// The same, copied if it can be.
template <typename T>
__device__ __forceinline__ void load_right(const Arguments& arguments, int first_row, int num_rows, uint32_t to) {
  if (!arguments.is_b_copied) {
    load_right_singly<T>(arguments, first_row, num_rows, to);
    return;
  }
  const int log2_pieces = arguments.log2_b_pieces;
  const int piece = static_cast<int>(threadIdx.x) & ((1 << log2_pieces) - 1);
  const char* const from = static_cast<const char*>(arguments.b) + piece * 16;
#pragma unroll 1
  for (int row = static_cast<int>(threadIdx.x) >> log2_pieces; row < num_rows; row += kThreads >> log2_pieces) {
    const uint32_t at = min(first_row + row, arguments.rows - 1);
    copy_16_bytes_async(to + row * arguments.right_bytes + piece * 16, from + (uint64_t{at} << (log2_pieces + 4)));
  }
}

// Two ranks of a row there.
template <typename T, typename Value>
__device__ __forceinline__ uint32_t load_right_pair(uint32_t address) {
  if constexpr (!std::is_same_v<Value, float>) return load_shared_word(address);
  const float2 pair = load_shared_two_floats(address);
  const float values[2] = {pair.x, pair.y};
  return Word<T>::pack(values);
}

}  // namespace qlora::merged
