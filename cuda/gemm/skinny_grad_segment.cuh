// The parts of skinny_grad_sm90.cu's kernel: what a block keeps, and how dy and the scales of a segment of rows of W
// become operands of the tensor cores.
//
// dy and the scales are brought to fp16 by powers of two, each token's and each block of columns' own, so that their
// largest values are about 2^7 and 2^6: products fit fp16, and what is too small for it is less than 2^-30 of the
// largest. A power is chosen for a segment and those before it, of the token's own values: neither its place among the
// rows of dy nor their number matters.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/device/barrier.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/scales.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/gemm/step_scales.cuh"

namespace qlora::skinny_grad {

constexpr int kWarps = 16;  // that multiply
constexpr int kConsumers = 32 * kWarps;
constexpr int kThreads = kConsumers + 32;
constexpr int kTileBlocks = 4;  // blocks of columns that share scales
constexpr int kTileCols = kTileBlocks * kBlockCols;
constexpr int kTileBytes = kTileCols / 2;  // of a row: a line of memory
constexpr int kDepth = 16;                 // rows of W that a product takes
constexpr int kStepDepths = 8;
constexpr int kStep = kStepDepths * kDepth;  // rows of W in a stage
constexpr int kRowGroups = kWarps / kTileBlocks;
constexpr int kGroupDepths = kStepDepths / kRowGroups;  // of a step, that a warp multiplies
constexpr int kMaxTokens = 16;
constexpr int kMaxStages = 7;

constexpr int kSegmentSteps = 16;

// Stages of the ring that shared memory holds.
template <int kTokens>
constexpr int kStages = kTokens == 8 ? 7 : 5;

template <int kTokens>
struct Shared {
  unsigned char table[PairTable<__half>::kBytes];
  unsigned char weight[kStages<kTokens>][kStep * kTileBytes];  // the 16-byte piece p of row r at place p ^ r % 8
  uint2 dy[kSegmentSteps * kStepDepths][kTokens / 8][32];      // see dy_place
  __half scales[kTileBlocks][kSegmentSteps * kStep];           // see scale_place
  float nested_code[256];
  uint32_t largest_scale[kWarps][kTileBlocks];
  uint16_t largest_dy[kWarps][8];
  int dy_power[2][kTokens];  // of this segment, or the next, and of the one before
  int scale_power[2][kTileBlocks];
  Barrier full[kMaxStages];
  Barrier empty[kMaxStages];  // see count_readers
  Barrier started;            // the first segment's dy and scales are there
};
template <int kTokens>
constexpr int kSharedBytes = static_cast<int>(sizeof(Shared<kTokens>));

struct Arguments {
  const uint8_t* packed;
  Scales scales;
  float table_scale_inverse;  // of PairTable
  const __nv_bfloat16* dy;
  __nv_bfloat16* dx;
  float* parts;     // [num_parts, m, cols]; null: dx is written
  bool is_cluster;  // the blocks of the parts of a tile
  int num_parts;
  int num_tiles;
  int m;
  int rows;  // of the weight
  int cols;
  bool is_weight_aligned;   // packed to 16 bytes
  bool is_dy_aligned;       // each row to 16 bytes
  bool are_scales_aligned;  // 4 of a row: 4 or 16 aligned bytes in one nested block
  bool is_dx_aligned;       // to 8 bytes
};

#if __CUDA_ARCH__ >= 900

// Of a stage, those that say so for themselves. Where the copies are the tensor memory accelerator's, a lane speaks for
// its warp; where they are plain, each thread for itself, as the race checker has it.
__device__ __forceinline__ int count_writers(const Arguments& arguments) {
  return arguments.is_weight_aligned ? 1 : 32;
}
__device__ __forceinline__ int count_readers(const Arguments& arguments) {
  return arguments.is_weight_aligned ? kWarps : kConsumers;
}

enum NamedBarrier { kAllThreads, kAllConsumers };

// A power of two as its biased exponent. One that brings values of this magnitude, the bits of a float, to 2^target and
// more, but below twice that; as large as can be inverted for 0 and next to it.
constexpr int kLargestPower = 253;
__device__ __forceinline__ int power_for(uint32_t magnitude, int target) {
  return min(254 + target - static_cast<int>(magnitude >> 23), kLargestPower);
}
__device__ __forceinline__ float power_value(int power) { return __uint_as_float(static_cast<uint32_t>(power) << 23); }

constexpr int kDyTarget = 7;
constexpr int kScaleTarget = 6;

// Where lane 4 g + i of a product finds rows 2i, 2i+1, 2i+8, 2i+9 of token g, among the 32 of depth `depth`: neither
// its reads nor the writes of 8 tokens of two depths meet in a bank.
__device__ __forceinline__ int dy_place(int depth, int group, int i) {
  return (i * 8 + (group ^ i / 2 * 4)) ^ depth % 2 * 8;
}
// Where the scale of row `row` of 16 lies: those of rows 2i, 2i+1, 2i+8 and 2i+9 are neighbours.
__device__ __forceinline__ int scale_place(int row) { return row % 8 / 2 * 4 + row / 8 * 2 + row % 2; }

// What a thread of the consumers brings to shared memory, segment after segment.
template <int kTokens, bool kIsNested>
class SegmentOperands {
 public:
  __device__ __forceinline__ SegmentOperands(const Arguments& arguments, Shared<kTokens>& shared, int first_col)
      : arguments_(arguments), shared_(shared), first_col_(first_col) {
    if constexpr (kIsNested) nested_offset_ = *arguments.scales.nested_offset;
  }

