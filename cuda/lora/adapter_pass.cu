// projection [m, rank] = x S^T and gradient [rank, cols] = left^T x, of one reading of x [m, cols], 16 bits.
//
//   block      owns 256 columns of x, up to 64 ranks (kRanks), and a range of rows that it walks 64 at a time; it keeps
//              its columns of S in shared memory as 16 bits, rounded once from the adapter's dtype
//   4 warps    projection: 16 rows each; the sums over the block's columns are a part of these rows' projection
//   4 warps    gradient: 64 columns each; the sums over the block's rows stay in registers to the end
//   copies     cp.async, the next tiles of x and left on their way while one is multiplied
//
// Neither sum is whole within a block, so each goes to workspace in fp32 and a second kernel adds up the parts in their
// order: ceil(cols / 256) parts of the projection, one a range of rows of the gradient. For dy [4096, 14336] and rank
// 16 that is 56 x 0.26 MB and 4 x 0.92 MB, written and read in L2 for the most part, beside 117 MB of dy, which two
// kernels would read twice. Where more than 64 ranks are asked for, blocks of the same tile run side by side, so that
// all but one find it in L2.
//
// Bounds: kMaxPartBytes for each of the projection's 4 R ceil(cols / 256) rows bytes and the gradient's 4 R cols blocks
// of rows, where R is the rank rounded up to a multiple of 16. More rows than fit are taken in windows, one after the
// other, whose gradients are added to the parts there are; a gradient that does not fit is taken in windows of columns,
// and then apart from the projection. Any shape and address, x unaligned at the cost of copies value by value.
#include <algorithm>
#include <cstdint>

#include "core/status.h"
#include "cuda/device/matrix_load.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/lora/finish_parts.h"
#include "cuda/lora/lora.h"
#include "cuda/lora/tile.cuh"
#include "cuda/remember.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

using namespace lora;

constexpr int kRows = 64;   // of a tile
constexpr int kCols = 256;  // of a block
constexpr int kWarps = 4;   // of each of the two products
constexpr int kWarpCols = kCols / kWarps;
constexpr int kWarpRows = kRows / kWarps;
constexpr int kMaxStages = 3;
constexpr int kChunks = kCols / kChunkValues;
constexpr int kTileBytes = kRows * kCols * 2;

struct Arguments {
  const uint16_t* x;
  int64_t row_length;
  bool is_aligned;  // x to 16 bytes, row_length and cols multiples of 8
  int64_t m;        // of the window
  int64_t cols;     // of the window
  int64_t rank;
  int padded_rank;
  int num_rank_blocks;
  int num_col_blocks;
  int64_t rows_per_block;
  int num_stages;
  Narrow narrow;
  float* projection_parts;  // [num_col_blocks, m, padded_rank]
  const uint16_t* left;
  int64_t left_stride;
  float* gradient_parts;  // [blocks of rows, cols, padded_rank]
  bool is_added;          // to the gradient parts that are there
};

template <bool kProjects, bool kReduces>
constexpr int kThreads = kWarps * 32 * (kProjects + kReduces);
template <int kRanks>
constexpr int kMinBlocks = kRanks <= 32 ? 2 : 1;  // of a multiprocessor: 64 ranks take all registers
template <int kRanks>
constexpr int kLeftBytes = kRows * kRanks * 2;
template <int kRanks, bool kProjects, bool kReduces>
constexpr int shared_bytes(int num_stages) {
  return (kProjects ? kRanks * kCols * 2 : 0) + num_stages * (kTileBytes + (kReduces ? kLeftBytes<kRanks> : 0));
}

// By warp `warp` of 4: rows 16 warp.. of the tile times S^T, to the part of the projection.
template <typename T, int kRanks>
__device__ __forceinline__ void project_tile(const Arguments& arguments, uint32_t tile, uint32_t narrow, int warp,
                                             int64_t first_row, int col_block, int first_rank) {
  const int lane = threadIdx.x % 32;
  const int matrix = lane / 8;
  const int row = lane % 8;
  float sums[kRanks / 8][4] = {};
#pragma unroll 4
  for (int c = 0; c < kCols / 16; ++c) {
    uint32_t a[4];
    load_matrices(a, tile + chunk_offset<kChunks>(warp * kWarpRows + matrix % 2 * 8 + row, 2 * c + matrix / 2));
#pragma unroll
    for (int n = 0; n < kRanks / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, narrow + chunk_offset<kChunks>(n * 16 + matrix / 2 * 8 + row, 2 * c + matrix % 2));
      multiply_add<T>(sums[2 * n], a, b[0], b[1]);
      multiply_add<T>(sums[2 * n + 1], a, b[2], b[3]);
    }
  }
