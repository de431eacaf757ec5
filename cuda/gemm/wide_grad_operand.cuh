// The weight as wide_grad_sm90.cu's tensor cores take it: transposed, scaled, and back to columns of the output.
//
// ldmatrix deals the packed bytes of 32 columns such that a lane holds bytes 2g and 2g + 1 of rows 2i and 2i + 1 of W
// (g = lane / 4, i = lane % 4): columns 4g..4g+3 of dx for two neighbouring values of n. Two warps have the 32 columns
// between them: warp e (0 or 1) of the pair takes byte 2g + e, columns 4g + 2e and 4g + 2e + 1, as rows g and g + 8 of
// its 16 of the operand.
#pragma once

#include <cstdint>

#include "cuda/device/copy_async.cuh"
#include "cuda/device/matrix_load.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/gemm/low_rank_operand.cuh"
#include "cuda/gemm/product.cuh"
#include "cuda/gemm/weight_operand.cuh"
#include "cuda/gemm/wide_work.cuh"

namespace qlora::wide {

inline constexpr int kTileBytes = kTile / 2;            // of a row of W
inline constexpr int kTileBlocks = kTile / kBlockCols;  // scales of a row
inline constexpr int kPairCols = 32;                    // of a pair of warps

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Where the scale of row `row` of a step lies in its column of scales [kStep]: a lane of the operand reads those of
// rows 2i, 2i + 1, 2i + 8 and 2i + 9 of each 16 at once.
__device__ __forceinline__ int scale_place(int row) {
  return row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2;
}

// The 2 scales of each of a thread's rows of a step, on their way: load asks for them, store waits.
template <bool kIsNested>
class GradScales {
 public:
  __device__ __forceinline__ void load(const Arguments& arguments, int first, int step) {
    if (!arguments.are_scales_aligned) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const uint32_t index = block(arguments, min(row(step, i), arguments.rows - 1), first);
      if constexpr (kIsNested) {
        codes_[i] = *reinterpret_cast<const uint16_t*>(arguments.scales.codes + index);
        values_[i].x = arguments.scales.nested_absmax[index / kNestedBlockSize];
      } else {
        values_[i] = *reinterpret_cast<const float2*>(arguments.scales.absmax + index);
      }
    }
  }

  // To scales [2][kStep], see scale_place; 0 for rows behind the last, whose bytes may decode to anything.
  __device__ __forceinline__ void store(const Arguments& arguments, int first, int step, const float* nested_code,
                                        float nested_offset, float* scales) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float2 two = values_[i];
      if (!arguments.are_scales_aligned) {
        two = load_plainly(arguments.scales, min(row(step, i), arguments.rows - 1), arguments.cols, first);
      } else if constexpr (kIsNested) {
        const auto scale = [&](int b) {
          return __fadd_rn(__fmul_rn(nested_code[codes_[i] >> b * 8 & 0xFF], values_[i].x), nested_offset);
        };
        two = make_float2(scale(0), scale(1));
      }
      const bool is_there = row(step, i) < arguments.rows;
      float* const place = scales + scale_place(threadIdx.x) + i * kScaleThreads;
      place[0] = is_there ? two.x * arguments.scale_factor : 0.0f;
      place[kStep] = is_there ? two.y * arguments.scale_factor : 0.0f;
    }
  }

 private:
  static constexpr int kRows = kStep / kScaleThreads;

  static __device__ __forceinline__ int row(int step, int i) { return step * kStep + threadIdx.x + i * kScaleThreads; }
  // Index of the row's first scale in the tile, of the last tile where a cluster has one too many. 2^32 scales would be
  // those of more weights than any memory holds.
  static __device__ __forceinline__ uint32_t block(const Arguments& arguments, int row, int first) {
    return static_cast<uint32_t>(row) * (arguments.cols / kBlockCols) + min(first, arguments.cols - kTile) / kBlockCols;
  }

  // 0 behind the last column.
  static __device__ __noinline__ float2 load_plainly(const Scales& all, int row, int cols, int first) {
    float scales[kTileBlocks] = {};
#pragma unroll
    for (int b = 0; b < kTileBlocks; ++b) {
      const int col = first + b * kBlockCols;
      if (col < cols) scales[b] = load_scale(all, int64_t{row} * cols + col);
    }
    return make_float2(scales[0], scales[1]);
  }

  uint32_t codes_[kRows] = {};
  float2 values_[kRows] = {};  // absmax; nested_absmax in x
};

