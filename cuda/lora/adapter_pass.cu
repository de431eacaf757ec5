// projection [m, rank] = x S^T and gradient [rank, cols] = left^T x, of one reading of x [m, cols], 16 bits.
//
//   block      256 columns of x (a tile), up to 64 ranks (kRanks), and a range of rows that it walks 64 at a time; it
//              keeps its columns of S in shared memory as 16 bits, rounded once from the adapter's dtype
//   4 warps    projection: 16 rows each; the sums over the block's columns are a part of these rows' projection
//   4 warps    gradient: 64 columns each; the sums over the block's rows stay in registers to the end
//   copies     cp.async, the next tiles of x and left on their way while one is multiplied
//
// Neither sum is whole within a block. From sm_90 on up to 8 blocks are a cluster and add their sums up in shared
// memory, each a share of them, in the order of the blocks: neighbours in columns where there is a projection, else in
// rows. What is not whole then goes to workspace in fp32, and a second kernel adds up these parts in their order. A
// block of a projection alone takes several tiles of a row one after the other, 8 apart, and needs no such parts where
// its columns of S fit. For dy [4096, 14336] and rank 16 parts are 7 x 0.26 MB and 2 x 0.92 MB, without clusters 56 and
// 4, beside 117 MB of dy, which two kernels would read twice. Where more than 64 ranks are asked for, blocks of the
// same tile run side by side, so that all but one find it in L2.
//
// Bounds: kMaxPartBytes for each of the projection's and the gradient's parts, of R values a row or column, where R is
// the rank rounded up to a multiple of 16. More rows than fit are taken in windows, one after the other, whose
// gradients are added to the parts there are; a gradient that does not fit is taken in windows of columns, and then
// apart from the projection. Any shape and address, x unaligned at the cost of copies value by value.
#include <algorithm>
#include <cstdint>

#include "core/status.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/lora/adapter_share.cuh"
#include "cuda/lora/finish_parts.h"
#include "cuda/lora/lora.h"
#include "cuda/remember.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

using namespace lora;

template <typename T, int kRanks, bool kProjects, bool kReduces>
__global__ __launch_bounds__(kThreads<kProjects, kReduces>,
                             kMinBlocks<kRanks>) void adapter_pass_kernel(const __grid_constant__ Arguments arguments) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  if (arguments.cluster > 0) hand_over_to_cluster();  // that this block has started
  cudaGridDependencySynchronize();
#endif
  extern __shared__ __align__(128) unsigned char shared_memory[];
  constexpr int kNumThreads = kThreads<kProjects, kReduces>;
  const int thread = threadIdx.x;
  const int across = kReduces ? 1 : arguments.tiles_across;
  unsigned char* const exchanged = shared_memory + (kProjects ? across * kNarrowBytes<kRanks> : 0);
  const uint32_t narrow = shared_address(shared_memory);
  const uint32_t tiles = shared_address(exchanged) + (arguments.cluster > 0 ? kExchangeBytes<kRanks, kProjects> : 0);
  const uint32_t lefts = tiles + arguments.num_stages * kTileBytes;
  const Share<kRanks, kProjects> block(arguments);
  const int num_tiles = block.num_row_tiles * across;
  const int tile_stride = max(arguments.cluster, 1);

  const auto load = [&](int index) {
    const int col_tile = block.first_tile + index % across * tile_stride;
    if (index < num_tiles && col_tile < arguments.num_col_tiles) {
      const int stage = index % arguments.num_stages;
      const int64_t row = block.begin + int64_t{index / across} * kRows;
      const int64_t first_col = int64_t{col_tile} * kCols;
      load_tile<kRows, kChunks>(tiles + stage * kTileBytes, arguments.x + row * arguments.row_length + first_col,
                                arguments.row_length, block.end - row, arguments.cols - first_col, arguments.is_aligned,
                                thread, kNumThreads);
      if constexpr (kReduces) {
        load_tile<kRows, kRanks / kChunkValues>(
            lefts + stage * kLeftBytes<kRanks>, arguments.left + row * arguments.left_stride + block.first_rank,
            arguments.left_stride, block.end - row, kRanks, true, thread, kNumThreads);
      }
    }
    commit_copies();  // also where there is nothing to copy, so that commits count tiles
  };
  for (int index = 0; index + 1 < arguments.num_stages; ++index) load(index);
  if constexpr (kProjects) {
    for (int i = 0; i < across; ++i) {
      load_narrow<T, kCols, 0>(narrow + i * kNarrowBytes<kRanks>, arguments.narrow, int64_t{block.first_rank}, kRanks,
                               arguments.rank, int64_t{block.first_tile + i * tile_stride} * kCols, arguments.cols,
                               thread, kNumThreads);
    }
  }

  const int warp = thread / 32;
  const bool is_projecting = kProjects && warp < kWarps;
  const int warp_of_product = warp % kWarps;
  constexpr int kHeldRanks = kReduces ? kRanks : 8;
  ColumnSums<kHeldRanks> gradient = {};
  const auto gradient_part = [&](int col, int rank) {
    const int64_t at = block.row_group * arguments.cols + int64_t{block.first_tile} * kCols + col;
    return reinterpret_cast<float2*>(arguments.gradient_parts + at * arguments.padded_rank + block.first_rank + rank);
  };
  const auto is_inside = [&](int col, int rank) {
    return int64_t{block.first_tile} * kCols + col < arguments.cols && block.first_rank + rank < arguments.padded_rank;
  };
  if constexpr (kReduces) {
    if (!is_projecting && arguments.is_added) {
      for_each_column_sum<kRanks>(gradient, warp_of_product, [&](int col, int rank, float& low, float& high) {
        if (!is_inside(col, rank)) return;
        const float2 former = *gradient_part(col, rank);
        low = former.x;
        high = former.y;
      });
    }
  }