#pragma unroll
  for (int n = 0; n < kRanks / 8; ++n) {
    const int rank = first_rank + n * 8 + lane % 4 * 2;
    if (rank >= arguments.padded_rank) continue;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t at = first_row + warp * kWarpRows + lane / 4 + 8 * h;
      if (at >= arguments.m) continue;
      float* const to = arguments.projection_parts + (col_block * arguments.m + at) * arguments.padded_rank + rank;
      *reinterpret_cast<float2*>(to) = make_float2(sums[n][2 * h], sums[n][2 * h + 1]);
    }
  }
}

// By warp `warp` of 4: sums [16 columns each of 64][8 ranks each] += columns 64 warp.. of the tile, transposed, times
// left.
template <typename T, int kRanks>
__device__ __forceinline__ void reduce_tile(uint32_t tile, uint32_t left, int warp,
                                            float (&sums)[kWarpCols / 16][kRanks / 8][4]) {
  const int lane = threadIdx.x % 32;
  const int matrix = lane / 8;
  const int row = lane % 8;
#pragma unroll(kRanks == 16 ? 4 : 1)  // more ranks fill the registers
  for (int r = 0; r < kRows / 16; ++r) {
    uint32_t b[kRanks / 16][4];
#pragma unroll
    for (int n = 0; n < kRanks / 16; ++n) {
      load_matrices_transposed(
          b[n], left + chunk_offset<kRanks / kChunkValues>(r * 16 + matrix % 2 * 8 + row, 2 * n + matrix / 2));
    }
#pragma unroll
    for (int c = 0; c < kWarpCols / 16; ++c) {
      uint32_t a[4];
      const int chunk = warp * (kWarpCols / kChunkValues) + 2 * c + matrix % 2;
      load_matrices_transposed(a, tile + chunk_offset<kChunks>(r * 16 + matrix / 2 * 8 + row, chunk));
#pragma unroll
      for (int n = 0; n < kRanks / 16; ++n) {
        multiply_add<T>(sums[c][2 * n], a, b[n][0], b[n][1]);
        multiply_add<T>(sums[c][2 * n + 1], a, b[n][2], b[n][3]);
      }
    }
  }
}

// visit(place of two neighbouring ranks, the two sums) for each that the lane holds of the part.
template <int kRanks, typename Visit>
__device__ __forceinline__ void for_each_gradient(const Arguments& arguments, int64_t row_block, int64_t first_col,
                                                  int first_rank, int warp,
                                                  float (&sums)[kWarpCols / 16][kRanks / 8][4], Visit visit) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < kWarpCols / 16; ++c) {
#pragma unroll
    for (int n = 0; n < kRanks / 8; ++n) {
      const int rank = first_rank + n * 8 + lane % 4 * 2;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int64_t col = first_col + warp * kWarpCols + c * 16 + lane / 4 + 8 * h;
        if (col >= arguments.cols || rank >= arguments.padded_rank) continue;
        float* const place =
            arguments.gradient_parts + (row_block * arguments.cols + col) * arguments.padded_rank + rank;
        visit(reinterpret_cast<float2*>(place), sums[c][n][2 * h], sums[c][n][2 * h + 1]);
      }
    }
  }
}

