// projection [m, rank] = x S^T and gradient [rank, cols] = left^T x, of one reading of x [m, cols], 16 bits.
//
//   tile    32 rows (64 for more than 32 ranks) of 256 columns of x; a ring of up to 8 of them fills by cp.async
//   unit    the tiles of a row across a group of columns: 2, or 4 of long rows where there is a projection alone, or 1
//           where there is a gradient alone
//   share   a block's: units one below the other, of one group of columns or of two and more that follow each other, as
//           many for each block as for any other, of a grid that the device holds at once
//
// All 8 warps multiply a tile for both products. Projection: the group's columns of S lie in shared memory as 16 bits,
// rounded once from the adapter's dtype; warps that share a unit's rows have its columns dealt among them and put
// their sums to shared memory, which all threads add up while the next tile is multiplied. Gradient: each warp has 32
// columns of each tile across, whose sums stay in registers to the end of the group.
//
// Neither sum is whole within a block: a part of the projection a group, a part of the gradient a share and group go to
// workspace in fp32, and a second kernel adds up these parts in their order. For dy [4096, 14336] and rank 16 on 132
// multiprocessors that is 28 x 0.26 MB and 159 x 32 KB beside 117 MB of dy. A row's sums are cut by its columns alone,
// so that they do not depend on the other rows. Where more than 64 ranks are asked for, blocks of the same units run
// side by side, so that all but one find x in L2.
//
// What it takes at rank 16, for 16 x 16 values of x, which at 3 TB/s come every 39 clocks to each of 132
// multiprocessors. Shared memory, at 128 bytes a clock: 4 clocks for the copy, 4 for each product's operand, 4 for S
// (of 16 rows a warp), 2 for left (of 32 columns), 2 for the exchange: 20. Tensor cores: 4 for each product. At rank
// 64, with tiles of 64 rows: 36 and 32.
//
// Bounds: kMaxPartBytes for all parts. More rows than fit are taken in windows of the same cut, one after the other,
// whose gradients are added to the parts there are; a gradient that does not fit is taken in windows of columns, and
// then apart from the projection. Any shape and address, x unaligned at the cost of copies value by value.
#include <algorithm>
#include <cstdint>

#include "core/status.h"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/lora/adapter_panel.cuh"
#include "cuda/lora/adapter_share.cuh"
#include "cuda/lora/finish_parts.h"
#include "cuda/lora/lora.h"
#include "cuda/remember.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

using namespace lora;