#if __CUDA_ARCH__ >= 900
  float kept[4] = {};
  const auto exchange_of = [&](int index) {
    return reinterpret_cast<float*>(exchanged) + index % 2 * (kRows * kRanks);
  };
  const auto add_up = [&](int index) {
    if constexpr (kProjects) {
      const int64_t first_row = block.begin + int64_t{index / across} * kRows;
      add_row_sums<T, kRanks, kNumThreads>(arguments, block, exchange_of(index), first_row, index % across, kept);
    }
  };
#endif
  for (int index = 0; index < num_tiles; ++index) {
    wait_for_stage(arguments.num_stages);
    __syncthreads();  // All copies of the tile are there, and its successor's stage has been read.
    load(index + arguments.num_stages - 1);
    const uint32_t tile = tiles + index % arguments.num_stages * kTileBytes;
    const bool has_columns = block.first_tile + index % across * tile_stride < arguments.num_col_tiles;
    if constexpr (kReduces) {
      if (!is_projecting && has_columns) {
        const uint32_t left = lefts + index % arguments.num_stages * kLeftBytes<kRanks>;
        reduce_tile<T, kRanks>(tile, left, warp_of_product, gradient);
      }
    }
    if constexpr (kProjects) {
      RowSums<kRanks> sums = {};
      if (is_projecting && has_columns) {
        project_tile<T, kRanks>(tile, narrow + index % across * kNarrowBytes<kRanks>, warp_of_product, sums);
      }
#if __CUDA_ARCH__ >= 900
      if (arguments.cluster > 0) {
        // The sums of the tile before, and the place where those of the one before that were, which have been read.
        take_over_from_cluster();
        if (index > 0) add_up(index - 1);
        if (is_projecting) {
          send_row_sums<kRanks>(sums, warp_of_product, shared_address(exchange_of(index)), arguments.cluster,
                                block.rank_in_cluster);
        }
        hand_over_to_cluster();
        continue;
      }
#endif
      if (!is_projecting) continue;
      for_each_row_sum<kRanks>(sums, warp_of_product, [&](int row, int rank, float low, float high) {
        const int64_t at = block.begin + int64_t{index} * kRows + row;
        if (at >= block.end || block.first_rank + rank >= arguments.padded_rank) return;
        float* const part = arguments.projection_parts + (block.col_group * arguments.m + at) * arguments.padded_rank;
        *reinterpret_cast<float2*>(part + block.first_rank + rank) = make_float2(low, high);
      });
    }
  }