template <typename T, int kRanks, bool kProjects, bool kReduces>
__global__ __launch_bounds__(kThreads<kProjects, kReduces>,
                             kMinBlocks<kRanks>) void adapter_pass_kernel(const __grid_constant__ Arguments arguments) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
  extern __shared__ __align__(128) unsigned char shared_memory[];
  constexpr int kNumThreads = kThreads<kProjects, kReduces>;
  const int thread = threadIdx.x;
  const uint32_t narrow = shared_address(shared_memory);
  const uint32_t tiles = narrow + (kProjects ? kRanks * kCols * 2 : 0);
  const uint32_t lefts = tiles + arguments.num_stages * kTileBytes;

  const int first_rank = static_cast<int>(blockIdx.x) % arguments.num_rank_blocks * kRanks;
  const int block = static_cast<int>(blockIdx.x) / arguments.num_rank_blocks;
  const int col_block = block % arguments.num_col_blocks;
  const int64_t row_block = block / arguments.num_col_blocks;
  const int64_t first_col = int64_t{col_block} * kCols;
  const int64_t begin = row_block * arguments.rows_per_block;
  const int64_t end = min(begin + arguments.rows_per_block, arguments.m);
  const int num_tiles = static_cast<int>((end - begin + kRows - 1) / kRows);

  const auto load = [&](int index) {
    if (index < num_tiles) {
      const int stage = index % arguments.num_stages;
      const int64_t row = begin + int64_t{index} * kRows;
      load_tile<kRows, kChunks>(tiles + stage * kTileBytes, arguments.x + row * arguments.row_length + first_col,
                                arguments.row_length, end - row, arguments.cols - first_col, arguments.is_aligned,
                                thread, kNumThreads);
      if constexpr (kReduces) {
        load_tile<kRows, kRanks / kChunkValues>(lefts + stage * kLeftBytes<kRanks>,
                                                arguments.left + row * arguments.left_stride + first_rank,
                                                arguments.left_stride, end - row, kRanks, true, thread, kNumThreads);
      }
    }
    commit_copies();  // also where there is nothing to copy, so that commits count tiles
  };
  for (int index = 0; index + 1 < arguments.num_stages; ++index) load(index);
  if constexpr (kProjects) {
    load_narrow<T, kCols, 0>(narrow, arguments.narrow, int64_t{first_rank}, kRanks, arguments.rank, first_col,
                             arguments.cols, thread, kNumThreads);
  }

  const int warp = thread / 32;
  const bool is_projecting = kProjects && warp < kWarps;
  const int warp_of_product = warp % kWarps;
  constexpr int kHeldRanks = kReduces ? kRanks : 8;
  float gradient[kWarpCols / 16][kHeldRanks / 8][4] = {};
  if constexpr (kReduces) {
    if (!is_projecting && arguments.is_added) {
      for_each_gradient<kRanks>(arguments, row_block, first_col, first_rank, warp_of_product, gradient,
                                [](const float2* place, float& low, float& high) {
                                  const float2 former = *place;
                                  low = former.x;
                                  high = former.y;
                                });
    }
  }
  for (int index = 0; index < num_tiles; ++index) {
    if (arguments.num_stages == kMaxStages) {
      wait_for_copies<kMaxStages - 2>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();  // All copies of the tile are there, and its successor's stage has been read.
    load(index + arguments.num_stages - 1);
    const int stage = index % arguments.num_stages;
    if (is_projecting) {
      if constexpr (kProjects) {
        project_tile<T, kRanks>(arguments, tiles + stage * kTileBytes, narrow, warp_of_product,
                                begin + int64_t{index} * kRows, col_block, first_rank);
      }
    } else if constexpr (kReduces) {
      reduce_tile<T, kRanks>(tiles + stage * kTileBytes, lefts + stage * kLeftBytes<kRanks>, warp_of_product, gradient);
    }
  }
  if constexpr (kReduces) {
    if (is_projecting) return;
    for_each_gradient<kRanks>(arguments, row_block, first_col, first_rank, warp_of_product, gradient,
                              [](float2* place, float low, float high) { *place = make_float2(low, high); });
  }
}

// How a pass is cut.
struct Plan {
  int ranks;  // of a block
  int num_stages;
  int padded_rank;
  int num_rank_blocks;
  int64_t window_cols;
  int num_col_blocks;  // of a window
  int64_t window_rows;
  int num_row_blocks;  // of a window
  int64_t rows_per_block;
  int64_t projection_floats;
  int64_t gradient_floats;
};

constexpr int64_t kMaxPartFloats = kMaxPartBytes / sizeof(float);
constexpr int64_t kPartAlignment = 64;  // floats

