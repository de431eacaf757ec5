// y = x W^T + bias for 1 to 32 rows of x with what every GPU from sm_80 on has: mma.sync, cp.async and 96 KiB of shared
// memory. W is the 16-row operand and x the 8-column one, dealt as block_product.cuh says.
//
//   grid     a block a multiprocessor takes turns at work items: a tile of 32 rows of W and a part of k
//   warp     every 8th chunk of 128 columns: two tiles of 16 rows use each piece of x
//   x        from L1 or L2 to registers, a chunk ahead
//   W        through a ring of kStages chunks a warp in shared memory; a lane holds the scales of one row
//   decode   a packed byte to two values through CompactPairTable; the products of a block of 64 are summed in fp32
//            from zero and then multiplied with the block's scale
//   sums     warps: pairwise through shared memory; parts: in memory, by add_parts; both in a fixed order
//
// Rounding: as skinny_sm90. Where a block of 64 columns has one scale: block sizes of 64 and more, k a multiple of 64.
#include <algorithm>
#include <cstdint>

#include "core/status.h"
#include "cuda/device/block_product.cuh"
#include "cuda/device/copy_async.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/unaligned.cuh"
#include "cuda/dispatch.h"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/split.h"
#include "cuda/launch.h"
#include "cuda/remember.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 3;  // not swept
constexpr int kTileRows = 32;
constexpr int kBlockCols = 64;
constexpr int kChunkBlocks = 2;
constexpr int kChunkCols = kChunkBlocks * kBlockCols;
constexpr int kChunkBytes = kChunkCols / 2;  // of a row
constexpr int kPieces = kChunkBytes / 16;
constexpr int kMaxTokens = 32;
constexpr int kSumTokens = 16;  // whose sums the warps exchange at once

using StageWeight = unsigned char[kTileRows * kChunkBytes];  // the 16-byte piece p of row r at place p ^ r / 2 % 2 * 2

template <typename T>
struct Shared {
  alignas(128) unsigned char table[CompactPairTable<T>::kBytes];
  StageWeight ring[kWarps][kStages];
  float sums[kWarps / 2][kSumTokens * kTileRows];
};

struct Arguments {
  const uint8_t* packed;
  Scales scales;
  float table_scale_inverse;  // of CompactPairTable
  const void* x;
  const void* bias;
  void* y;
  float* parts;  // null: y is written
  int num_parts;
  int m;
  int n;
  int k;
  bool is_weight_aligned;  // to 16 bytes
  bool is_x_aligned;       // to 16 bytes
};

// The lane's columns of x in a chunk: of block b, 16, for token lane / 4 + 8 q; 0 behind the last token and column.
template <int kTokens>
struct Fragments {
  uint32_t words[kChunkBlocks][kTokens / 8][8];

  __device__ __forceinline__ void load(const Arguments& arguments, int chunk) {
    const int group = threadIdx.x % 32 / 4;
    const int i = threadIdx.x % 4;
#pragma unroll
    for (int b = 0; b < kChunkBlocks; ++b) {
      const int col = chunk * kChunkCols + b * kBlockCols + i * 16;
#pragma unroll
      for (int q = 0; q < kTokens / 8; ++q) {
        const int token = q * 8 + group;
        const bool is_there = token < arguments.m && col < arguments.k;
        const uint8_t* const source =
            static_cast<const uint8_t*>(arguments.x) + (int64_t{token} * arguments.k + col) * 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (is_there) {
            v = arguments.is_x_aligned ? __ldg(reinterpret_cast<const uint4*>(source) + half)
                                       : load_16_unaligned_bytes(source + half * 16);
          }
          uint32_t* const target = words[b][q] + half * 4;
          target[0] = v.x;
          target[1] = v.y;
          target[2] = v.z;
          target[3] = v.w;
        }
      }
    }
  }
};

// The scales of a chunk's blocks for the row of the tile that is the lane's number; rows behind the last repeat it.
template <bool kIsNested>
struct RowScales {
  float values[kChunkBlocks];
  uint32_t codes[kChunkBlocks];