// A warp's 16 rows of the operand, for blocks of 64 values of n.
template <typename T, typename Config, typename Table>
class GradOperand {
 public:
  __device__ __forceinline__ GradOperand(const Shared& shared, const unsigned char* table, int group)
      : table_(table),
        low_selector_(keep(table_selector(warp() % 2))),
        high_selector_(keep(table_selector(warp() % 2 + 2))),
        weight_(keep(shared_address(shared.weight[0].bytes) + (group * kInputDepth + lane()) * kTileBytes +
                     (half() * 2 + warp() / 2 ^ lane() / 2 % 4) * 16)),
        scales_(keep(shared_address(shared.weight[0].scales) +
                     (half() * kStep + group * kInputDepth + lane() % 4 * 4) * 4)) {}

  // Values times their scales in fp32, rounded to T.
  __device__ __forceinline__ void decode(uint32_t offset, int block, Fragments& a) const {
#pragma unroll
    for (int quarter = 0; quarter < 2; ++quarter) {
      uint32_t words[4];  // of 8 values of n each
      const int row = block * kInputDepth + quarter * 32;
      load_matrices_transposed(words, weight_ + offset + row * kTileBytes);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint4 four = load_shared_16_bytes(scales_ + offset + (row + j * 16) * 4);
        uint32_t (&fragment)[4] = a[quarter * 2 + j];
        scale(words[2 * j], __uint_as_float(four.x), __uint_as_float(four.y), fragment[0], fragment[1]);
        scale(words[2 * j + 1], __uint_as_float(four.z), __uint_as_float(four.w), fragment[2], fragment[3]);
      }
    }
  }

  // Of a stage that holds values of the low-rank term: see copy_grad_right.
  __device__ __forceinline__ void load_values(const Shared& shared, uint32_t offset, Fragments& a) const {
    const int row = lane() / 16 * 8 + lane() % 8;
    const int piece = (half() * 4 + warp()) * 2 + lane() / 8 % 2;
    const uint32_t source = shared_address(shared.weight[0].bytes) + offset + row * kTile * 2 + (piece ^ row % 8) * 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) load_matrices_transposed(a[j], source + j * 16 * kTile * 2);
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp() { return threadIdx.x % kWarpgroup / 32; }
  static __device__ __forceinline__ int half() { return (threadIdx.x / kWarpgroup - 1) % 2; }  // of the tile

  // A word of ldmatrix: two columns in the warp's byte of either half, and the two values of n side by side.
  __device__ __forceinline__ void scale(uint32_t word, float first_scale, float second_scale, uint32_t& even,
                                        uint32_t& odd) const {
    const float2 first = table_.floats(word, low_selector_);
    const float2 second = table_.floats(word, high_selector_);
    const float evens[2] = {first.x * first_scale, second.x * second_scale};
    const float odds[2] = {first.y * first_scale, second.y * second_scale};
    even = Word<T>::pack(evens);
    odd = Word<T>::pack(odds);
  }

  Table table_;
  uint32_t low_selector_;
  uint32_t high_selector_;
  uint32_t weight_;  // shared addresses in the first stage: of the lane's row and the pair's bytes
  uint32_t scales_;  // and of the scales of the lane's rows
};

