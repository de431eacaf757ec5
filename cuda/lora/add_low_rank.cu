// output [m, cols] (+)= left [m, rank] S [rank, cols], 16 bits: the update of an adapter, after a kernel that does not
// add it to its own sums, or on its own.
//
//   block     owns kCols columns and walks a range of rows, a tile at a time; it keeps its columns of S in shared
//             memory as 16 bits, rounded once from the adapter's dtype
//   8 warps   32 columns each: S is laid out such that a lane's sums are 8 neighbouring columns, which are read and
//             written as 16 bytes
//   copies    the next rows of left on their way (cp.async) while a tile is multiplied
//
// One reading and one writing of output, which is all that it takes: up to 64 ranks 256 columns, above 64 columns, so
// that S fits.
#include <algorithm>
#include <cstdint>

#include "core/status.h"
#include "cuda/device/matrix_load.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/lora/lora.h"
#include "cuda/lora/tile.cuh"
#include "cuda/remember.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

using namespace lora;

constexpr int kThreads = 256;
constexpr int kStages = 2;
constexpr int kWarpCols = 32;
constexpr int kLaneCols = 8;
constexpr int kBlocksPerMultiprocessor = 2;

template <int kCols>
constexpr int kMaxRanks = kCols == 256 ? 64 : 256;
template <int kCols>
constexpr int kTileRows = kCols == 256 ? 32 : 64;

struct Arguments {
  const uint16_t* left;
  int64_t left_stride;
  int64_t m;
  int64_t cols;        // that are added to
  int64_t row_length;  // of output
  int64_t rank;
  int padded_rank;
  int num_col_blocks;
  int64_t rows_per_block;
  Narrow narrow;
  void* output;
  bool is_aligned;  // output to 16 bytes, cols and row_length multiples of 8
};

// S, then the stages of left.
template <int kCols>
constexpr int kSharedBytes = 2 * kMaxRanks<kCols> * (kCols + kStages * kTileRows<kCols>);

// 8 values of a row from column col on, of which `count` are there.
template <typename T>
__device__ __forceinline__ uint4 load_values(const T* source, int64_t count, bool is_aligned) {
  if (is_aligned) return *reinterpret_cast<const uint4*>(source);
  T values[8] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) values[i] = source[i];
  }
  return *reinterpret_cast<const uint4*>(values);
}

template <typename T>
__device__ __forceinline__ void store_values(T* target, const float (&values)[8], int64_t count, bool is_aligned) {
  if (is_aligned) return store_16_bytes(target, values);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i < count) target[i] = from_float<T>(values[i]);
  }
}