#if __CUDA_ARCH__ >= 900
  if (arguments.cluster > 0) {
    take_over_from_cluster();
    if constexpr (kProjects) {
      if (num_tiles > 0) add_up(num_tiles - 1);
    } else {
      add_column_sums<kRanks, kNumThreads>(arguments, block, gradient, reinterpret_cast<const float*>(exchanged));
      return;
    }
  }
#endif
  if constexpr (kReduces) {
    if (is_projecting) return;
    for_each_column_sum<kRanks>(gradient, warp_of_product, [&](int col, int rank, float low, float high) {
      if (is_inside(col, rank)) *gradient_part(col, rank) = make_float2(low, high);
    });
  }
}

// How a pass is cut.
struct Plan {
  int ranks;  // of a block
  int num_stages;
  int shared_bytes;
  int cluster;  // 0: none
  int padded_rank;
  int num_rank_blocks;
  int64_t window_cols;
  int tiles_across;
  int64_t window_rows;
  int num_row_blocks;  // of a window
  int64_t rows_per_block;
  bool is_projection_whole;  // without parts
  bool is_gradient_whole;
  int num_gradient_parts;
  int64_t projection_floats;
  int64_t gradient_floats;
};

constexpr int64_t kMaxPartFloats = kMaxPartBytes / sizeof(float);
constexpr int64_t kPartAlignment = 64;  // floats

// f(the kernel) for what is asked of the pass.
template <typename Function>
void with_kernel(const AdapterPass& pass, int ranks, Function&& f) {
  dispatch_dtype(pass.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      dispatch_constant<16, 32, 64>("adapter_pass", ranks, [&](auto tag) {
        constexpr int kRanks = decltype(tag)::value;
        if (pass.gradient.values == nullptr) {
          f(adapter_pass_kernel<T, kRanks, true, false>);
        } else if (pass.output == nullptr) {
          f(adapter_pass_kernel<T, kRanks, false, true>);
        } else {
          f(adapter_pass_kernel<T, kRanks, true, true>);
        }
      });
    }
  });
}

int num_threads(const AdapterPass& pass) {
  return kWarps * 32 * (1 + (pass.output != nullptr && pass.gradient.values != nullptr));
}

// Clusters of `cluster` blocks of all the shared memory there is that run at once.
int clusters_at_once(const void* kernel, int cluster) {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  int bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "cudaDeviceGetAttribute(MaxSharedMemoryPerBlockOptin)");
  cudaFuncAttributes attributes = {};
  check_cuda(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
             "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
  return count_clusters(kernel,
                        LaunchShape{static_cast<unsigned>(cluster), attributes.maxThreadsPerBlock, bytes, cluster});
}

int blocks_in_clusters(const Device& device, const void* kernel, int cluster) {
  return cluster * remember(device, kernel, cluster, clusters_at_once);
}

// Columns whose gradient fits; at 256 ranks 16384.
int64_t widest_window(int64_t padded_rank) { return kMaxPartFloats / padded_rank / kCols * kCols; }

// Shared memory: ranks, stages and tiles across, as much of them as fits. A projection is cut by its columns alone, so
// that a row's sums do not depend on other rows.
void plan_memory(Plan& plan, bool projects, bool reduces, bool is_clustered, int64_t num_col_tiles,
                 const Device& device) {
  plan.ranks = plan.padded_rank <= 16 ? 16 : plan.padded_rank <= 32 ? 32 : 64;
  plan.tiles_across = 1;
  const auto fixed_bytes = [&] {
    return (projects ? plan.tiles_across * plan.ranks * kCols * 2 : 0) +
           (is_clustered ? exchange_bytes(plan.ranks, projects) : 0);
  };
  const auto stages = [&] { return (device.max_shared_bytes - fixed_bytes()) / stage_bytes(plan.ranks, reduces); };
  while (stages() < 2 && plan.ranks > 16) plan.ranks /= 2;  // one stage would be read while it is written
  if (is_clustered && projects) {
    plan.cluster = 1;
    while (plan.cluster < std::min<int64_t>(num_col_tiles, kMaxCluster)) plan.cluster *= 2;
    if (!reduces) plan.tiles_across = static_cast<int>(ceil_div(num_col_tiles, plan.cluster));
    if (stages() < 3) plan.tiles_across = 1;
    plan.is_projection_whole = plan.cluster * plan.tiles_across >= num_col_tiles;
  }
  plan.num_stages = static_cast<int>(std::min<int64_t>(stages(), is_clustered ? kMaxStages : 3));
  plan.shared_bytes = fixed_bytes() + plan.num_stages * stage_bytes(plan.ranks, reduces);
  plan.num_rank_blocks = static_cast<int>(ceil_div(plan.padded_rank, plan.ranks));
}