// The low-rank term's right operand [rank, cols], 64 rows of it and the tile's columns, dealt to pieces of 16 bytes as
// the operand takes them: [64][4 pairs of warps][warp][parity][8], the piece p of row r at place p ^ r % 8. By
// kScaleThreads threads.
template <typename T>
__device__ __noinline__ void copy_grad_right(const Arguments& arguments, int first, int block, unsigned char* bytes) {
  constexpr int kEights = kTile / 8;
  const LowRank& term = arguments.low_rank;
  const int eight = static_cast<int>(threadIdx.x) % kEights;
  const int col = first + eight * 8;
  dispatch_right(term.right_dtype, [&](auto* typed) {
    using Value = std::remove_pointer_t<decltype(typed)>;
#pragma unroll 4
    for (int row = threadIdx.x / kEights; row < kInputDepth; row += kScaleThreads / kEights) {
      const int rank = block * kInputDepth + row;
      const bool is_there = rank < term.rank && col < arguments.cols;
      const auto* const source = static_cast<const Value*>(term.right) + int64_t{rank} * arguments.cols + col;
      const uint4 v = load_eight<T>(source, is_there ? 8 : 0, arguments.are_right_rows_whole);
      const uint32_t words[4] = {__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632),
                                 __byte_perm(v.y, v.w, 0x5410), __byte_perm(v.y, v.w, 0x7632)};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int piece = eight / 4 * 4 + i;
        *reinterpret_cast<uint32_t*>(bytes + row * kTile * 2 + (piece ^ row % 8) * 16 + eight % 4 * 4) = words[i];
      }
    }
  });
  fence_shared();
}

// By a pair of warps: the output of its 32 columns first.. for 16 tokens at a time. `shared` is 2 kStoreBytes of
// theirs.
template <typename T, int kCols>
__device__ __forceinline__ void store_grad(const float* sums, const ProductTarget& target, int first, int first_token,
                                           unsigned char* shared) {
  const int lane = threadIdx.x % 32;
  const int rank = threadIdx.x / 32 % 2;
  const int pair = threadIdx.x / 64 - kWarpgroup / 64;
  // [16 tokens][warp][parity][8], the 16-byte piece p of token t at place p ^ t / 2 % 4.
  const auto place = [&](int token, int piece) {
    return shared_address(shared) + token * 64 + (piece ^ token / 2 % 4) * 16;
  };
  const uint32_t to = place(lane / 16 * 8 + lane % 8, rank * 2 + lane / 8 % 2);
  const int from_token = threadIdx.x % 64 / 4;
  const int eight = threadIdx.x % 4;
  uint32_t from[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) from[i] = place(from_token, i) + eight * 4;
  const int col = first + eight * 8;
#pragma unroll
  for (int c = 0; c < kCols / kProductTokens; ++c) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = Word<T>::pack(sums + 8 * c + 2 * i);
    synchronize<64>(kFirstWarpPair + pair);
    store_transposed(to, words);
    synchronize<64>(kFirstWarpPair + pair);
    uint32_t pieces[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pieces[i] = load_shared_word(from[i]);
    const uint4 dealt =
        make_uint4(__byte_perm(pieces[0], pieces[1], 0x5410), __byte_perm(pieces[2], pieces[3], 0x5410),
                   __byte_perm(pieces[0], pieces[1], 0x7632), __byte_perm(pieces[2], pieces[3], 0x7632));
    const int token = first_token + c * kProductTokens + from_token;
    if (token >= target.m || col >= target.width) continue;
    T* const output = static_cast<T*>(target.output) + int64_t{token} * target.width + col;
    if (target.is_aligned) {
      *reinterpret_cast<uint4*>(output) = dealt;
    } else {
      const T* const values = reinterpret_cast<const T*>(&dealt);
#pragma unroll
      for (int i = 0; i < 8; ++i) output[i] = values[i];
    }
  }
}

// By a warp: the same as part `part`, whose columns add_parts takes dealt.
template <int kCols>
__device__ __forceinline__ void store_grad_part(const float* sums, const ProductTarget& target, int part, int first,
                                                int first_token) {
  const int lane = threadIdx.x % 32;
  if (first >= target.width) return;
  const int64_t col = first + threadIdx.x / 32 % 2 * kProductRows + lane / 4 * 2;
#pragma unroll
  for (int i = 0; i < kCols / 4; ++i) {
    const int token = first_token + i / 2 * 8 + lane % 4 * 2 + i % 2;
    if (token >= target.m) continue;
    const int low = i / 2 * 4 + i % 2;
    *reinterpret_cast<float2*>(target.parts + (int64_t{part} * target.m + token) * target.width + col) =
        make_float2(sums[low], sums[low + 2]);
  }
}

#endif

}  // namespace qlora::wide
