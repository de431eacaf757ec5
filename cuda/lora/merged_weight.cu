// y = W + scaling B A over a window of W, 16 bits, rounded once: a weight with its adapter, for one product's length.
//
//   block     16 warps, 1 << log2_groups of them side by side at 64 columns each, the others below these, 32 or 64 rows
//             each. The blocks share out all tiles evenly, in the order of the rows, then of the columns
//   a warp    A^T of its columns is the left operand, in registers for up to 32 ranks and for 49 to 64, else read for
//             each tile; B of 8 rows the right one. A is dealt such that a lane's sums are 8 neighbouring columns of
//             two rows: 8 lanes store a line, and read a sector of codes
//   codes     of the next tile on their way in registers, B of the next two in a ring of shared memory, scales as they
//             are read while one tile is multiplied, decoded and handed out in shared memory while the next is
//   values    pairs from a table in shared memory, scaled in fp32 and added to
//
// It costs the multiplications of n k rank, whatever the rows of the input, and no reading or writing beside those of
// dequantising W, where the update of an output costs a reading and a writing of it. W + scaling B A is rounded where W
// would be.
//
// Budget of a value at rank 16: 6.9 instructions, of which 4.9 from the sums to the store; 1 / 17 wavefronts of shared
// memory and stores (of 256 values: pairs 8, y 4, codes 1, B 1, scales 1). So 17 values a clock and multiprocessor at
// best; the stores allow 15 (dequantize_sm90.cu).
#include <algorithm>
#include <cstdint>

#include "cuda/device/barrier.cuh"
#include "cuda/device/copy_async.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/dispatch.h"
#include "cuda/launch.h"
#include "cuda/lora/lora.h"
#include "cuda/lora/merged_weight.cuh"
#include "cuda/remember.h"
#include "cuda/weight_arguments.h"
#include "cuda/whole_multiprocessors.h"

namespace qlora {
namespace {

using namespace merged;

constexpr int kTableAlignment = 1 << 16;
constexpr int kScaleBuffers = 3;
// Of B: one more where warps may be a tile apart, but a ring of large ranks has no room for it.
__host__ __device__ constexpr int right_buffers(int steps) { return steps > 0 ? 4 : 3; }

// In front of the table, or of what is in front of it.
template <int kWarpRows>
struct BlockShared {
  static constexpr int kScaleStride = kWarpRows + 2;  // such that writers of 16 warps and 2 rows meet in no bank
  float scales[kScaleBuffers][kWarps * kScaleStride];
  float nested_code[kNestedBlockSize];
  alignas(16) Barrier ready;
};

// A tile: its columns in blocks' widths, its rows in tiles.
struct Place {
  int col;
  int row;

  __device__ __forceinline__ void advance(int row_tiles) {
    if (++row == row_tiles) {
      row = 0;
      ++col;
    }
  }
};

// Between tiles: a warp arrives when it has handed out what the next tile needs, and waits before it takes that, so
// that warps are up to a tile apart. Not kIsSplit, or on GPUs without such a wait: it waits for all at once.
template <bool kIsSplit>
class TileBarrier {
 public:
  __device__ __forceinline__ explicit TileBarrier(Barrier& barrier) : barrier_(barrier) {
    if (threadIdx.x == 0) init_barrier(barrier, kWarps);
  }
#if __CUDA_ARCH__ >= 900
  static constexpr bool kWaitsSplit = kIsSplit;
#else
  static constexpr bool kWaitsSplit = false;
#endif
  __device__ __forceinline__ void arrive() const {
    if constexpr (kWaitsSplit) {
      __syncwarp();
      if (threadIdx.x % 32 == 0) qlora::arrive(barrier_);
    }
  }
  __device__ __forceinline__ void wait(uint32_t parity) const {
    if constexpr (kWaitsSplit) {
      qlora::wait(barrier_, parity);
    } else {
      __syncthreads();
    }
  }