  // Of rows first_row.. below `end`, 0 behind them. By all consumers; may be used when it returns, and overwrites what
  // the segment before left when all have called it. `turn` is the segment's number modulo 2.
  template <bool kIsFirst>
  __device__ __forceinline__ void prepare(int first_row, int end, int turn) const {
    // All is asked for before any of it is waited for: dy of the first segment, beside which there are no sums yet, in
    // registers, of others unit by unit.
    constexpr bool kInRegisters = kIsFirst;
    float4 scales[kScaleRows];
    uint32_t codes[kScaleRows];
    uint32_t dy[kInRegisters ? kUnits : 1][8];
    const auto load_all_scales = [&] {
#pragma unroll
      for (int i = 0; i < kScaleRows; ++i) load_scales(first_row + row(i), end, scales[i], codes[i]);
    };
    if constexpr (kIsFirst) load_all_scales();
    if (!kInRegisters || !arguments_.is_dy_aligned) copy_dy(first_row, end);
    if constexpr (kInRegisters) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (arguments_.is_dy_aligned) {
          load_dy(u, first_row, end, dy[u]);
        } else {
          load_copied_dy(u, dy[u]);
        }
      }
    }
    if (kIsNested && kIsFirst && threadIdx.x < 256) {
      shared_.nested_code[threadIdx.x] = arguments_.scales.nested_code[threadIdx.x];
    }
    // f(unit, words) for each of the thread's.
    const auto for_each_unit = [&](auto&& f) {
      if constexpr (kInRegisters) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) f(u, dy[u]);
      } else {
#pragma unroll 1
        for (int u = 0; u < kUnits; ++u) {
          load_copied_dy(u, dy[0]);
          f(u, dy[0]);
        }
      }
    };
    find_largest_dy(for_each_unit);
    synchronize<kConsumers>(kAllConsumers);
    store_dy<kIsFirst>(for_each_unit, turn);
    if constexpr (!kIsFirst) load_all_scales();