  __device__ __forceinline__ void load(const Arguments& arguments, int tile, int chunk) {
    const int64_t row = min(tile * kTileRows + static_cast<int>(threadIdx.x % 32), arguments.n - 1);
#pragma unroll
    for (int b = 0; b < kChunkBlocks; ++b) {
      const int col = chunk * kChunkCols + b * kBlockCols;
      if (col >= arguments.k) continue;
      const int64_t block = (row * arguments.k + col) >> arguments.scales.log2_block_size;
      if constexpr (kIsNested) {
        codes[b] = __ldg(arguments.scales.codes + block);
        values[b] = __ldg(arguments.scales.nested_absmax + block / kNestedBlockSize);
      } else {
        values[b] = __ldg(arguments.scales.absmax + block);
      }
    }
  }

  __device__ __forceinline__ float decode(const Arguments& arguments, int b, float nested_offset) const {
    float scale = values[b];
    if constexpr (kIsNested) {
      scale = decode_scale(static_cast<uint8_t>(codes[b]), arguments.scales.nested_code, scale, nested_offset);
    }
    return scale * arguments.table_scale_inverse;
  }
};

// Copies a warp's chunk of a tile into a stage; every lane 4 pieces of 16 bytes.
__device__ __forceinline__ void copy_weight(const Arguments& arguments, int tile, int chunk, unsigned char* stage) {
  const int lane = threadIdx.x % 32;
  const int row_bytes = arguments.k / 2;
  const int byte = chunk * kChunkBytes + lane % kPieces * 16;
#pragma unroll
  for (int i = 0; i < kTileRows * kPieces / 32; ++i) {
    const int row = i * (32 / kPieces) + lane / kPieces;
    const int64_t source_row = min(tile * kTileRows + row, arguments.n - 1);
    const uint8_t* const source = arguments.packed + source_row * row_bytes + byte;
    unsigned char* const target = stage + row * kChunkBytes + (lane % kPieces ^ row / 2 % 2 * 2) * 16;
    if (byte >= row_bytes) continue;
    if (arguments.is_weight_aligned) {
      copy_16_bytes_async(target, source);
    } else {
      *reinterpret_cast<uint4*>(target) = load_16_unaligned_bytes(source);
    }
  }
}

// sums[tile of 16 rows][8 tokens] += a chunk of W times x.
template <typename T, int kTokens, bool kIsNested>
__device__ __forceinline__ void multiply_chunk(const Arguments& arguments, const unsigned char* stage,
                                               const CompactPairTable<T>& table, const RowScales<kIsNested>& scales,
                                               float nested_offset, const Fragments<kTokens>& x, int num_blocks,
                                               float (&sums)[2][kTokens / 8][4]) {
  const int lane = threadIdx.x % 32;
  const int group = lane / 4;
  const int i = lane % 4;
#pragma unroll
  for (int b = 0; b < kChunkBlocks; ++b) {
    if (b >= num_blocks) break;
    const float scale = scales.decode(arguments, b, nested_offset);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const int row = t * 16 + group;
      const unsigned char* const source =
          stage + row * kChunkBytes + ((b * 2 + i / 2) ^ row / 2 % 2 * 2) * 16 + i % 2 * 8;
      const uint2 low = *reinterpret_cast<const uint2*>(source);
      const uint2 high = *reinterpret_cast<const uint2*>(source + 8 * kChunkBytes);
      const float scale_low = __shfl_sync(0xFFFFFFFFu, scale, row);
      const float scale_high = __shfl_sync(0xFFFFFFFFu, scale, row + 8);
      add_block_product<T, kTokens>(low, high, scale_low, scale_high, table, x.words[b], sums[t]);
    }
  }
}

// Adds the sums of all warps to those of warp 0, pairwise, kSumTokens tokens at a time.
template <int kTokens>
__device__ __forceinline__ void add_warps(float (&sums)[2][kTokens / 8][4], float (*exchange)[kSumTokens * kTileRows]) {
  constexpr int kTiles = kTokens < kSumTokens ? kTokens / 8 : kSumTokens / 8;  // of 8 tokens, at a time
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int first = 0; first < kTokens / 8; first += kTiles) {
#pragma unroll
    for (int others = kWarps / 2; others > 0; others /= 2) {
      if (warp >= others && warp < 2 * others) {
#pragma unroll
        for (int i = 0; i < 2 * kTiles * 4; ++i) {
          exchange[warp - others][i * 32 + lane] = sums[i / (kTiles * 4)][first + i / 4 % kTiles][i % 4];
        }
      }
      __syncthreads();
      if (warp < others) {
#pragma unroll
        for (int i = 0; i < 2 * kTiles * 4; ++i) {
          sums[i / (kTiles * 4)][first + i / 4 % kTiles][i % 4] += exchange[warp][i * 32 + lane];
        }
      }
      __syncthreads();
    }
  }
}