 private:
  Barrier& barrier_;
};

// FloatPairTable's, without the shuffles of its own filling: the compiler takes them for divergent, and pays for that
// at each access to memory from there on.
__device__ __forceinline__ void fill_table(unsigned char* table, const CodeValues& values) {
  auto* const pairs = reinterpret_cast<float2*>(table) + threadIdx.x % 32;
#pragma unroll 4
  for (int i = 0; i < 256 / kWarps; ++i) {
    const int entry = i * kWarps + static_cast<int>(threadIdx.x) / 32;
    pairs[entry * 32] = make_float2(values.of_code[entry / kNumCodes], values.of_code[entry % kNumCodes]);
  }
}

// kSteps: of 16 ranks, whose left operand stays in registers; 0: any number, read for each tile.
template <typename T, bool kIsNested, int kSteps>
__global__ __launch_bounds__(kThreads, 1) void merged_weight_kernel(const __grid_constant__ Arguments arguments,
                                                                    T* __restrict__ y) {
  constexpr int kWarpRows = warp_rows(kSteps);
  constexpr int kRowSteps = kWarpRows / 8;  // the right operand's columns are 8 rows
  constexpr int kRightBuffers = right_buffers(kSteps);
  constexpr int kScales = kWarps * kWarpRows / kThreads;  // of a tile, a thread's
  using Shared = BlockShared<kWarpRows>;
  extern __shared__ __align__(128) unsigned char shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  const uint32_t base = shared_address(shared_memory);
  const uint32_t table_address = (base + sizeof(Shared) + kTableAlignment - 1) / kTableAlignment * kTableAlignment;
  unsigned char* const table_memory = shared_memory + (table_address - base);
  const uint32_t right = table_address + arguments.right_offset;
  fill_table(table_memory, arguments.codes);
  const FloatPairTable table(table_memory);
  const int log2_groups = arguments.log2_groups;
  const int tile_rows = kWarps * kWarpRows >> log2_groups;
  const int right_tile_bytes = tile_rows * arguments.right_bytes;
  for (int i = threadIdx.x * 16; i < kRightBuffers * right_tile_bytes; i += kThreads * 16) {
    store_shared_16_bytes(right + i, make_uint4(0, 0, 0, 0));
  }
  const TileBarrier<(kSteps > 0)> barrier(shared.ready);
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
  float nested_offset = 0.0f;
  if constexpr (kIsNested) {
    if (threadIdx.x < kNestedBlockSize) {
      shared.nested_code[threadIdx.x] = __ldg(arguments.scales.nested_code + threadIdx.x);
    }
    nested_offset = __ldg(arguments.scales.nested_offset);
  }
  __syncthreads();

  const int tiles_each = arguments.num_tiles / static_cast<int>(gridDim.x);
  const int tiles_over = arguments.num_tiles % static_cast<int>(gridDim.x);
  const int block = blockIdx.x;
  int tiles_left = tiles_each + (block < tiles_over ? 1 : 0);
  const int begin = block * tiles_each + min(block, tiles_over);
  const Place first = {begin / arguments.row_tiles, begin % arguments.row_tiles};

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int warp_group = warp & ((1 << log2_groups) - 1);
  const int warp_row = (warp >> log2_groups) * kWarpRows;
  const int lane_row = warp_row + lane % 4 * kPairedRows;
  const int lane_col = lane / 4 * kLaneCols;
  const int last_group = arguments.num_groups - 1;

  // A thread's scales: number i of a tile is of row i >> log2_groups and of the group of columns that is the rest.
  const auto scale_row_of = [&](int j) { return (static_cast<int>(threadIdx.x) + j * kThreads) >> log2_groups; };
  const int scale_group = static_cast<int>(threadIdx.x) & ((1 << log2_groups) - 1);
  int scale_at[kScales];
  float absmax[kScales] = {};
  uint32_t scale_codes[kScales] = {};
#pragma unroll
  for (int j = 0; j < kScales; ++j) {
    const int row = scale_row_of(j);
    scale_at[j] = ((row / kWarpRows << log2_groups) + scale_group) * Shared::kScaleStride + row % kWarpRows;
  }
  const auto ask_for_scales = [&](const Place& at) {
    const int group = min((at.col << log2_groups) + scale_group, last_group);
#pragma unroll
    for (int j = 0; j < kScales; ++j) {
      const int row = min(at.row * tile_rows + scale_row_of(j), arguments.rows - 1);
      const uint32_t scale_block =
          (arguments.first_group + row * arguments.row_groups + group) >> arguments.log2_groups_per_scale;
      if constexpr (kIsNested) {
        scale_codes[j] = __ldg(arguments.scales.codes + scale_block);
        absmax[j] = __ldg(arguments.scales.nested_absmax + scale_block / kNestedBlockSize);
      } else {
        absmax[j] = __ldg(arguments.scales.absmax + scale_block);
      }
    }
  };
  const auto hand_out_scales = [&](int buffer) {
#pragma unroll
    for (int j = 0; j < kScales; ++j) {
      float scale = absmax[j];
      if constexpr (kIsNested) {
        scale = __fadd_rn(__fmul_rn(shared.nested_code[scale_codes[j]], absmax[j]), nested_offset);
      }
      shared.scales[buffer][scale_at[j]] = scale;
    }
  };
  // Codes of row `row` of a step, of those from `codes` on of which the last one is `last`.
  const auto codes_of = [&](const Place& at) {
    const int row = at.row * tile_rows + lane_row;
    const int group = min((at.col << log2_groups) + warp_group, last_group);
    return arguments.packed + row * int64_t{arguments.row_groups * (kWarpCols / 2)} +
           (group * kWarpCols + lane_col) / 2;
  };
  const auto last_row_of = [&](const Place& at) { return arguments.rows - 1 - (at.row * tile_rows + lane_row); };
  const auto load_codes = [&](const uint8_t* codes, int row, int last) {
    const int offset = min(row, last);  // Not below 0 but where the tile's first row is not there.
    return load_4_bytes_once(codes + offset * int64_t{static_cast<int>(arguments.row_groups) * (kWarpCols / 2)});
  };

  // What is asked for: scales and B two tiles ahead, codes one.
  if (tiles_left <= 0) return;
  Place place = first;
  Place next = first;
  next.advance(arguments.row_tiles);
  uint32_t words[kRowSteps][kPairedRows];
#pragma unroll
  for (int step = 0; step < kRowSteps; ++step) {
#pragma unroll
    for (int p = 0; p < kPairedRows; ++p) {
      words[step][p] = load_codes(codes_of(place), step * 8 + p, last_row_of(place));
    }
  }
  ask_for_scales(place);
#pragma unroll 1
  for (int ahead = 0; ahead < 2; ++ahead) {
    const Place& at = ahead == 0 ? place : next;
    if (ahead < tiles_left) load_right<T>(arguments, at.row * tile_rows, tile_rows, right + ahead * right_tile_bytes);
    commit_copies();
  }
  hand_out_scales(0);
  wait_for_copies<1>();
  barrier.arrive();
  if (tiles_left > 1) ask_for_scales(next);

  uint32_t left[kSteps == 0 ? 1 : kSteps][kColSteps][4];
  int left_col = -1;
  int scale_buffer = 0;
  int right_buffer = 0;
  const bool is_b_float = arguments.b_dtype == QLORA_FLOAT32;
  for (uint32_t parity = 0; tiles_left > 0; --tiles_left, parity ^= 1) {
    barrier.wait(parity);  // What this tile needs is there, and nobody reads what that before the last one needed.
    Place after = next;
    after.advance(arguments.row_tiles);
    wait_for_copies<0>();
    const int next_scale_buffer = scale_buffer == kScaleBuffers - 1 ? 0 : scale_buffer + 1;
    if (tiles_left > 1) hand_out_scales(next_scale_buffer);
    barrier.arrive();
    if (tiles_left > 2) {
      ask_for_scales(after);
      const int buffer = (right_buffer + 2) % kRightBuffers;
      load_right<T>(arguments, after.row * tile_rows, tile_rows, right + buffer * right_tile_bytes);
    }
    commit_copies();

    const Place next_codes_at = tiles_left > 1 ? next : place;
    const uint8_t* const next_codes = keep(codes_of(next_codes_at));
    const int next_last = last_row_of(next_codes_at);
    const int group = (place.col << log2_groups) + warp_group;
    const bool has_columns = group <= last_group;
    const int col = group * kWarpCols + lane_col;
    if (kSteps > 0 && place.col != left_col && has_columns) {
      left_col = place.col;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_left<T>(arguments, col, step * 16, left[step]);
    }
    const uint32_t scales =
        shared_address(&shared.scales[scale_buffer][warp * Shared::kScaleStride + lane % 4 * kPairedRows]);
    const uint32_t right_row = right + right_buffer * right_tile_bytes + (warp_row + lane / 4) * arguments.right_bytes;
    const int last = has_columns ? last_row_of(place) : -1;
    char* const out =
        reinterpret_cast<char*>(y + col) + (place.row * tile_rows + lane_row) * int64_t{arguments.y_row_bytes};
    const auto finish = [&](int step, const float2& scales_of_rows, const float (&sums)[kColSteps][4]) {
#pragma unroll
      for (int p = 0; p < kPairedRows; ++p) {
        const float scale = p == 0 ? scales_of_rows.x : scales_of_rows.y;
        float values[kLaneCols];
#pragma unroll
        for (int c = 0; c < kColSteps; ++c) {
          const float2 decoded = table.floats(words[step][p], table_selector(c));
          values[2 * c] = fmaf(arguments.scaling, sums[c][p], __fmul_rn(decoded.x, scale));
          values[2 * c + 1] = fmaf(arguments.scaling, sums[c][2 + p], __fmul_rn(decoded.y, scale));
        }
        const int row = step * 8 + p;
        store_16_bytes_if(row <= last, reinterpret_cast<T*>(out + row * int64_t{arguments.y_row_bytes}), values);
        words[step][p] = load_codes(next_codes, row, next_last);
      }
    };
    const auto load_scales = [&](int step) { return load_shared_two_floats(scales + step * 8 * sizeof(float)); };
    const auto merge = [&](auto* right_typed) {
      using Right = std::remove_pointer_t<decltype(right_typed)>;
      constexpr int kRightBytes = static_cast<int>(sizeof(Right));
      const uint32_t right_lane = right_row + lane % 4 * 2 * kRightBytes;
      const auto load_pairs_of_right = [&](int row_step, int step, uint32_t (&pairs)[2]) {
        const uint32_t from = right_lane + row_step * 8 * arguments.right_bytes + step * 16 * kRightBytes;
        pairs[0] = load_right_pair<T, Right>(from);
        pairs[1] = load_right_pair<T, Right>(from + 8 * kRightBytes);
      };
      if constexpr (kSteps > 0) {
        uint32_t pairs[kSteps][2];
        float2 scales_of_rows = load_scales(0);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) load_pairs_of_right(0, step, pairs[step]);
#pragma unroll
        for (int row_step = 0; row_step < kRowSteps; ++row_step) {
          float sums[kColSteps][4] = {};
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
#pragma unroll
            for (int c = 0; c < kColSteps; ++c) multiply_add<T>(sums[c], left[step][c], pairs[step][0], pairs[step][1]);
          }
          const float2 scales_of_these = scales_of_rows;
          if (row_step + 1 < kRowSteps) {
            scales_of_rows = load_scales(row_step + 1);
#pragma unroll
            for (int step = 0; step < kSteps; ++step) load_pairs_of_right(row_step + 1, step, pairs[step]);
          }
          finish(row_step, scales_of_these, sums);
        }
      } else {
        float sums[kRowSteps][kColSteps][4] = {};
        for (int step = 0; step < arguments.padded_rank / 16 && has_columns; ++step) {
          load_left<T>(arguments, col, step * 16, left[0]);
#pragma unroll
          for (int row_step = 0; row_step < kRowSteps; ++row_step) {
            uint32_t pairs[2];
            load_pairs_of_right(row_step, step, pairs);
#pragma unroll
            for (int c = 0; c < kColSteps; ++c) multiply_add<T>(sums[row_step][c], left[0][c], pairs[0], pairs[1]);
          }
        }
#pragma unroll
        for (int row_step = 0; row_step < kRowSteps; ++row_step)
          finish(row_step, load_scales(row_step), sums[row_step]);
      }
    };
    if (is_b_float) {
      merge(static_cast<float*>(nullptr));
    } else {
      merge(static_cast<T*>(nullptr));
    }
    place = next;
    next = after;
    scale_buffer = next_scale_buffer;
    right_buffer = right_buffer == kRightBuffers - 1 ? 0 : right_buffer + 1;
  }
}

