// packed[i] = nearest code of x[i] / absmax[block], absmax[b] = max |x| over block b.
//
// A warp owns a tile of whole blocks. A lane holds units of 8 consecutive values: it loads 16 bytes (two pieces for
// fp32), neighbouring lanes neighbouring units, and stores 4 bytes of codes: whole 128-byte lines both ways. absmax
// goes through shuffles among the 4 to 32 lanes of a block, and in registers where a block is longer than 256 values. x
// is read once. Codes come from device/encode.cuh, whose table is in shared memory.
//
//   tile (bf16, block 64):  unit 0: lane 0 [0..7] lane 1 [8..15] ... lane 31 [248..255]   4 blocks of 8 lanes
//                           unit 1: the next 256 values, ...
//
// The last partial tile and pointers that are not aligned go to quantize_plain_kernel, one warp a block.
#include <cstdint>

#include "cuda/device/encode.cuh"
#include "cuda/device/normalise.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/dispatch.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kUnit = 8;
constexpr int kUnitsAcross = 32 * kUnit;  // values of one unit of every lane
constexpr int kMinUnits = 4;              // loads in flight a lane; a guess until measured

// Units of a lane: a tile holds one block at least.
template <int kBlockSize>
constexpr int kNumUnits = kBlockSize / kUnitsAcross > kMinUnits ? kBlockSize / kUnitsAcross : kMinUnits;

// x [n] of T, 16-byte aligned; packed [n / 2], 4-byte aligned; n = num_tiles whole tiles.
template <typename T, Format F, int kBlockSize>
__global__ __launch_bounds__(kThreads) void quantize_kernel(const T* __restrict__ x, int64_t num_tiles,
                                                            uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  constexpr int kUnits = kNumUnits<kBlockSize>;
  constexpr int kLanesPerBlock = kBlockSize < kUnitsAcross ? kBlockSize / kUnit : 32;
  constexpr int kUnitsPerBlock = kBlockSize < kUnitsAcross ? 1 : kBlockSize / kUnitsAcross;
  constexpr int kPieces = kUnit / kValuesPer16Bytes<T>;
  static_assert(kUnits % kUnitsPerBlock == 0);

  __shared__ EncodeTable table;
  load_encode_table<F>(table);

  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t safe_tile = tile < num_tiles ? tile : num_tiles - 1;  // The last block's spare warps load in vain.
  const int64_t first = safe_tile * (kUnits * kUnitsAcross) + lane * kUnit;
  uint4 pieces[kUnits][kPieces];
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      pieces[unit][piece] = load_16_bytes_once(x + first + unit * kUnitsAcross + piece * kValuesPer16Bytes<T>);
    }
  }
  const auto unpack = [&](int unit, float (&values)[kUnit]) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      unpack_16_bytes<T>(pieces[unit][piece], values + piece * kValuesPer16Bytes<T>);
    }
  };

  uint32_t largest[kUnits / kUnitsPerBlock] = {};
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    uint32_t& block_largest = largest[unit / kUnitsPerBlock];
    float values[kUnit];
    unpack(unit, values);
#pragma unroll
    for (int i = 0; i < kUnit; ++i) block_largest = max(block_largest, magnitude_bits(values[i]));
  }
#pragma unroll
  for (int distance = kLanesPerBlock / 2; distance > 0; distance /= 2) {
    for (uint32_t& bits : largest) bits = max(bits, __shfl_xor_sync(0xFFFFFFFFu, bits, distance));
  }
  __syncthreads();
  if (tile >= num_tiles) return;

#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const uint32_t absmax_bits = largest[unit / kUnitsPerBlock];
    const bool is_regular = has_reciprocal(absmax_bits);
    const float inverse = is_regular ? reciprocal_approx_ftz(__uint_as_float(absmax_bits)) : 1.0f;
    const int64_t index = first + unit * kUnitsAcross;
    float q[kUnit];
    unpack(unit, q);
    if (!is_regular) {
      const IrregularScaling scaling(absmax_bits);
      for (float& value : q) value = scaling.normalise(value);
    }
    for (float& value : q) value = multiply_ftz(value, inverse);
    *reinterpret_cast<uint32_t*>(packed + index / 2) = encode_8<F>(q, table);
    if (unit % kUnitsPerBlock == 0 && lane % kLanesPerBlock == 0) {
      absmax[index / kBlockSize] = absmax_of_bits(absmax_bits);
    }
  }
}

// x [n] of T, blocks from `block_begin` to the end, of any alignment; the last one may be partial and n odd.
template <typename T, Format F>
__global__ __launch_bounds__(kThreads) void quantize_plain_kernel(const T* __restrict__ x, int64_t n,
                                                                  int64_t block_begin, int log2_block_size,
                                                                  uint8_t* __restrict__ packed,
                                                                  float* __restrict__ absmax) {
  __shared__ EncodeTable table;
  load_encode_table<F>(table);
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  const int64_t num_blocks = (n + (int64_t{1} << log2_block_size) - 1) >> log2_block_size;
  for (int64_t block = block_begin + static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; block < num_blocks;
       block += stride) {
    const int64_t begin = block << log2_block_size;
    const int64_t block_end = begin + (int64_t{1} << log2_block_size);
    const int64_t end = block_end < n ? block_end : n;
    uint32_t largest = 0;
    for (int64_t i = begin + lane; i < end; i += 32) largest = max(largest, magnitude_bits(to_float(x[i])));
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, distance));
    }
    for (int64_t i = begin + 2 * lane; i < end; i += 64) {
      const uint32_t even = append_code<F>(0, normalise(to_float(x[i]), largest), table);
      const uint32_t odd =
          i + 1 < end ? append_code<F>(0, normalise(to_float(x[i + 1]), largest), table) : kZeroCode<F>;
      packed[i / 2] = pack_codes(static_cast<uint8_t>(even), static_cast<uint8_t>(odd));
    }
    if (lane == 0) absmax[block] = absmax_of_bits(largest);
  }
}

}  // namespace

void quantize_4bit(const void* x, qlora_dtype dtype, int64_t n, int64_t block_size, qlora_format format,
                   uint8_t* packed, float* absmax, cudaStream_t stream) {
  if (n == 0) return;
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_format(format, [&](auto format_tag) {
      constexpr Format kFormat = decltype(format_tag)::value;
      const T* const values = static_cast<const T*>(x);
      int64_t done = 0;
      if (is_aligned(x, 16) && is_aligned(packed, 4)) {
        dispatch_block_size(block_size, [&](auto block_size_tag) {
          constexpr int kBlockSize = decltype(block_size_tag)::value;
          constexpr int64_t kTile = kNumUnits<kBlockSize> * kUnitsAcross;
          const int64_t num_tiles = n / kTile;
          done = num_tiles * kTile;
          if (num_tiles == 0) return;
          launch("quantize_kernel", quantize_kernel<T, kFormat, kBlockSize>, grid_size(num_tiles, kWarps), kThreads,
                 stream, values, num_tiles, packed, absmax);
        });
      }
      if (done == n) return;
      const int64_t block_begin = done / block_size;
      launch("quantize_plain_kernel", quantize_plain_kernel<T, kFormat>,
             grid_size(num_blocks(n, block_size) - block_begin, kWarps), kThreads, stream, values, n, block_begin,
             log2_of(block_size), packed, absmax);
    });
  });
}

}  // namespace qlora