template <typename T, int kTokens>
__device__ __forceinline__ void store(const Arguments& arguments, int tile, int part,
                                      const float (&sums)[2][kTokens / 8][4]) {
  const int group = threadIdx.x % 32 / 4;
  const int i = threadIdx.x % 4;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = tile * kTileRows + t * 16 + half * 8 + group;
      if (n >= arguments.n) continue;
      const bool has_bias = arguments.parts == nullptr && arguments.bias != nullptr;
      const float bias = has_bias ? to_float(static_cast<const T*>(arguments.bias)[n]) : 0.0f;
#pragma unroll
      for (int q = 0; q < kTokens / 8; ++q) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int token = q * 8 + 2 * i + j;
          if (token >= arguments.m) continue;
          const float sum = sums[t][q][half * 2 + j];
          if (arguments.parts != nullptr) {
            arguments.parts[(int64_t{part} * arguments.m + token) * arguments.n + n] = sum;
          } else {
            static_cast<T*>(arguments.y)[int64_t{token} * arguments.n + n] = from_float<T>(has_bias ? sum + bias : sum);
          }
        }
      }
    }
  }
}

template <typename T, int kTokens, bool kIsNested>
__global__ __launch_bounds__(kThreads, 1) void skinny_sm80_kernel(const __grid_constant__ Arguments arguments,
                                                                  const __grid_constant__ CodeValues values) {
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  Shared<T>& shared = *reinterpret_cast<Shared<T>*>(shared_bytes);
  const int warp = threadIdx.x / 32;
  const int num_chunks = (arguments.k + kChunkCols - 1) / kChunkCols;
  const int num_tiles = (arguments.n + kTileRows - 1) / kTileRows;
  CompactPairTable<T>::template fill<kThreads>(shared.table, values);
  const float nested_offset = kIsNested ? __ldg(arguments.scales.nested_offset) : 0.0f;
  __syncthreads();
  const CompactPairTable<T> table(shared.table);
  StageWeight* const ring = shared.ring[warp];

  for (int item = blockIdx.x; item < num_tiles * arguments.num_parts; item += gridDim.x) {
    const int tile = item % num_tiles;
    const int part = item / num_tiles;
    const int begin = static_cast<int>(int64_t{num_chunks} * part / arguments.num_parts) + warp;
    const int end = static_cast<int>(int64_t{num_chunks} * (part + 1) / arguments.num_parts);
    // Issues the copy of the chunk, if there is one; an empty commit counts too.
    const auto copy = [&](int chunk, int stage) {
      if (chunk < end) copy_weight(arguments, tile, chunk, ring[stage]);
      commit_copies();
    };
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) copy(begin + s * kWarps, s);
    Fragments<kTokens> x;
    RowScales<kIsNested> scales;
    if (begin < end) {
      x.load(arguments, begin);
      scales.load(arguments, tile, begin);
    }
    float sums[2][kTokens / 8][4] = {};
    int stage = 0;
    for (int chunk = begin; chunk < end; chunk += kWarps) {
      wait_for_copies<kStages - 2>();
      __syncwarp();  // The stage is there for all lanes, and the one before is read by all.
      copy(chunk + (kStages - 1) * kWarps, stage == 0 ? kStages - 1 : stage - 1);
      Fragments<kTokens> next_x;
      RowScales<kIsNested> next_scales;
      if (chunk + kWarps < end) {
        next_x.load(arguments, chunk + kWarps);
        next_scales.load(arguments, tile, chunk + kWarps);
      }
      const int num_blocks = min(kChunkBlocks, arguments.k / kBlockCols - chunk * kChunkBlocks);
      multiply_chunk<T, kTokens, kIsNested>(arguments, ring[stage], table, scales, nested_offset, x, num_blocks, sums);
      x = next_x;
      scales = next_scales;
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    wait_for_copies<0>();
    __syncwarp();
    add_warps<kTokens>(sums, shared.sums);
    if (warp == 0) store<T, kTokens>(arguments, tile, part, sums);
  }
}

int64_t num_tiles_of(const Gemm& problem) { return ceil_div(problem.weight.rows, kTileRows); }