#pragma unroll
    for (int i = 0; i < kScaleRows; ++i) scales[i] = decode(first_row + row(i), end, scales[i], codes[i]);
    find_largest_scale(scales);
    synchronize<kConsumers>(kAllConsumers);
    if (kIsFirst && threadIdx.x == 0) arrive(shared_.started);
    store_scales<kIsFirst>(scales, turn);
    synchronize<kConsumers>(kAllConsumers);
  }

 private:
  static constexpr int kTokenTiles = kTokens / 8;
  // Of 4 depths and 8 tokens a warp: all of a thread are of one token.
  static constexpr int kUnits = kSegmentSteps * kStepDepths / 4 * kTokenTiles / kWarps;
  static constexpr int kScaleRows = kSegmentSteps * kStep / kConsumers;
  static_assert(kWarps % kTokenTiles == 0);

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32; }
  static __device__ __forceinline__ int token_tile() { return warp() % kTokenTiles; }
  static __device__ __forceinline__ int depth(int unit) {
    return (unit * (kWarps / kTokenTiles) + warp() / kTokenTiles) * 4 + lane() / 8;
  }
  static __device__ __forceinline__ int row(int i) { return i * kConsumers + static_cast<int>(threadIdx.x); }

  static __device__ __forceinline__ int token() { return token_tile() * 8 + lane() % 8; }
  __device__ __forceinline__ uint2& dy_place_of(int unit, int i) const {
    return shared_.dy[depth(unit)][token_tile()][dy_place(depth(unit), lane() % 8, i)];
  }
  __device__ __forceinline__ const __nv_bfloat16* dy_row() const {
    return arguments_.dy + int64_t{token()} * arguments_.rows;
  }

  // Rows 2i, 2i+1 of 16 as word i.
  __device__ __forceinline__ void load_dy(int unit, int first_row, int end, uint32_t (&words)[8]) const {
    const int row = first_row + depth(unit) * kDepth;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (token() < arguments_.m && row + h * 8 < end) v = __ldg(reinterpret_cast<const uint4*>(dy_row() + row) + h);
      words[4 * h] = v.x;
      words[4 * h + 1] = v.y;
      words[4 * h + 2] = v.z;
      words[4 * h + 3] = v.w;
    }
  }
  // The same from any address.
  __device__ __forceinline__ void load_dy_plainly(int unit, int first_row, int end, uint32_t (&words)[8]) const {
    const int row = first_row + depth(unit) * kDepth;
#pragma unroll 1
    for (int i = 0; i < 16; ++i) {
      const bool is_there = token() < arguments_.m && row + i < end;
      const uint32_t bits = is_there ? __bfloat16_as_ushort(dy_row()[row + i]) : 0;
      // Values move towards the first; after 16 turns each is in its place.
#pragma unroll
      for (int j = 0; j < 7; ++j) words[j] = __byte_perm(words[j], words[j + 1], 0x5432);
      words[7] = words[7] >> 16 | bits << 16;
    }
  }

  // The thread's values to their places as they are, and from there.
  __device__ __forceinline__ void copy_dy(int first_row, int end) const {
    synchronize<kConsumers>(kAllConsumers);  // All have read what lies there.
#pragma unroll 1
    for (int u = 0; u < kUnits; ++u) {
      uint32_t words[8] = {};
      if (arguments_.is_dy_aligned) {
        load_dy(u, first_row, end, words);
      } else {
        load_dy_plainly(u, first_row, end, words);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) dy_place_of(u, i) = make_uint2(words[i], words[4 + i]);
    }
  }
  __device__ __forceinline__ void load_copied_dy(int unit, uint32_t (&words)[8]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint2 v = dy_place_of(unit, i);
      words[i] = v.x;
      words[4 + i] = v.y;
    }
  }

  // nested_absmax in x where there are codes.
  __device__ __forceinline__ void load_scales(int row, int end, float4& scales, uint32_t& codes) const {
    scales = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    codes = 0;
    if (row >= end) return;
    if (!arguments_.are_scales_aligned) {
      const ScaleReader<kIsNested> reader(arguments_.scales);
      const int64_t first = int64_t{row} * arguments_.cols + first_col_;
      const int num_blocks = (arguments_.cols - first_col_) / kBlockCols;  // 0 behind the last column
      scales.x = reader.load(first);
      if (num_blocks > 1) scales.y = reader.load(first + kBlockCols);
      if (num_blocks > 2) scales.z = reader.load(first + 2 * kBlockCols);
      if (num_blocks > 3) scales.w = reader.load(first + 3 * kBlockCols);
      return;
    }
    const int64_t block = int64_t{row} * (arguments_.cols / kBlockCols) + first_col_ / kBlockCols;
    if constexpr (kIsNested) {
      codes = __ldg(reinterpret_cast<const uint32_t*>(arguments_.scales.codes + block));
      scales.x = __ldg(arguments_.scales.nested_absmax + block / kNestedBlockSize);
    } else {
      scales = __ldg(reinterpret_cast<const float4*>(arguments_.scales.absmax + block));
    }
  }

  __device__ __forceinline__ float4 decode(int row, int end, const float4& scales, uint32_t codes) const {
    if (!kIsNested || !arguments_.are_scales_aligned || row >= end) return scales;
    const auto scale = [&](int b) {
      return __fadd_rn(__fmul_rn(shared_.nested_code[codes >> b * 8 & 0xFF], scales.x), nested_offset_);
    };
    return make_float4(scale(0), scale(1), scale(2), scale(3));
  }

  // Of each token that the warp has; the bits of a NaN are the largest.
  template <typename ForEachUnit>
  __device__ __forceinline__ void find_largest_dy(ForEachUnit&& for_each_unit) const {
    uint32_t two = 0;
    for_each_unit([&](int, const uint32_t (&words)[8]) {
#pragma unroll
      for (int i = 0; i < 8; ++i) two = __vmaxu2(two, words[i] & 0x7FFF7FFF);
    });
    uint32_t largest = max(two & 0xFFFF, two >> 16);
    largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 8));
    largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, 16));
    if (lane() < 8) shared_.largest_dy[warp()][lane()] = static_cast<uint16_t>(largest);
  }

  template <bool kIsFirst, typename ForEachUnit>
  __device__ __forceinline__ void store_dy(ForEachUnit&& for_each_unit, int turn) const {
    uint32_t largest = 0;
#pragma unroll
    for (int w = 0; w < kWarps / kTokenTiles; ++w) {
      largest = max(largest, uint32_t{shared_.largest_dy[w * kTokenTiles + token_tile()][lane() % 8]});
    }
    int power = power_for(largest << 16, kDyTarget);
    if constexpr (!kIsFirst) power = min(power, shared_.dy_power[turn ^ 1][token()]);
    if (warp() < kTokenTiles && lane() < 8) shared_.dy_power[turn][token()] = power;
    const float factor = power_value(power);
    const auto normalise = [&](uint32_t word) {
      float two[2];
      Word<__nv_bfloat16>::unpack(word, two);
      two[0] *= factor;
      two[1] *= factor;
      return Word<__half>::pack(two);
    };
    for_each_unit([&](int unit, const uint32_t (&words)[8]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dy_place_of(unit, i) = make_uint2(normalise(words[i]), normalise(words[4 + i]));
    });
  }

  static __device__ __forceinline__ uint32_t magnitude(float value) { return __float_as_uint(value) & 0x7FFFFFFF; }

  __device__ __forceinline__ void find_largest_scale(const float4 (&scales)[kScaleRows]) const {
    uint4 largest = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < kScaleRows; ++i) {
      largest.x = max(largest.x, magnitude(scales[i].x));
      largest.y = max(largest.y, magnitude(scales[i].y));
      largest.z = max(largest.z, magnitude(scales[i].z));
      largest.w = max(largest.w, magnitude(scales[i].w));
    }
    largest = max_of_warp(largest);
    if (lane() == 0) *reinterpret_cast<uint4*>(shared_.largest_scale[warp()]) = largest;
  }

  static __device__ __forceinline__ uint4 max_of_warp(const uint4& v) {
    return make_uint4(__reduce_max_sync(0xFFFFFFFFu, v.x), __reduce_max_sync(0xFFFFFFFFu, v.y),
                      __reduce_max_sync(0xFFFFFFFFu, v.z), __reduce_max_sync(0xFFFFFFFFu, v.w));
  }

  template <bool kIsFirst>
  __device__ __forceinline__ void store_scales(const float4 (&scales)[kScaleRows], int turn) const {
    const uint4 largest = max_of_warp(*reinterpret_cast<const uint4*>(shared_.largest_scale[lane() % kWarps]));
    const uint32_t magnitudes[kTileBlocks] = {largest.x, largest.y, largest.z, largest.w};
    float factors[kTileBlocks];
#pragma unroll
    for (int b = 0; b < kTileBlocks; ++b) {
      int power = power_for(magnitudes[b], kScaleTarget);
      if constexpr (!kIsFirst) power = min(power, shared_.scale_power[turn ^ 1][b]);
      if (threadIdx.x == 0) shared_.scale_power[turn][b] = power;
      factors[b] = power_value(power);
    }
#pragma unroll
    for (int i = 0; i < kScaleRows; ++i) {
      const int place = row(i) / kDepth * kDepth + scale_place(row(i) % kDepth);
      const float four[kTileBlocks] = {scales[i].x, scales[i].y, scales[i].z, scales[i].w};
#pragma unroll
      for (int b = 0; b < kTileBlocks; ++b) {
        shared_.scales[b][place] = __float2half_rn(four[b] * factors[b]);
      }
    }
  }

  const Arguments& arguments_;
  Shared<kTokens>& shared_;
  int first_col_;
  float nested_offset_ = 0.0f;
};

#endif

}  // namespace qlora::skinny_grad
