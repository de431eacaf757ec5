// The parts of skinny_sm90.cu's kernel: what a block keeps, the copies of W, its product with x.
#pragma once

#include <cstdint>

#include "core/format.h"
#include "cuda/device/block_product.cuh"
#include "cuda/device/copy_async.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/scales.cuh"
#include "cuda/device/unaligned.cuh"

namespace qlora::skinny {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 3;
constexpr int kTileRows = 16;    // of W: those of one mma
constexpr int kBlockSize = 64;   // columns that share a scale
constexpr int kChunkBlocks = 4;  // of a warp's piece: 128 bytes of a row, a line of memory
constexpr int kChunkCols = kChunkBlocks * kBlockSize;
constexpr int kChunkBytes = kChunkCols / 2;
constexpr int kMaxSplit = 8;  // blocks in a portable cluster
constexpr int kMaxTokens = 16;
constexpr int kMaxMembers = 3;              // of a group: query, key and value
constexpr int kPaddedRows = kTileRows + 4;  // floats between tokens of a partial sum: no bank conflicts
constexpr int kTilesPerExchange = 8;        // tiles whose sums a cluster exchanges at once

constexpr int64_t kTableAlignment = PairTable<__half>::kBytes;

// Of a stage: 16 rows of 4 blocks.
template <bool kIsNested>
struct StageScales {
  float absmax[kTileRows][kChunkBlocks];
};
template <>
struct StageScales<true> {
  unsigned char codes[kTileRows][kChunkBlocks];
  float nested_absmax[kTileRows];
};

// Shared memory: this, the pair table at the first multiple of 64 KiB, the ring of the weight behind it.
template <int kTokens, bool kIsNested, int kMembers>
struct Shared {
  float nested_code[kIsNested ? kMembers : 1][256];
  StageScales<kIsNested> scales[kWarps][kStages];
  float partial[2][kWarps][kTokens][kPaddedRows];         // sums of the warps, of this tile and of the one before
  float exchange[kTilesPerExchange][kTokens][kTileRows];  // sums of this block, for the cluster
  float nested_offset[kIsNested ? kMembers : 1];          // of a group
};
constexpr int64_t kReservedBytes = 1024;  // that CUDA puts before a block's shared memory
static_assert(sizeof(Shared<kMaxTokens, false, kMaxMembers>) + kReservedBytes <= kTableAlignment);
static_assert(sizeof(Shared<kMaxTokens, true, kMaxMembers>) + kReservedBytes <= kTableAlignment);

using StageWeight = unsigned char[kTileRows * kChunkBytes];  // 16-byte pieces, permuted in a row: see piece_offset
constexpr int kSharedBytes = 2 * kTableAlignment + kWarps * kStages * static_cast<int>(sizeof(StageWeight));

// A weight of the group.
struct Member {
  const uint8_t* packed;
  Scales scales;
  const void* bias;
  void* y;
  int n;
  int first_tile;
  int num_whole_tiles;  // that are copied asynchronously: none unless packed is aligned to 16 bytes and scales to 4
};

template <int kMembers>
struct Arguments {
  Member members[kMembers];   // those that a group lacks have no tiles
  float table_scale_inverse;  // of PairTable
  int log2_split;
  const void* x;
  int m;
  int k;
  int num_tiles;
  bool is_x_aligned;  // to 16 bytes

  // Of a tile, as they are numbered through the group.
  __device__ __forceinline__ int member_of(int tile) const {
    int member = 0;
#pragma unroll
    for (int i = 1; i < kMembers; ++i) member += tile >= members[i].first_tile;
    return member;
  }
  __device__ __forceinline__ int first_row(int member, int tile) const {
    return (kMembers == 1 ? tile : tile - members[member].first_tile) * kTileRows;
  }
};

// Where the 16-byte piece of a row lies in its 128 bytes of a stage: pairs of pieces (a block of 64) are exchanged by
// row, so that the 8-byte reads of 4 rows, one block each, fall into different banks.
[[maybe_unused]] __device__ __forceinline__ int piece_offset(int row, int piece) {
  return (piece / 2 ^ row % 4) * 32 + piece % 2 * 16;
}

// The pieces of W that a warp works on, one a step, copied in their order: kChunks of a tile, then those of the next.
template <int kChunks, bool kIsNested, int kMembers>
class Fetcher {
 public:
  // The warp's chunks are first_chunk, first_chunk + kWarps.. below chunk_end, of every tile_step-th tile from `tile`
  // on.
  __device__ __forceinline__ Fetcher(const Arguments<kMembers>& arguments, int tile, int tile_step, int first_chunk,
                                     int chunk_end)
      : arguments_(arguments), tile_(tile), tile_step_(tile_step), first_chunk_(first_chunk), chunk_end_(chunk_end) {
    seek();
  }