int block_bytes(int ranks, bool projects, bool reduces, int num_stages) {
  int bytes = 0;
  dispatch_constant<16, 32, 64>("adapter_pass", ranks, [&](auto tag) {
    constexpr int kRanks = decltype(tag)::value;
    bytes = projects && reduces ? shared_bytes<kRanks, true, true>(num_stages)
            : projects          ? shared_bytes<kRanks, true, false>(num_stages)
                                : shared_bytes<kRanks, false, true>(num_stages);
  });
  return bytes;
}

// Columns whose gradient fits; at 256 ranks 16384.
int64_t widest_window(int64_t padded_rank) { return kMaxPartFloats / padded_rank / kCols * kCols; }

Plan plan_of(const AdapterPass& pass, const Device& device) {
  const bool projects = pass.output != nullptr;
  const bool reduces = pass.gradient.values != nullptr;
  Plan plan = {};
  plan.padded_rank = static_cast<int>(round_up(pass.rank, 16));
  plan.ranks = plan.padded_rank <= 16 ? 16 : plan.padded_rank <= 32 ? 32 : 64;
  plan.num_stages = kMaxStages;
  const auto bytes = [&] { return block_bytes(plan.ranks, projects, reduces, plan.num_stages); };
  if (bytes() > device.max_shared_bytes) plan.num_stages = 2;
  if (bytes() > device.max_shared_bytes) plan.ranks = 32;
  plan.num_rank_blocks = static_cast<int>(ceil_div(plan.padded_rank, plan.ranks));

  plan.window_cols = reduces ? std::min(pass.cols, widest_window(plan.padded_rank)) : pass.cols;
  plan.num_col_blocks = static_cast<int>(ceil_div(plan.window_cols, kCols));
  plan.window_rows = pass.m;
  if (projects) {
    int64_t most = std::max<int64_t>(kMaxPartFloats / (int64_t{plan.num_col_blocks} * plan.padded_rank), 1);
    if (most > kRows) most = most / kRows * kRows;
    plan.window_rows = std::min(pass.m, most);
  }

  const int64_t shared = device.max_shared_bytes + device.reserved_shared_bytes;
  const int64_t blocks_at_once =
      device.num_multiprocessors * std::clamp<int64_t>(shared / (bytes() + device.reserved_shared_bytes), 1, 2);
  int64_t row_blocks = std::min(blocks_at_once / (int64_t{plan.num_col_blocks} * plan.num_rank_blocks),
                                ceil_div(plan.window_rows, kRows));
  if (reduces) row_blocks = std::min(row_blocks, kMaxPartFloats / (plan.window_cols * plan.padded_rank));
  row_blocks = std::max<int64_t>(row_blocks, 1);
  plan.rows_per_block = round_up(ceil_div(plan.window_rows, row_blocks), kRows);
  plan.num_row_blocks = static_cast<int>(ceil_div(plan.window_rows, plan.rows_per_block));
  if (projects) {
    plan.projection_floats = round_up(plan.num_col_blocks * plan.window_rows * plan.padded_rank, kPartAlignment);
  }
  if (reduces) plan.gradient_floats = plan.num_row_blocks * plan.window_cols * plan.padded_rank;
  return plan;
}

template <typename T, int kRanks, bool kProjects, bool kReduces>
void launch_window(const Arguments& arguments, int num_row_blocks, const Device& device, cudaStream_t stream) {
  const auto kernel = adapter_pass_kernel<T, kRanks, kProjects, kReduces>;
  const int bytes = shared_bytes<kRanks, kProjects, kReduces>(arguments.num_stages);
  allow_shared_bytes(device, reinterpret_cast<const void*>(kernel), bytes);
  const int blocks = num_row_blocks * arguments.num_col_blocks * arguments.num_rank_blocks;
  launch_early("adapter_pass_kernel", kernel,
               LaunchShape{static_cast<unsigned>(blocks), kThreads<kProjects, kReduces>, bytes}, device, stream,
               arguments);
}

template <typename T>
void launch_window(const Arguments& arguments, int ranks, int num_row_blocks, const Device& device,
                   cudaStream_t stream) {
  dispatch_constant<16, 32, 64>("adapter_pass", ranks, [&](auto tag) {
    constexpr int kRanks = decltype(tag)::value;
    if (arguments.gradient_parts == nullptr) {
      launch_window<T, kRanks, true, false>(arguments, num_row_blocks, device, stream);
    } else if (arguments.projection_parts == nullptr) {
      launch_window<T, kRanks, false, true>(arguments, num_row_blocks, device, stream);
    } else {
      launch_window<T, kRanks, true, true>(arguments, num_row_blocks, device, stream);
    }
  });
}