// Bytes of a row of B in shared memory, such that the loads of an operand meet in no bank.
int right_bytes(int padded_rank, qlora_dtype dtype) {
  return dtype == QLORA_FLOAT32 ? padded_rank * 4 + 32 : padded_rank * 2 + 16;
}

// Where the ring of B lies and what a block needs: in front of the table if it fits.
struct Layout {
  int log2_groups;
  int right_offset;
  int shared_bytes;
};
Layout layout_of(int64_t cols, int steps, int row_bytes, const Device& device) {
  const int reserved = static_cast<int>(device.reserved_shared_bytes);
  const int in_front = kTableAlignment - reserved - static_cast<int>(sizeof(BlockShared<64>));
  for (int log2_groups = 2;; ++log2_groups) {
    const int ring = right_buffers(steps) * (kWarps * warp_rows(steps) >> log2_groups) * row_bytes;
    const bool is_in_front = ring <= in_front;
    const int bytes = kTableAlignment - reserved + FloatPairTable::kBytes + (is_in_front ? 0 : ring);
    const bool is_wide_enough = int64_t{kWarpCols} << log2_groups >= cols;
    const bool is_widest = 1 << log2_groups == kWarps;
    if (is_widest || (is_wide_enough && bytes <= device.max_shared_bytes)) {
      return {log2_groups, is_in_front ? -in_front : FloatPairTable::kBytes, bytes};
    }
  }
}