template <typename T, int kCols, bool kIsAdded>
__global__ __launch_bounds__(kThreads, kBlocksPerMultiprocessor) void add_low_rank_kernel(
    const __grid_constant__ Arguments arguments) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
  extern __shared__ __align__(128) unsigned char shared_memory[];
  constexpr int kRows = kTileRows<kCols>;
  constexpr int kColGroups = kCols / kWarpCols;
  constexpr int kRowGroups = kThreads / 32 / kColGroups;  // of warps
  constexpr int kWarpTiles = kRows / 16 / kRowGroups;     // of 16 rows, of a warp
  const uint32_t narrow = shared_address(shared_memory);
  const uint32_t lefts = narrow + kMaxRanks<kCols> * kCols * 2;
  const int chunks_per_row = static_cast<int>(arguments.left_stride) / kChunkValues;
  const int used_chunks = arguments.padded_rank / kChunkValues;
  const int left_bytes = kRows * static_cast<int>(arguments.left_stride) * 2;

  const int64_t first_col = int64_t{static_cast<int>(blockIdx.x) % arguments.num_col_blocks} * kCols;
  const int64_t begin = static_cast<int>(blockIdx.x) / arguments.num_col_blocks * arguments.rows_per_block;
  const int64_t end = min(begin + arguments.rows_per_block, arguments.m);
  const int num_tiles = static_cast<int>((end - begin + kRows - 1) / kRows);
  const auto load = [&](int index) {
    if (index < num_tiles) {
      const int64_t first = begin + int64_t{index} * kRows;
      const uint32_t stage = lefts + index % kStages * left_bytes;
      for (int i = threadIdx.x; i < kRows * used_chunks; i += kThreads) {
        const int row = i / used_chunks;
        const int chunk = i % used_chunks;
        const bool is_inside = first + row < end;
        const uint16_t* const source =
            arguments.left + (is_inside ? first + row : first) * arguments.left_stride + chunk * kChunkValues;
        copy_16_bytes_or_zeros_async(stage + chunk_offset(row, chunk, chunks_per_row), source, is_inside);
      }
    }
    commit_copies();
  };
  load(0);
  load_narrow<T, kCols, kLaneCols>(narrow, arguments.narrow, int64_t{0}, arguments.padded_rank, arguments.rank,
                                   first_col, arguments.cols, static_cast<int>(threadIdx.x), kThreads);

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int matrix = lane / 8;
  const int row = lane % 8;
  const int col_group = warp % kColGroups;
  const int first_tile = warp / kColGroups * kWarpTiles;
  const int64_t col = first_col + col_group * kWarpCols + lane % 4 * 8;
  const int64_t count = arguments.cols - col;
  T* const output = static_cast<T*>(arguments.output) + col;
  for (int index = 0; index < num_tiles; ++index) {
    wait_for_copies<0>();
    __syncthreads();  // The tile's copies are there, and the other stage has been read.
    load(index + 1);
    const uint32_t left = lefts + index % kStages * left_bytes;
    const int64_t first_row = begin + int64_t{index} * kRows + first_tile * 16 + lane / 4;
    uint4 former[kWarpTiles][2] = {};
    if constexpr (kIsAdded) {
#pragma unroll
      for (int t = 0; t < kWarpTiles; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t at = first_row + t * 16 + h * 8;
          if (at < end && count > 0) {
            former[t][h] = load_values(output + at * arguments.row_length, count, arguments.is_aligned);
          }
        }
      }
    }
    float sums[kWarpTiles][4][4] = {};
    for (int k = 0; k < arguments.padded_rank / 16; ++k) {
      uint32_t b[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int chunk = col_group * (kWarpCols / kChunkValues) + 2 * n + matrix / 2;
        load_matrices_transposed(b[n],
                                 narrow + chunk_offset<kCols / kChunkValues>(k * 16 + matrix % 2 * 8 + row, chunk));
      }
#pragma unroll
      for (int t = 0; t < kWarpTiles; ++t) {
        uint32_t a[4];
        load_matrices(
            a, left + chunk_offset((first_tile + t) * 16 + matrix % 2 * 8 + row, 2 * k + matrix / 2, chunks_per_row));
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          multiply_add<T>(sums[t][2 * n], a, b[n][0], b[n][1]);
          multiply_add<T>(sums[t][2 * n + 1], a, b[n][2], b[n][3]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kWarpTiles; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t at = first_row + t * 16 + h * 8;
        if (at >= end || count <= 0) continue;
        float values[8] = {};
        if constexpr (kIsAdded) unpack_16_bytes<T>(former[t][h], values);
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] += sums[t][i / 2][2 * h + i % 2];
        store_values(output + at * arguments.row_length, values, count, arguments.is_aligned);
      }
    }
  }
}

template <typename T, int kCols, bool kIsAdded>
void launch_add(Arguments arguments, const Device& device, cudaStream_t stream) {
  const auto kernel = add_low_rank_kernel<T, kCols, kIsAdded>;
  allow_shared_bytes(device, reinterpret_cast<const void*>(kernel), kSharedBytes<kCols>);
  arguments.num_col_blocks = static_cast<int>(ceil_div(arguments.cols, kCols));
  const int64_t wanted = device.num_multiprocessors * kBlocksPerMultiprocessor / arguments.num_col_blocks;
  const int64_t row_blocks = std::clamp<int64_t>(wanted, 1, ceil_div(arguments.m, kTileRows<kCols>));
  arguments.rows_per_block = round_up(ceil_div(arguments.m, row_blocks), kTileRows<kCols>);
  const int64_t blocks = ceil_div(arguments.m, arguments.rows_per_block) * arguments.num_col_blocks;
  launch_early("add_low_rank_kernel", kernel, LaunchShape{static_cast<unsigned>(blocks), kThreads, kSharedBytes<kCols>},
               device, stream, arguments);
}

}  // namespace

void add_low_rank(const LowRankSum& sum, const Device& device, cudaStream_t stream) {
  Arguments arguments = {};
  arguments.left = static_cast<const uint16_t*>(sum.left);
  arguments.left_stride = left_columns(sum.rank);
  arguments.m = sum.m;
  arguments.cols = sum.end - sum.begin;
  arguments.row_length = sum.cols;
  arguments.rank = sum.rank;
  arguments.padded_rank = static_cast<int>(round_up(sum.rank, 16));
  arguments.narrow = narrow_of(sum.matrix, sum.rank, sum.cols, sum.begin);
  arguments.output = static_cast<char*>(sum.output) + sum.begin * size_of(sum.dtype);
  arguments.is_aligned = sum.cols % 8 == 0 && arguments.cols % 8 == 0 && is_aligned(arguments.output, 16);
  dispatch_dtype(sum.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      dispatch_bool(sum.is_added, [&](auto added) {
        constexpr bool kIsAdded = decltype(added)::value;
        if (sum.rank <= kMaxRanks<256>) {
          launch_add<T, 256, kIsAdded>(arguments, device, stream);
        } else {
          launch_add<T, 64, kIsAdded>(arguments, device, stream);
        }
      });
    }
  });
}

}  // namespace qlora