template <typename T>
void run_pass(const AdapterPass& pass, const Device& device, float* workspace, cudaStream_t stream) {
  const Plan plan = plan_of(pass, device);
  const bool projects = pass.output != nullptr;
  const bool reduces = pass.gradient.values != nullptr;
  const auto* const x = static_cast<const uint16_t*>(pass.x);
  const int64_t left_stride = left_columns(pass.rank);
  Arguments arguments = {};
  arguments.row_length = pass.cols;
  arguments.is_aligned = pass.cols % kChunkValues == 0 && is_aligned(x, kChunkBytes);
  arguments.rank = pass.rank;
  arguments.padded_rank = plan.padded_rank;
  arguments.num_rank_blocks = plan.num_rank_blocks;
  arguments.rows_per_block = plan.rows_per_block;
  arguments.num_stages = plan.num_stages;
  if (projects) arguments.narrow = narrow_of(pass.matrix, pass.rank, pass.cols);
  arguments.projection_parts = projects ? workspace : nullptr;
  arguments.gradient_parts = reduces ? workspace + plan.projection_floats : nullptr;
  arguments.left_stride = left_stride;
  for (int64_t first_col = 0; first_col < pass.cols; first_col += plan.window_cols) {
    arguments.cols = std::min(plan.window_cols, pass.cols - first_col);
    arguments.num_col_blocks = static_cast<int>(ceil_div(arguments.cols, kCols));
    for (int64_t first_row = 0; first_row < pass.m; first_row += plan.window_rows) {
      arguments.m = std::min(plan.window_rows, pass.m - first_row);
      arguments.x = x + first_row * pass.cols + first_col;
      if (reduces) arguments.left = static_cast<const uint16_t*>(pass.left) + first_row * left_stride;
      arguments.is_added = first_row > 0;
      const int row_blocks = static_cast<int>(ceil_div(arguments.m, plan.rows_per_block));
      launch_window<T>(arguments, plan.ranks, row_blocks, device, stream);
      if (!projects) continue;
      T* const output = static_cast<T*>(pass.output) + first_row * left_stride;
      finish_projection({arguments.projection_parts, arguments.num_col_blocks, plan.padded_rank}, arguments.m,
                        pass.rank, pass.scaling, output, left_stride, pass.dtype, device, stream);
    }
    if (!reduces) continue;
    finish_gradient({arguments.gradient_parts, plan.num_row_blocks, plan.padded_rank}, arguments.cols, pass.rank,
                    pass.gradient, first_col, pass.cols, device, stream);
  }
}

// The two halves of a pass whose gradient does not fit beside the projection.
AdapterPass only_projection(AdapterPass pass) {
  pass.gradient.values = nullptr;
  return pass;
}
AdapterPass only_gradient(AdapterPass pass) {
  pass.output = nullptr;
  return pass;
}
bool is_cut(const AdapterPass& pass) {
  return pass.output != nullptr && pass.gradient.values != nullptr &&
         pass.cols > widest_window(round_up(pass.rank, 16));
}

}  // namespace

int64_t adapter_pass_workspace_size(const AdapterPass& pass, const Device& device) {
  if (is_cut(pass)) {
    return std::max(adapter_pass_workspace_size(only_projection(pass), device),
                    adapter_pass_workspace_size(only_gradient(pass), device));
  }
  const Plan plan = plan_of(pass, device);
  return (plan.projection_floats + plan.gradient_floats) * static_cast<int64_t>(sizeof(float));
}

void adapter_pass(const AdapterPass& pass, const Device& device, void* workspace, cudaStream_t stream) {
  if (is_cut(pass)) {
    adapter_pass(only_projection(pass), device, workspace, stream);
    adapter_pass(only_gradient(pass), device, workspace, stream);
    return;
  }
  dispatch_dtype(pass.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      run_pass<T>(pass, device, static_cast<float*>(workspace), stream);
    }
  });
}

}  // namespace qlora