template <typename T, int kRanks, bool kProjects, bool kReduces>
__global__ __launch_bounds__(kThreads, 1) void adapter_pass_kernel(const __grid_constant__ Arguments arguments) {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
  extern __shared__ __align__(128) unsigned char shared_memory[];
  using S = Shape<kRanks>;
  constexpr int kHeld = kHeldTiles<kProjects, kReduces>;
  const int across = kReduces ? kHeld : arguments.tiles_across;
  float* const exchange = reinterpret_cast<float*>(shared_memory + (kProjects ? across * S::kPanelBytes : 0));
  const uint32_t panel = shared_address(shared_memory);
  const uint32_t tiles = shared_address(exchange) + (kProjects ? S::kExchangeBytes : 0);
  const uint32_t lefts = tiles + arguments.num_stages * S::kTileBytes;
  const int warp = threadIdx.x / 32;
  const int rank_block = static_cast<int>(blockIdx.x) % arguments.num_rank_blocks;
  const int first_rank = rank_block * kRanks;
  const int share = static_cast<int>(blockIdx.x) / arguments.num_rank_blocks;
  const int first_unit = share * arguments.units_per_share;
  const int last_unit = min(first_unit + arguments.units_per_share, arguments.num_units);

  const auto row_of = [](const Place& place) { return int64_t{place.row_tile} * S::kRows; };
  const auto col_of = [&](const Place& place) { return (int64_t{place.group} * across + place.across) * kTileCols; };
  Place ahead(first_unit, arguments.row_tiles);
  const auto load_next = [&] {
    if (ahead.unit < last_unit && row_of(ahead) < arguments.m) {
      const int64_t row = row_of(ahead);
      if (col_of(ahead) < arguments.cols) {
        load_x<S::kRows>(tiles + ahead.stage * S::kTileBytes, arguments, row, col_of(ahead));
      }
      if (kReduces && ahead.across == 0) {
        load_tile<S::kRows, kRanks / kChunkValues>(
            lefts + ahead.left_stage * S::kLeftBytes, arguments.left + row * arguments.left_stride + first_rank,
            arguments.left_stride, arguments.m - row, kRanks, true, threadIdx.x, kThreads);
      }
    }
    commit_copies();  // also where there is nothing to copy, so that commits count tiles
    ahead.advance(arguments, across);
  };
  for (int i = 0; i + 1 < arguments.num_stages; ++i) load_next();

  ColumnSums<kRanks> gradient[kHeld] = {};
  const auto for_each_gradient = [&](int group, auto visit) {
    const int slot = rank_block * arguments.num_slots + slot_of(share, group, arguments.slots_per_group);
    float* const part = arguments.gradient_parts + int64_t{slot} * (kHeld * kTileCols * kRanks);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      for_each_column_sum<kRanks>(gradient[i], warp, [&](float& low, float& high, int offset) {
        visit(low, high, reinterpret_cast<float2*>(part + i * (kTileCols * kRanks) + offset));
      });
    }
  };
  Place place(first_unit, arguments.row_tiles);
  while (place.unit < last_unit) {
    const int group = place.group;
    const int64_t row = row_of(place);
    if (place.unit == first_unit || place.row_tile == 0) {
      if constexpr (kProjects) {
        if (place.unit > first_unit) __syncthreads();  // The former group's columns of S have been read.
        load_panel<T, kRanks>(panel, arguments.narrow, first_rank, arguments.rank, col_of(place), arguments.cols,
                              across);
      }
      if constexpr (kReduces) {
        for_each_gradient(group, [&](float& low, float& high, const float2* part) {
          const float2 former = arguments.is_added ? *part : float2{};
          low = former.x;
          high = former.y;
        });
      }
    }
    RowSums<kRanks> sums = {};
    const uint32_t left = lefts + place.left_stage * S::kLeftBytes;
#pragma unroll(kReduces ? kHeld : 1)
    for (int i = 0; i < across; ++i) {
      wait_for_stage(arguments.num_stages);
      __syncthreads();  // All copies of the tile are there, and its predecessor's stage has been read.
      if constexpr (kProjects) {
        if (i == 0 && place.unit > first_unit) {
          const int former = place.row_tile == 0 ? arguments.row_tiles : place.row_tile;
          add_row_sums<kRanks>(arguments, exchange, place.row_tile == 0 ? group - 1 : group,
                               int64_t{former - 1} * S::kRows, first_rank);
        }
      }
      load_next();
      const uint32_t tile = tiles + place.stage * S::kTileBytes;
      if (row < arguments.m && col_of(place) < arguments.cols) {
        if constexpr (kProjects) project_tile<T, kRanks>(tile, panel + i * S::kPanelBytes, warp, sums);
        if constexpr (kReduces) reduce_tile<T, kRanks>(tile, left, warp, gradient[i]);
      }
      place.advance(arguments, across);
    }
    // Read behind the next barrier, and written again behind the one after that: a unit has two tiles or more.
    if constexpr (kProjects) store_row_sums<kRanks>(sums, warp, exchange);
    if constexpr (kReduces) {
      if (place.group != group || place.unit == last_unit) {
        for_each_gradient(group, [](float low, float high, float2* part) { *part = make_float2(low, high); });
      }
    }
  }
  if constexpr (kProjects) {
    __syncthreads();
    const Place last(last_unit - 1, arguments.row_tiles);
    add_row_sums<kRanks>(arguments, exchange, last.group, row_of(last), first_rank);
  }
}

// How a pass is cut.
struct Plan {
  int ranks;  // of a block
  int tile_rows;
  int num_stages;
  int num_left_stages;
  int shared_bytes;
  int padded_rank;
  int num_rank_blocks;
  int tiles_across;
  int64_t window_cols;
  int64_t window_rows;
  int row_tiles;
  int units_per_share;
  int num_slots;
  int slots_per_group;
  int64_t projection_floats;
  int64_t gradient_floats;

  int64_t group_cols() const { return int64_t{tiles_across} * kTileCols; }
  int64_t slot_floats() const { return group_cols() * ranks; }
};

constexpr int64_t kMaxPartFloats = kMaxPartBytes / sizeof(float);
constexpr int64_t kPartAlignment = 64;  // floats

bool projects(const AdapterPass& pass) { return pass.output != nullptr; }
bool reduces(const AdapterPass& pass) { return pass.gradient.values != nullptr; }

// Of both: the gradient takes up to 5 of 8.
int64_t max_gradient_floats(const AdapterPass& pass) {
  return projects(pass) ? kMaxPartFloats / 8 * 5 : kMaxPartFloats;
}

// f(the kernel) for what is asked of the pass.
template <typename Function>
void with_kernel(const AdapterPass& pass, int ranks, Function&& f) {
  dispatch_dtype(pass.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      dispatch_constant<16, 32, 64>("adapter_pass", ranks, [&](auto tag) {
        constexpr int kRanks = decltype(tag)::value;
        if (!reduces(pass)) {
          f(adapter_pass_kernel<T, kRanks, true, false>);
        } else if (!projects(pass)) {
          f(adapter_pass_kernel<T, kRanks, false, true>);
        } else {
          f(adapter_pass_kernel<T, kRanks, true, true>);
        }
      });
    }
  });
}