// kSteps of merged_weight_kernel.
int steps_of(int padded_rank) {
  const int steps = padded_rank / 16;
  return steps == 1 || steps == 2 || steps == 4 ? steps : 0;
}

template <typename T, bool kIsNested, int kSteps>
void launch_merged(const Arguments& arguments, T* y, int shared_bytes, int multiprocessors, const Device& device,
                   cudaStream_t stream) {
  constexpr const char* kName = "merged_weight_kernel";
  const auto kernel = merged_weight_kernel<T, kIsNested, kSteps>;
  if (multiprocessors > 0) {
    launch_on_few(kName, kernel, multiprocessors, kThreads, shared_bytes, device, stream, arguments, y);
    return;
  }
  allow_shared_bytes(device, reinterpret_cast<const void*>(kernel), shared_bytes);
  const int blocks = std::min(arguments.num_tiles, device.num_multiprocessors);
  launch_early(kName, kernel, LaunchShape{static_cast<unsigned>(blocks), kThreads, shared_bytes}, device, stream,
               arguments, y);
}

}  // namespace

bool supports_merged_weight(const qlora_weight_4bit& weight, int64_t rank, qlora_dtype dtype, const Device& device) {
  const int padded_rank = static_cast<int>(round_up(rank, 16));
  return is_narrow_fast(dtype, device) && weight.cols % kWarpCols == 0 && weight.block_size >= kWarpCols &&
         is_aligned(weight.packed, 8) && weight.rows < 1 << 30 && weight.cols < 1 << 30 &&
         num_values(weight) / kWarpCols < int64_t{1} << 31 &&
         layout_of(weight.cols, steps_of(padded_rank), right_bytes(padded_rank, QLORA_FLOAT32), device).shared_bytes <=
             device.max_shared_bytes;
}