int num_parts_of(const Gemm& problem, const Device& device) {
  return best_num_parts(num_tiles_of(problem), ceil_div(problem.weight.cols, kChunkCols * kWarps),
                        device.num_multiprocessors);
}

template <typename T, int kTokens, bool kIsNested>
void launch_skinny(const Arguments& arguments, Format format, const Device& device, cudaStream_t stream) {
  const auto kernel = skinny_sm80_kernel<T, kTokens, kIsNested>;
  constexpr int kSharedBytes = sizeof(Shared<T>);
  allow_shared_bytes(device, reinterpret_cast<const void*>(kernel), kSharedBytes);
  const int64_t num_items = ceil_div(arguments.n, kTileRows) * arguments.num_parts;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(num_items, device.num_multiprocessors)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments, PairTable<T>::values(format)), "skinny_sm80_kernel");
}

}  // namespace

bool supports_skinny_sm80(const Gemm& problem, const Device& device, std::string* why_not) {
  constexpr int64_t kMaxSize = int64_t{1} << 30;
  constexpr int64_t kSharedBytes = sizeof(Shared<__half>);
  const qlora_weight_4bit& weight = problem.weight;
  if (problem.direction != Direction::kForward) return refuse(why_not, "expected the forward product");
  if (device.major < 8) {
    return refuse(why_not, "expected compute capability 8.0 or newer, got ", device.major, ".", device.minor);
  }
  if (device.max_shared_bytes < kSharedBytes) {
    return refuse(why_not, "expected ", kSharedBytes, " bytes of shared memory, got ", device.max_shared_bytes);
  }
  if (problem.dtype == QLORA_FLOAT32) return refuse(why_not, "expected float16 or bfloat16");
  if (problem.m < 1 || problem.m > kMaxTokens) return refuse(why_not, "m: expected 1 to ", kMaxTokens);
  if (weight.block_size < kBlockCols) return refuse(why_not, "block_size: expected at least ", kBlockCols);
  if (weight.cols < 1 || weight.cols % kBlockCols != 0)
    return refuse(why_not, "k: expected a multiple of ", kBlockCols);
  if (weight.rows < 1 || weight.rows > kMaxSize || weight.cols > kMaxSize) {
    return refuse(why_not, "n, k: expected 1 to 2^30");
  }
  return true;
}

int64_t skinny_sm80_workspace_size(const Gemm& problem, const Device& device) {
  const int parts = num_parts_of(problem, device);
  return parts == 1 ? 0 : parts * problem.m * problem.weight.rows * static_cast<int64_t>(sizeof(float));
}

void skinny_sm80(const Gemm& problem, const Device& device, cudaStream_t stream) {
  const qlora_weight_4bit& weight = problem.weight;
  const Format format = weight.format == QLORA_NF4 ? Format::kNF4 : Format::kFP4;
  Arguments arguments = {};
  arguments.packed = static_cast<const uint8_t*>(weight.packed);
  arguments.scales = scales_of(weight);
  arguments.x = problem.input;
  arguments.bias = problem.bias;
  arguments.y = problem.output;
  arguments.num_parts = num_parts_of(problem, device);
  arguments.parts = arguments.num_parts == 1 ? nullptr : static_cast<float*>(problem.workspace);
  arguments.m = static_cast<int>(problem.m);
  arguments.n = static_cast<int>(weight.rows);
  arguments.k = static_cast<int>(weight.cols);
  arguments.is_weight_aligned = is_aligned(weight.packed, 16);
  arguments.is_x_aligned = is_aligned(problem.input, 16);
  dispatch_dtype(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      arguments.table_scale_inverse = 1.0f / PairTable<T>::scale(format);
      dispatch_bool(weight.absmax_codes != nullptr, [&](auto nested) {
        if (problem.m <= 8) {
          launch_skinny<T, 8, nested()>(arguments, format, device, stream);
        } else if (problem.m <= 16) {
          launch_skinny<T, 16, nested()>(arguments, format, device, stream);
        } else {
          launch_skinny<T, kMaxTokens, nested()>(arguments, format, device, stream);
        }
      });
    }
  });
  if (arguments.parts != nullptr) {
    add_parts(arguments.parts, arguments.num_parts, problem.m, weight.rows, problem.bias, problem.output, problem.dtype,
              device, stream);
  }
}

}  // namespace qlora
