// Tiles of 16-bit values in shared memory for ldmatrix, and how they are filled. A row is kChunks pieces of 16 bytes,
// which are dealt such that the same piece of 8 rows in a row lies in 8 different banks.
#pragma once

#include <cstdint>

#include "cuda/device/copy_async.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/lora/lora.h"

namespace qlora::lora {

inline constexpr int kChunkValues = 8;
inline constexpr int kChunkBytes = 16;

// Byte offset of piece `chunk` of row `row`; kChunks: a power of two of 2 and more.
template <int kChunks>
__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  constexpr int kRowsPerTurn = kChunks < 8 ? 8 / kChunks : 1;  // rows that fill 128 bytes
  constexpr int kMask = kChunks < 8 ? kChunks - 1 : 7;
  return (row * kChunks + (chunk ^ (row / kRowsPerTurn & kMask))) * kChunkBytes;
}
// The same for a row of any multiple of 8 pieces.
__device__ __forceinline__ int chunk_offset(int row, int chunk, int chunks_per_row) {
  return (row * chunks_per_row + (chunk ^ (row & 7))) * kChunkBytes;
}

// Fills kRows x kChunks with rows of `source`, row_length apart, from its first on; zeros behind the last of `rows` and
// behind the last of `cols` columns. is_aligned: source to 16 bytes, row_length and cols multiples of 8; the copies are
// then asynchronous (copy_async.cuh).
template <int kRows, int kChunks>
__device__ __forceinline__ void load_tile(uint32_t shared, const uint16_t* source, int64_t row_length, int64_t rows,
                                          int64_t cols, bool is_aligned, int thread, int num_threads) {
  for (int i = thread; i < kRows * kChunks; i += num_threads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const uint32_t to = shared + chunk_offset<kChunks>(row, chunk);
    const int64_t from = row * row_length + chunk * kChunkValues;
    if (is_aligned) {
      const bool is_inside = row < rows && chunk * kChunkValues < cols;
      copy_16_bytes_or_zeros_async(to, is_inside ? source + from : source, is_inside);
    } else {
      uint32_t words[4] = {};
#pragma unroll
      for (int v = 0; v < kChunkValues; ++v) {
        const bool is_inside = row < rows && chunk * kChunkValues + v < cols;
        if (is_inside) words[v / 2] |= static_cast<uint32_t>(source[from + v]) << v % 2 * 16;
      }
      store_shared_16_bytes(to, make_uint4(words[0], words[1], words[2], words[3]));
    }
  }
}

// Where column `col` of a row lies. With kLaneCols columns are dealt in groups of 4 kLaneCols, such that the sums that
// multiply_add leaves in a lane, pairs of 8 columns each, are of kLaneCols neighbouring columns; with 0 they are not.
template <int kLaneCols>
__device__ __forceinline__ int position_of(int col) {
  if constexpr (kLaneCols == 0) {
    return col;
  } else {
    constexpr int kGroup = 4 * kLaneCols;
    const int lane = col % kGroup / kLaneCols;
    const int pair = col % kLaneCols / 2;
    return col / kGroup * kGroup + pair * 8 + lane * 2 + col % 2;
  }
}

// Fills [num_ranks][kCols] with S[first_rank.., first_col..] rounded to T, columns at position_of<kLaneCols>; zeros
// behind `rank` and `cols`.
template <typename T, typename Value, int kCols, int kLaneCols>
__device__ __forceinline__ void load_narrow_of(uint32_t shared, const Narrow& narrow, int64_t first_rank, int num_ranks,
                                               int64_t rank, int64_t first_col, int64_t cols, int thread,
                                               int num_threads) {
  constexpr int kPairs = kCols / 2;
  const Value* const values = static_cast<const Value*>(narrow.values);
  // Neighbours in memory go to neighbouring threads.
  const bool is_rank_fast = narrow.rank_stride == 1;
#pragma unroll 8
  for (int i = thread; i < num_ranks * kPairs; i += num_threads) {
    const int j = is_rank_fast ? i % num_ranks : i / kPairs;
    const int col = (is_rank_fast ? i / num_ranks : i % kPairs) * 2;
    float pair[2] = {};
#pragma unroll
    for (int v = 0; v < 2; ++v) {
      if (first_rank + j < rank && first_col + col + v < cols) {
        pair[v] = to_float(values[(first_rank + j) * narrow.rank_stride + (first_col + col + v) * narrow.col_stride]);
      }
    }
    const int position = position_of<kLaneCols>(col);
    const uint32_t to = shared + chunk_offset<kCols / kChunkValues>(j, position / kChunkValues);
    store_shared_4_bytes(to + position % kChunkValues * 2, Word<T>::pack(pair));
  }
}

template <typename T, int kCols, int kLaneCols, typename... Arguments>
__device__ __forceinline__ void load_narrow(uint32_t shared, const Narrow& narrow, Arguments... arguments) {
  if (narrow.dtype == QLORA_FLOAT32) {
    load_narrow_of<T, float, kCols, kLaneCols>(shared, narrow, arguments...);
  } else if (narrow.dtype == QLORA_BFLOAT16) {
    load_narrow_of<T, __nv_bfloat16, kCols, kLaneCols>(shared, narrow, arguments...);
  } else {
    load_narrow_of<T, __half, kCols, kLaneCols>(shared, narrow, arguments...);
  }
}

}  // namespace qlora::lora