void merged_weight(const qlora_weight_4bit& weight, const qlora_lora& lora, const Window& window, void* y,
                   int64_t leading_dimension, qlora_dtype dtype, int multiprocessors, const Device& device,
                   cudaStream_t stream) {
  Arguments arguments = {};
  const int64_t first = window.row_begin * weight.cols + window.col_begin;
  arguments.packed = weight.packed + first / 2;
  arguments.scales = scales_of(weight);
  arguments.codes = FloatPairTable::values(static_cast<Format>(weight.format));
  arguments.log2_groups_per_scale = arguments.scales.log2_block_size - log2_of(kWarpCols);
  arguments.first_group = static_cast<uint32_t>(first / kWarpCols);
  arguments.row_groups = static_cast<uint32_t>(weight.cols / kWarpCols);
  arguments.row_length = weight.cols;
  arguments.rows = static_cast<int>(window.row_end - window.row_begin);
  const int64_t cols = window.col_end - window.col_begin;
  if (arguments.rows <= 0 || cols <= 0) return;
  arguments.num_groups = static_cast<int>(cols / kWarpCols);
  arguments.a = static_cast<const char*>(lora.a) + window.col_begin * size_of(lora.a_dtype);
  arguments.a_dtype = lora.a_dtype;
  arguments.are_eights_of_a_whole = is_aligned(lora.a, 16);
  const int64_t b_row_bytes = lora.rank * size_of(lora.b_dtype);
  arguments.b = static_cast<const char*>(lora.b) + window.row_begin * b_row_bytes;
  arguments.b_dtype = lora.b_dtype;
  arguments.log2_b_pieces = log2_of(ceil_div(b_row_bytes, 16));
  arguments.is_b_copied = (lora.b_dtype == QLORA_FLOAT32 || lora.b_dtype == dtype) && is_aligned(lora.b, 16) &&
                          b_row_bytes == int64_t{16} << arguments.log2_b_pieces;
  arguments.rank = static_cast<int>(lora.rank);
  arguments.padded_rank = static_cast<int>(round_up(lora.rank, 16));
  arguments.scaling = lora.scaling;
  arguments.right_bytes = right_bytes(arguments.padded_rank, lora.b_dtype);
  const int steps = steps_of(arguments.padded_rank);
  const Layout layout = layout_of(cols, steps, arguments.right_bytes, device);
  arguments.log2_groups = layout.log2_groups;
  arguments.right_offset = layout.right_offset;
  arguments.row_tiles = static_cast<int>(ceil_div(arguments.rows, kWarps * warp_rows(steps) >> layout.log2_groups));
  arguments.num_tiles = arguments.row_tiles * static_cast<int>(ceil_div(cols, kWarpCols << layout.log2_groups));
  arguments.y_row_bytes = static_cast<uint32_t>(leading_dimension * 2);
  dispatch_dtype(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      dispatch_bool(is_nested(weight), [&](auto nested) {
        dispatch_constant<0, 1, 2, 4>("merged_weight", steps, [&](auto constant) {
          launch_merged<T, decltype(nested)::value, decltype(constant)::value>(
              arguments, static_cast<T*>(y), layout.shared_bytes, multiprocessors, device, stream);
        });
      });
    }
  });
}

}  // namespace qlora