Plan plan_of(const AdapterPass& pass, const Device& device) {
  const bool projects = pass.output != nullptr;
  const bool reduces = pass.gradient.values != nullptr;
  Plan plan = {};
  plan.padded_rank = static_cast<int>(round_up(pass.rank, 16));
  plan.window_cols = reduces ? std::min(pass.cols, widest_window(plan.padded_rank)) : pass.cols;
  const int64_t num_col_tiles = ceil_div(plan.window_cols, kCols);
  const void* kernel = nullptr;
  const auto find_kernel = [&](int ranks) {
    with_kernel(pass, ranks, [&](auto found) { kernel = reinterpret_cast<const void*>(found); });
  };
  find_kernel(16);
  const bool is_clustered = device.major >= 9 && is_compiled_for_sm90(device, kernel);
  plan_memory(plan, projects, reduces, is_clustered, num_col_tiles, device);
  find_kernel(plan.ranks);

  const int num_col_groups = static_cast<int>(ceil_div(num_col_tiles, std::max(plan.cluster, 1) * plan.tiles_across));
  plan.window_rows = pass.m;
  if (projects && !plan.is_projection_whole) {
    int64_t most = std::max<int64_t>(kMaxPartFloats / (int64_t{num_col_groups} * plan.padded_rank), 1);
    if (most > kRows) most = most / kRows * kRows;
    plan.window_rows = std::min(pass.m, most);
  }

  const int64_t num_row_tiles = ceil_div(plan.window_rows, kRows);
  const int64_t blocks_beside = int64_t{num_col_groups} * std::max(plan.cluster, 1) * plan.num_rank_blocks;
  const int64_t max_parts =
      reduces ? std::max<int64_t>(kMaxPartFloats / (plan.window_cols * plan.padded_rank), 1) : num_row_tiles;
  int64_t row_blocks = 1;
  if (is_clustered && projects) {
    row_blocks = std::min({blocks_in_clusters(device, kernel, plan.cluster) / blocks_beside, num_row_tiles, max_parts});
  } else if (is_clustered) {
    plan.cluster = 1;
    for (int cluster = kMaxCluster; cluster > 1; cluster /= 2) {
      const int64_t groups = std::min(blocks_in_clusters(device, kernel, cluster) / cluster / blocks_beside, max_parts);
      const int64_t blocks = std::min(groups, ceil_div(num_row_tiles, cluster)) * cluster;
      if (blocks <= row_blocks || cluster >= 2 * num_row_tiles) continue;
      row_blocks = blocks;
      plan.cluster = cluster;
    }
  } else {
    const int64_t shared = device.max_shared_bytes + device.reserved_shared_bytes;
    const int64_t blocks_at_once =
        device.num_multiprocessors *
        std::clamp<int64_t>(shared / (plan.shared_bytes + device.reserved_shared_bytes), 1, 2);
    row_blocks = std::min({blocks_at_once / blocks_beside, num_row_tiles, max_parts});
  }
  row_blocks = std::max<int64_t>(row_blocks, 1);
  plan.rows_per_block = round_up(ceil_div(plan.window_rows, row_blocks), kRows);
  plan.num_row_blocks = static_cast<int>(ceil_div(plan.window_rows, plan.rows_per_block));
  plan.num_gradient_parts = plan.num_row_blocks;
  if (!projects && is_clustered) {
    plan.num_gradient_parts = static_cast<int>(ceil_div(plan.num_row_blocks, plan.cluster));
    plan.num_row_blocks = plan.num_gradient_parts * plan.cluster;
    plan.is_gradient_whole = plan.num_gradient_parts == 1;
  }
  if (projects && !plan.is_projection_whole) {
    plan.projection_floats = round_up(num_col_groups * plan.window_rows * plan.padded_rank, kPartAlignment);
  }
  if (reduces && !plan.is_gradient_whole) {
    plan.gradient_floats = plan.num_gradient_parts * plan.window_cols * plan.padded_rank;
  }
  return plan;
}

