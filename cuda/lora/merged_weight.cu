// y = W + scaling B A over a window of W, 16 bits, rounded once: a weight with its adapter, for one product's length.
//
//   block     256 columns of the window and a range of rows that it walks 32 at a time; it keeps its columns of A in
//             shared memory as 16 bits, rounded once from the adapter's dtype
//   8 warps   16 rows by 64 columns each: A is laid out such that a lane's sums are 16 neighbouring columns of two
//             rows, whose codes it decodes; B comes from memory to the registers of the product
//
// It costs the multiplications of n k rank, whatever the rows of the input, and no reading or writing beside those of
// dequantising W, where the update of an output costs a reading and a writing of it. W + scaling B A is rounded where W
// would be.
#include <algorithm>
#include <cstdint>

#include "cuda/device/decode.cuh"
#include "cuda/device/matrix_load.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/numeric.cuh"
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
constexpr int kCols = 256;  // of a block
constexpr int kWarpCols = 64;
constexpr int kLaneCols = 16;
constexpr int kColGroups = kCols / kWarpCols;
constexpr int kRows = kThreads / 32 / kColGroups * 16;  // of a tile
constexpr int kMinBlocks = 3;                           // of a multiprocessor

struct Arguments {
  const uint8_t* packed;
  Scales scales;
  int64_t first;       // flat index of the window's first value in the weight
  int64_t row_length;  // of the weight
  int64_t rows;        // of the window
  int64_t cols;
  Narrow a;  // [rank, cols] of the window
  Narrow b;  // as S [rank, rows] of the window
  float scaling;
  int64_t rank;
  int padded_rank;
  int num_col_blocks;
  int64_t rows_per_block;
  int64_t leading_dimension;  // of y
};

// Rows of B as the left operand of multiply_add: those from `row` on that are there, 16 ranks from `first` on.
template <typename T, typename Value>
__device__ __forceinline__ void load_left_of(const Arguments& arguments, int64_t row, int first, uint32_t (&a)[4]) {
  const auto* const values = static_cast<const Value*>(arguments.b.values);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t at = min(row + lane / 4 + i % 2 * 8, arguments.rows - 1);
    const int rank = first + lane % 4 * 2 + i / 2 * 8;
    float pair[2] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (rank + j < arguments.rank) pair[j] = to_float(values[at * arguments.rank + rank + j]);
    }
    a[i] = Word<T>::pack(pair);
  }
}
template <typename T>
__device__ __forceinline__ void load_left(const Arguments& arguments, int64_t row, int first, uint32_t (&a)[4]) {
  if (arguments.b.dtype == QLORA_FLOAT32) {
    load_left_of<T, float>(arguments, row, first, a);
  } else if (arguments.b.dtype == QLORA_BFLOAT16) {
    load_left_of<T, __nv_bfloat16>(arguments, row, first, a);
  } else {
    load_left_of<T, __half>(arguments, row, first, a);
  }
}

template <typename T, Format F, bool kIsNested>
__global__ __launch_bounds__(kThreads,
                             kMinBlocks) void merged_weight_kernel(const __grid_constant__ Arguments arguments,
                                                                   T* __restrict__ y) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const uint32_t narrow = shared_address(shared_memory);
  const int64_t first_col = int64_t{static_cast<int>(blockIdx.x) % arguments.num_col_blocks} * kCols;
  const int64_t begin = static_cast<int>(blockIdx.x) / arguments.num_col_blocks * arguments.rows_per_block;
  const int64_t end = min(begin + arguments.rows_per_block, arguments.rows);
  load_narrow<T, kCols, kLaneCols>(narrow, arguments.a, int64_t{0}, arguments.padded_rank, arguments.rank, first_col,
                                   arguments.cols, static_cast<int>(threadIdx.x), kThreads);
  __syncthreads();

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int matrix = lane / 8;
  const int col_group = warp % kColGroups;
  const int64_t col = first_col + col_group * kWarpCols + lane % 4 * kLaneCols;
  if (first_col + col_group * kWarpCols >= arguments.cols) return;
  const float lane_value = lane_code_value<F>();
  const ScaleReader<kIsNested> scale_reader(arguments.scales);
  for (int64_t row = begin + warp / kColGroups * 16; row < end; row += kRows) {
    uint32_t words[2][2];
    float scales[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t at = min(row + lane / 4 + 8 * h, arguments.rows - 1);
      const int64_t index = arguments.first + at * arguments.row_length + col;
      const uint2 loaded = *reinterpret_cast<const uint2*>(arguments.packed + index / 2);
      words[h][0] = loaded.x;
      words[h][1] = loaded.y;
      scales[h] = scale_reader.load(index);
    }
    float sums[kWarpCols / 8][4] = {};
    for (int k = 0; k < arguments.padded_rank; k += 16) {
      uint32_t a[4];
      load_left<T>(arguments, row, k, a);
#pragma unroll
      for (int n = 0; n < kWarpCols / 16; ++n) {
        uint32_t b[4];
        const int chunk = col_group * (kWarpCols / kChunkValues) + 2 * n + matrix / 2;
        load_matrices_transposed(b, narrow + chunk_offset<kCols / kChunkValues>(k + matrix % 2 * 8 + lane % 8, chunk));
        multiply_add<T>(sums[2 * n], a, b[0], b[1]);
        multiply_add<T>(sums[2 * n + 1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t at = row + lane / 4 + 8 * h;
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        float values[8];
        decode<8>(words[h][w], lane_value, scales[h], values);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          values[i] = fmaf(arguments.scaling, sums[4 * w + i / 2][2 * h + i % 2], values[i]);
        }
        if (at < end) store_16_bytes(y + at * arguments.leading_dimension + col + 8 * w, values);
      }
    }
  }
}