  // Issues the copies of the next step, if there is one; `chunk` is its place among the warp's chunks.
  __device__ __forceinline__ void next(int chunk, unsigned char* weight, StageScales<kIsNested>& scales) {
    if (tile_ < arguments_.num_tiles && first_chunk_ + chunk * kWarps < chunk_end_) {
      if (tile_ < whole_tile_end_) {
        copy(chunk, weight, scales);
      } else {
        copy_plainly(member(), arguments_.k, arguments_.first_row(member_, tile_), first_chunk_ + chunk * kWarps,
                     weight, scales);
      }
    }
    commit_copies();  // An empty commit too: the wait counts them.
    if (chunk == kChunks - 1) {
      tile_ += tile_step_;
      if constexpr (kMembers == 1) {
        weight_ += int64_t{tile_step_} * (kTileRows / 2) * arguments_.k;
        scale_ += int64_t{tile_step_} * kTileRows * num_blocks();
      } else {
        seek();
      }
    }
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ int num_blocks() const { return arguments_.k / kBlockSize; }
  __device__ __forceinline__ const Member& member() const { return arguments_.members[member_]; }

  // To the first chunk of tile_.
  __device__ __forceinline__ void seek() {
    member_ = arguments_.member_of(tile_);
    whole_tile_end_ = (kMembers == 1 ? 0 : member().first_tile) + member().num_whole_tiles;
    const int row = arguments_.first_row(member_, tile_);
    weight_ =
        member().packed + int64_t{row + lane() / 8} * (arguments_.k / 2) + first_chunk_ * kChunkBytes + lane() % 8 * 16;
    scale_ = int64_t{row + lane() % kTileRows} * num_blocks() + first_chunk_ * kChunkBlocks;
  }

  __device__ __forceinline__ void copy(int chunk, unsigned char* weight, StageScales<kIsNested>& scales) const {
    const uint8_t* const source = weight_ + chunk * kWarps * kChunkBytes;
#pragma unroll
    for (int i = 0; i < kTileRows / 4; ++i) {  // Rows lane / 8 + 4 i: all have the same remainder of 4.
      copy_16_bytes_async(
          weight + i * 4 * kChunkBytes + lane() / 8 * kChunkBytes + piece_offset(lane() / 8, lane() % 8),
          source + int64_t{i} * 2 * arguments_.k);
    }
    const int row = lane() % kTileRows;
    const int64_t scale = scale_ + chunk * kWarps * kChunkBlocks;
    if constexpr (kIsNested) {
      const void* const codes = member().scales.codes + scale;
      const void* const nested = member().scales.nested_absmax + scale / kNestedBlockSize;
      const bool is_codes = lane() < kTileRows;
      copy_4_bytes_async(is_codes ? static_cast<void*>(scales.codes[row]) : &scales.nested_absmax[row],
                         is_codes ? codes : nested);
    } else {
      const int first = lane() / kTileRows * 2;
      copy_4_bytes_async(&scales.absmax[row][first], member().scales.absmax + scale + first);
      copy_4_bytes_async(&scales.absmax[row][first + 1], member().scales.absmax + scale + first + 1);
    }
  }

  // The same for rows behind the last, which repeat it, and for addresses that no asynchronous copy takes.
  static __device__ __noinline__ void copy_plainly(const Member& member, int k, int first_row, int chunk,
                                                   unsigned char* weight, StageScales<kIsNested>& scales) {
    for (int i = 0; i < kTileRows / 4; ++i) {
      const int row = i * 4 + lane() / 8;
      const int64_t source_row = min(first_row + row, member.n - 1);
      *reinterpret_cast<uint4*>(weight + row * kChunkBytes + piece_offset(row, lane() % 8)) =
          load_16_unaligned_bytes(member.packed + source_row * (k / 2) + chunk * kChunkBytes + lane() % 8 * 16);
    }
    if (lane() >= kTileRows) return;
    const int64_t source_row = min(first_row + lane(), member.n - 1);
    const int64_t scale = source_row * (k / kBlockSize) + chunk * kChunkBlocks;
    for (int i = 0; i < kChunkBlocks; ++i) {
      if constexpr (kIsNested) {
        scales.codes[lane()][i] = member.scales.codes[scale + i];
      } else {
        scales.absmax[lane()][i] = member.scales.absmax[scale + i];
      }
    }
    if constexpr (kIsNested) {
      scales.nested_absmax[lane()] = member.scales.nested_absmax[scale / kNestedBlockSize];
    }
  }

  const Arguments<kMembers>& arguments_;
  int tile_;
  int tile_step_;
  int first_chunk_;
  int chunk_end_;
  int member_;             // whose tile it is
  int whole_tile_end_;     // of its tiles; behind it, copy_plainly
  const uint8_t* weight_;  // this lane's piece of the tile's first rows and the first chunk
  int64_t scale_;          // index of this lane's row's first scale there
};

// The columns of x that this lane multiplies: of block b, its 16, for token group + 8 q; 0 behind the last token.
template <int kTokens>
struct Fragments {
  uint32_t words[kChunkBlocks][kTokens / 8][8];
};

template <int kTokens, int kMembers>
__device__ __forceinline__ void load_x(const Arguments<kMembers>& arguments, int block, Fragments<kTokens>& x) {
  const int group = threadIdx.x % 32 / 4;
  const int i = threadIdx.x % 4;
#pragma unroll
  for (int q = 0; q < kTokens / 8; ++q) {
    const int token = q * 8 + group;
    const uint8_t* const row = static_cast<const uint8_t*>(arguments.x) + int64_t{token} * arguments.k * 2;
#pragma unroll
    for (int b = 0; b < kChunkBlocks; ++b) {
      const uint8_t* const source = row + ((block + b) * kBlockSize + i * 16) * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint4 v = make_uint4(0, 0, 0, 0);
        if (token < arguments.m) {
          v = arguments.is_x_aligned ? *reinterpret_cast<const uint4*>(source + half * 16)
                                     : load_16_unaligned_bytes(source + half * 16);
        }
        uint32_t* const words = x.words[b][q] + half * 4;
        words[0] = v.x;
        words[1] = v.y;
        words[2] = v.z;
        words[3] = v.w;
      }
    }
  }
}

// sums += a stage's 16 x 256 piece of W times x.
template <typename T, int kTokens, bool kIsNested>
__device__ __forceinline__ void multiply_stage(const unsigned char* weight, const StageScales<kIsNested>& stage,
                                               const PairTable<T>& table, const float* nested_code, float nested_offset,
                                               float table_scale_inverse, const Fragments<kTokens>& x,
                                               float (&sums)[kTokens / 8][4]) {
  const int lane = threadIdx.x % 32;
  const int group = lane / 4;
  const int i = lane % 4;
  // Lane i of a quad decodes the scales of block i, for its two rows; the others get them by shuffles.
  float scales[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = group + 8 * h;
    float scale;
    if constexpr (kIsNested) {
      scale = __fadd_rn(__fmul_rn(nested_code[stage.codes[row][i]], stage.nested_absmax[row]), nested_offset);
    } else {
      scale = stage.absmax[row][i];
    }
    scales[h] = scale * table_scale_inverse;
  }
#pragma unroll
  for (int b = 0; b < kChunkBlocks; ++b) {
    const unsigned char* const source = weight + group * kChunkBytes + (b ^ group % 4) * 32 + i * 8;
    const uint2 low = *reinterpret_cast<const uint2*>(source);
    const uint2 high = *reinterpret_cast<const uint2*>(source + 8 * kChunkBytes);
    const float scale_low = __shfl_sync(0xFFFFFFFFu, scales[0], b, 4);
    const float scale_high = __shfl_sync(0xFFFFFFFFu, scales[1], b, 4);
    add_block_product<T, kTokens>(low, high, scale_low, scale_high, table, x.words[b], sums);
  }
}

}  // namespace qlora::skinny