void run_pass(const AdapterPass& pass, const Device& device, float* workspace, cudaStream_t stream) {
  const Plan plan = plan_of(pass, device);
  const bool projects = pass.output != nullptr;
  const bool reduces = pass.gradient.values != nullptr;
  const auto* const x = static_cast<const uint16_t*>(pass.x);
  const int64_t left_stride = left_columns(pass.rank);
  const int cluster = std::max(plan.cluster, 1);
  Arguments arguments = {};
  arguments.row_length = pass.cols;
  arguments.is_aligned = pass.cols % kChunkValues == 0 && is_aligned(x, kChunkBytes);
  arguments.rank = pass.rank;
  arguments.padded_rank = plan.padded_rank;
  arguments.num_rank_blocks = plan.num_rank_blocks;
  arguments.tiles_across = plan.tiles_across;
  arguments.rows_per_block = plan.rows_per_block;
  arguments.num_stages = plan.num_stages;
  arguments.cluster = plan.cluster;
  arguments.scaling = pass.scaling;
  arguments.output_stride = static_cast<int>(left_stride);
  if (projects) arguments.narrow = narrow_of(pass.matrix, pass.rank, pass.cols);
  arguments.projection_parts = projects && !plan.is_projection_whole ? workspace : nullptr;
  arguments.gradient_parts = reduces && !plan.is_gradient_whole ? workspace + plan.projection_floats : nullptr;
  arguments.left_stride = left_stride;
  for (int64_t first_col = 0; first_col < pass.cols; first_col += plan.window_cols) {
    arguments.cols = std::min(plan.window_cols, pass.cols - first_col);
    arguments.num_col_tiles = static_cast<int>(ceil_div(arguments.cols, kCols));
    const int tiles_of_group = (projects ? cluster : 1) * plan.tiles_across;
    arguments.num_col_groups = static_cast<int>(ceil_div(arguments.num_col_tiles, tiles_of_group));
    if (reduces) arguments.gradient = narrow_of(pass.gradient, pass.rank, pass.cols, first_col);
    for (int64_t first_row = 0; first_row < pass.m; first_row += plan.window_rows) {
      arguments.m = std::min(plan.window_rows, pass.m - first_row);
      arguments.x = x + first_row * pass.cols + first_col;
      if (reduces) arguments.left = static_cast<const uint16_t*>(pass.left) + first_row * left_stride;
      void* const output = static_cast<char*>(pass.output) + first_row * left_stride * size_of(pass.dtype);
      arguments.output = output;
      arguments.is_added = first_row > 0;
      const bool is_last = first_row + plan.window_rows >= pass.m;
      const int64_t row_blocks = projects ? ceil_div(arguments.m, plan.rows_per_block) * cluster : plan.num_row_blocks;
      const int64_t blocks = row_blocks * arguments.num_col_groups * plan.num_rank_blocks;
      with_kernel(pass, plan.ranks, [&](auto kernel) {
        allow_shared_bytes(device, reinterpret_cast<const void*>(kernel), static_cast<int>(device.max_shared_bytes));
        launch_early("adapter_pass_kernel", kernel,
                     LaunchShape{static_cast<unsigned>(blocks), num_threads(pass), plan.shared_bytes, cluster}, device,
                     stream, arguments);
      });
      const Parts projection = {arguments.projection_parts, arguments.num_col_groups, plan.padded_rank};
      const Parts gradient = {is_last ? arguments.gradient_parts : nullptr, plan.num_gradient_parts, plan.padded_rank};
      finish_parts({projection, arguments.m, pass.scaling, output, left_stride},
                   {gradient, arguments.cols, arguments.gradient}, pass.rank, pass.dtype, device, stream);
    }
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
  run_pass(pass, device, static_cast<float*>(workspace), stream);
}

}  // namespace qlora