int shared_bytes(int64_t rank) { return static_cast<int>(round_up(rank, 16)) * kCols * 2; }

template <typename T, Format F, bool kIsNested>
void launch_merged(Arguments arguments, T* y, int multiprocessors, const Device& device, cudaStream_t stream) {
  const auto kernel = merged_weight_kernel<T, F, kIsNested>;
  const int bytes = shared_bytes(arguments.rank);
  allow_shared_bytes(device, reinterpret_cast<const void*>(kernel), bytes);
  arguments.num_col_blocks = static_cast<int>(ceil_div(arguments.cols, kCols));
  const int64_t wanted =
      (multiprocessors > 0 ? multiprocessors : device.num_multiprocessors) * kMinBlocks / arguments.num_col_blocks;
  const int64_t row_blocks = std::clamp<int64_t>(wanted, 1, ceil_div(arguments.rows, kRows));
  arguments.rows_per_block = round_up(ceil_div(arguments.rows, row_blocks), kRows);
  const int64_t blocks = ceil_div(arguments.rows, arguments.rows_per_block) * arguments.num_col_blocks;
  launch_early("merged_weight_kernel", kernel, LaunchShape{static_cast<unsigned>(blocks), kThreads, bytes}, device,
               stream, arguments, y);
}

}  // namespace

bool supports_merged_weight(const qlora_weight_4bit& weight, int64_t rank, qlora_dtype dtype, const Device& device) {
  return is_narrow_fast(dtype, device) && weight.cols % kWarpCols == 0 && weight.block_size >= kWarpCols &&
         is_aligned(weight.packed, 8) && shared_bytes(rank) <= device.max_shared_bytes;
}

void merged_weight(const qlora_weight_4bit& weight, const qlora_lora& lora, const Window& window, void* y,
                   int64_t leading_dimension, qlora_dtype dtype, int multiprocessors, const Device& device,
                   cudaStream_t stream) {
  Arguments arguments = {};
  arguments.packed = weight.packed;
  arguments.scales = scales_of(weight);
  arguments.first = window.row_begin * weight.cols + window.col_begin;
  arguments.row_length = weight.cols;
  arguments.rows = window.row_end - window.row_begin;
  arguments.cols = window.col_end - window.col_begin;
  arguments.a = narrow_of({lora.a, lora.a_dtype, false}, lora.rank, weight.cols, window.col_begin);
  arguments.b = narrow_of({lora.b, lora.b_dtype, true}, lora.rank, weight.rows, window.row_begin);
  arguments.scaling = lora.scaling;
  arguments.rank = lora.rank;
  arguments.padded_rank = static_cast<int>(round_up(lora.rank, 16));
  arguments.leading_dimension = leading_dimension;
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      dispatch_format(weight.format, [&](auto format) {
        dispatch_bool(is_nested(weight), [&](auto nested) {
          launch_merged<T, decltype(format)::value, decltype(nested)::value>(arguments, static_cast<T*>(y),
                                                                             multiprocessors, device, stream);
        });
      });
    }
  });
}

}  // namespace qlora