template <int kRanks>
int shared_bytes(bool projects, bool reduces, int tiles_across, int stages) {
  using S = Shape<kRanks>;
  return (projects ? tiles_across * S::kPanelBytes + S::kExchangeBytes : 0) + stages * S::kTileBytes +
         (reduces ? left_stages(stages, tiles_across) * S::kLeftBytes : 0);
}

// Ranks and stages, as much of them as fits.
void plan_memory(Plan& plan, const AdapterPass& pass, const Device& device) {
  plan.ranks = plan.padded_rank <= 16 ? 16 : plan.padded_rank <= 32 ? 32 : 64;
  if (!projects(pass)) {
    plan.tiles_across = kHeldTiles<false, true>;
  } else if (reduces(pass)) {
    plan.tiles_across = kHeldTiles<true, true>;
  } else {
    plan.tiles_across = plan.padded_rank <= 16 && pass.cols > 8192 ? 4 : 2;
  }
  const auto bytes = [&](int stages) {
    int result = 0;
    dispatch_constant<16, 32, 64>("adapter_pass", plan.ranks, [&](auto tag) {
      result = shared_bytes<decltype(tag)::value>(projects(pass), reduces(pass), plan.tiles_across, stages);
    });
    return result;
  };
  // With one stage it would be read while it is written.
  while (plan.ranks > 16 && bytes(2) > device.max_shared_bytes) plan.ranks /= 2;
  plan.num_stages = kMaxStages;
  while (plan.num_stages > 2 && bytes(plan.num_stages) > device.max_shared_bytes) --plan.num_stages;
  plan.shared_bytes = bytes(plan.num_stages);
  plan.num_left_stages = left_stages(plan.num_stages, plan.tiles_across);
  dispatch_constant<16, 32, 64>("adapter_pass", plan.ranks,
                                [&](auto tag) { plan.tile_rows = Shape<decltype(tag)::value>::kRows; });
  plan.num_rank_blocks = static_cast<int>(ceil_div(plan.padded_rank, plan.ranks));
}

// Groups of columns whose gradient fits with one slot for each.
int64_t widest_window(const Plan& plan, const AdapterPass& pass) {
  return max_gradient_floats(pass) / (plan.slot_floats() * plan.num_rank_blocks);
}

// Units of a window dealt to blocks: evenly, or with fewer slots, where these do not fit, so that no block has units of
// two groups.
void plan_shares(Plan& plan, const AdapterPass& pass, const Device& device) {
  const int64_t groups = ceil_div(plan.window_cols, plan.group_cols());
  const int64_t row_tiles = ceil_div(plan.window_rows, plan.tile_rows);
  const int64_t shares = std::max(device.num_multiprocessors / plan.num_rank_blocks, 1);
  int64_t units = ceil_div(groups * row_tiles, shares);
  plan.row_tiles = static_cast<int>(row_tiles);
  plan.slots_per_group = row_tiles % units == 0 ? 0 : 1;
  plan.num_slots = static_cast<int>(ceil_div(groups * row_tiles, units) + plan.slots_per_group * (groups - 1));
  const int64_t max_slots = widest_window(plan, pass);
  if (reduces(pass) && plan.num_slots > max_slots) {
    const int64_t shares_of_group = std::clamp<int64_t>(std::min(shares, max_slots) / groups, 1, row_tiles);
    units = ceil_div(row_tiles, shares_of_group);
    plan.row_tiles = static_cast<int>(round_up(row_tiles, units));
    plan.slots_per_group = 0;
    plan.num_slots = static_cast<int>(groups * plan.row_tiles / units);
  }
  plan.units_per_share = static_cast<int>(units);
}

Plan plan_of(const AdapterPass& pass, const Device& device) {
  Plan plan = {};
  plan.padded_rank = static_cast<int>(round_up(pass.rank, 16));
  plan_memory(plan, pass, device);
  plan.window_cols = pass.cols;
  if (reduces(pass)) plan.window_cols = std::min(pass.cols, widest_window(plan, pass) * plan.group_cols());
  plan.window_rows = pass.m;
  plan_shares(plan, pass, device);
  if (reduces(pass)) plan.gradient_floats = plan.num_slots * plan.num_rank_blocks * plan.slot_floats();
  if (!projects(pass)) return plan;
  const int64_t floats_of_row = ceil_div(pass.cols, plan.group_cols()) * plan.padded_rank;
  const int64_t space = kMaxPartFloats - (reduces(pass) ? max_gradient_floats(pass) : 0);
  const int64_t most_rows = std::max<int64_t>(space / floats_of_row / plan.tile_rows * plan.tile_rows, plan.tile_rows);
  if (pass.m > most_rows) {
    plan.window_rows = round_up(ceil_div(pass.m, ceil_div(pass.m, most_rows)), plan.tile_rows);
    plan_shares(plan, pass, device);
    if (reduces(pass)) plan.gradient_floats = plan.num_slots * plan.num_rank_blocks * plan.slot_floats();
  }
  plan.projection_floats = round_up(floats_of_row * plan.window_rows, kPartAlignment);
  return plan;
}

void run_pass(const AdapterPass& pass, const Device& device, float* workspace, cudaStream_t stream) {
  const Plan plan = plan_of(pass, device);
  const auto* const x = static_cast<const uint16_t*>(pass.x);
  const int64_t left_stride = left_columns(pass.rank);
  Arguments arguments = {};
  arguments.row_length = pass.cols;
  arguments.is_aligned = pass.cols % kChunkValues == 0 && is_aligned(x, kChunkBytes);
  arguments.rank = pass.rank;
  arguments.padded_rank = plan.padded_rank;
  arguments.num_rank_blocks = plan.num_rank_blocks;
  arguments.tiles_across = plan.tiles_across;
  arguments.row_tiles = plan.row_tiles;
  arguments.units_per_share = plan.units_per_share;
  arguments.num_stages = plan.num_stages;
  arguments.num_left_stages = plan.num_left_stages;
  if (projects(pass)) {
    arguments.narrow = narrow_of(pass.matrix, pass.rank, pass.cols);
    arguments.projection_parts = workspace;
  }
  if (reduces(pass)) arguments.gradient_parts = workspace + plan.projection_floats;
  arguments.left_stride = left_stride;
  arguments.num_slots = plan.num_slots;
  arguments.slots_per_group = plan.slots_per_group;
  for (int64_t first_col = 0; first_col < pass.cols; first_col += plan.window_cols) {
    arguments.cols = std::min(plan.window_cols, pass.cols - first_col);
    const int num_groups = static_cast<int>(ceil_div(arguments.cols, plan.group_cols()));
    arguments.num_units = num_groups * plan.row_tiles;
    for (int64_t first_row = 0; first_row < pass.m; first_row += plan.window_rows) {
      arguments.m = std::min(plan.window_rows, pass.m - first_row);
      arguments.x = x + first_row * pass.cols + first_col;
      if (reduces(pass)) arguments.left = static_cast<const uint16_t*>(pass.left) + first_row * left_stride;
      arguments.is_added = first_row > 0;
      const int64_t shares = ceil_div(arguments.num_units, plan.units_per_share);
      with_kernel(pass, plan.ranks, [&](auto kernel) {
        allow_shared_bytes(device, reinterpret_cast<const void*>(kernel), static_cast<int>(device.max_shared_bytes));
        launch_early("adapter_pass_kernel", kernel,
                     LaunchShape{static_cast<unsigned>(shares * plan.num_rank_blocks), kThreads, plan.shared_bytes},
                     device, stream, arguments);
      });
      ProjectionParts projection = {arguments.projection_parts, num_groups, plan.padded_rank, arguments.m};
      projection.scaling = pass.scaling;
      projection.output = static_cast<char*>(pass.output) + first_row * left_stride * size_of(pass.dtype);
      projection.stride = left_stride;
      GradientParts gradient = {};
      if (reduces(pass) && first_row + plan.window_rows >= pass.m) {
        gradient = {arguments.gradient_parts,
                    arguments.cols,
                    static_cast<int>(plan.group_cols()),
                    plan.ranks,
                    plan.num_slots,
                    plan.row_tiles,
                    plan.units_per_share,
                    plan.slots_per_group};
        gradient.target = narrow_of(pass.gradient, pass.rank, pass.cols, first_col);
      }
      finish_parts(projection, gradient, pass.rank, pass.dtype, device, stream);
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
bool is_cut(const AdapterPass& pass, const Device& device) {
  return projects(pass) && reduces(pass) && plan_of(pass, device).window_cols < pass.cols;
}

}  // namespace

int64_t adapter_pass_workspace_size(const AdapterPass& pass, const Device& device) {
  if (is_cut(pass, device)) {
    return std::max(adapter_pass_workspace_size(only_projection(pass), device),
                    adapter_pass_workspace_size(only_gradient(pass), device));
  }
  const Plan plan = plan_of(pass, device);
  return (plan.projection_floats + plan.gradient_floats) * static_cast<int64_t>(sizeof(float));
}

void adapter_pass(const AdapterPass& pass, const Device& device, void* workspace, cudaStream_t stream) {
  if (is_cut(pass, device)) {
    adapter_pass(only_projection(pass), device, workspace, stream);
    adapter_pass(only_gradient(pass), device, workspace, stream);
    return;
  }
  run_pass(pass, device, static_cast<float*>(workspace), stream);
}

}  // namespace qlora
