// y[r, c] = round(code_value[packed[r, c]] * absmax[block]) over a window of the weight, for few multiprocessors.
//
//   tile      2048 values, a warp's: 2048 / w rows of w columns, w the largest power of two up to 2048 that divides the
//             window's columns; tiles are dealt to the warps of all blocks in turn
//   a lane    64 values in a row, which have one scale: it makes a table of its 16 products and looks the codes up
//   codes     by bulk copies into a ring of kStages tiles of the warp's own; scales into registers as long before
//   y         from shared memory by bulk copies, two tiles in turn
//
// A lane's 32 bytes of codes and 128 of y lie side by side in shared memory; in step j of 8 lane l is at word, or 16
// bytes, j ^ l / 4 ^ 2 (l % 4), so that no two lanes of a wavefront meet in a bank.
//
// H100, 2026-11 (the whole of 14336 x 4096, bf16, nested scales): 4 multiprocessors decode 14.9 values a clock each, 16
// of them 14.3. That is 30 bytes of y a clock, and what bounds it: with 2, 4 or all of 8 words decoded by shuffles the
// rate is the same. Budget of a value: 4.6 instructions, of which 3 on the unit of 64 lanes a clock
// (product_table.cuh): 21 a clock; 1 / 27 wavefronts of shared memory (codes 1 of 256 values, y 4 and 4).
#include "cuda/dequantize_sm90.h"
#include "cuda/device/barrier.cuh"
#include "cuda/device/bulk_copy.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/product_table.cuh"
#include "cuda/device/scales.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/dispatch.h"
#include "cuda/weight_arguments.h"
#include "cuda/whole_multiprocessors.h"

namespace qlora {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kTile = kDequantizeFewCols;
constexpr int kLog2LaneValues = 6;
constexpr int kLaneValues = 1 << kLog2LaneValues;
static_assert(32 * kLaneValues == kTile);
constexpr int kUnitValues = 8;  // of 16 bytes of y
constexpr int kCodeBytes = kTile / 2;
constexpr int kValueBytes = kTile * 2;
constexpr int kStages = 4;   // a power of two, a multiple of kBuffers
constexpr int kBuffers = 2;  // of y

struct Shared {
  unsigned char y[kWarps][kBuffers][kValueBytes];
  unsigned char codes[kWarps][kStages][kCodeBytes];
  float nested_code[kNestedBlockSize];
  Barrier full[kWarps][kStages];
};

// Columns and rows of the weight in segments, a lane's values; those of y in units of 16 bytes.
struct Arguments {
  const uint8_t* packed;
  Scales scales;
  int log2_segments_per_block;
  uint4* y;
  uint32_t num_tiles;
  uint32_t tiles_per_row;
  uint32_t first_segment;
  uint32_t row_segments;  // from a row of the weight to the next
  uint32_t row_units;     // from a row of y to the next
  // Of tiles of several rows.
  uint32_t rows;
  uint32_t log2_tile_segments;  // of a row
};

#if __CUDA_ARCH__ >= 900

constexpr int kLaneWords = kLaneValues / 8;

// A tile: its number, its column in tiles, where it begins.
struct Place {
  uint32_t tile;
  uint32_t col;
  uint32_t segment;
  uint32_t unit;

  __device__ __forceinline__ void advance(const Place& by, uint32_t tiles_per_row, const Place& to_next_row) {
    tile += by.tile;
    col += by.col;
    segment += by.segment;
    unit += by.unit;
    if (col >= tiles_per_row) {
      col -= tiles_per_row;
      segment += to_next_row.segment;
      unit += to_next_row.unit;
    }
  }
};

// What of a lane's scale is in memory, on its way.
struct Asked {
  float absmax;  // or that of the nested block
  uint32_t code;
};

#endif

// kIsOneRow: of each tile.
template <typename T, Format F, bool kIsNested, bool kIsOneRow>
__global__ __launch_bounds__(kThreads, 1) void dequantize_sm90_kernel(const __grid_constant__ Arguments arguments) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared_memory[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t warp = threadIdx.x / 32;
  Barrier* const full = shared.full[warp];
  if (lane < kStages) init_barrier(full[lane], 1);
  publish_barriers();
  float nested_offset = 0.0f;
  if constexpr (kIsNested) {
    if (threadIdx.x < kNestedBlockSize) {
      shared.nested_code[threadIdx.x] = __ldg(arguments.scales.nested_code + threadIdx.x);
    }
    nested_offset = __ldg(arguments.scales.nested_offset);
  }
  __syncthreads();

  const uint32_t log2_segments = kIsOneRow ? 5 : arguments.log2_tile_segments;
  const uint32_t tile_segments = 1 << log2_segments;
  const uint32_t tile_rows = 32 >> log2_segments;
  const uint32_t row_segments = arguments.row_segments;
  const uint32_t lane_segment =
      kIsOneRow ? lane : (lane >> log2_segments) * row_segments + (lane & (tile_segments - 1));
  const uint32_t y_of_warp = shared_address(shared.y[warp]);
  const uint32_t codes_of_warp = shared_address(shared.codes[warp]);
  const uint32_t turn = lane / 4 ^ lane % 4 * 2;
  uint32_t word_addresses[kLaneWords];  // of a lane's codes in stage 0
  uint32_t unit_addresses[kLaneWords];  // and of what they become
#pragma unroll
  for (int j = 0; j < kLaneWords; ++j) {
    word_addresses[j] = keep(codes_of_warp + lane * (kLaneValues / 2) + (j ^ turn) * 4);
    unit_addresses[j] = keep(y_of_warp + lane * (kLaneValues * 2) + (j ^ turn) * 16);
  }

  const auto rows_of = [&](const Place& place) {
    return kIsOneRow ? 1 : min(tile_rows, arguments.rows - place.tile / arguments.tiles_per_row * tile_rows);
  };
  // The codes of a tile, row by row, by lane 0, and each lane's scale.
  const auto ask_for = [&](const Place& place, int stage, Asked& asked) {
    if (place.tile >= arguments.num_tiles) return;
    const uint32_t rows = rows_of(place);
    if (lane == 0) {
      const uint32_t bytes = tile_segments * (kLaneValues / 2);
      const uint8_t* from = arguments.packed + uint64_t{place.segment} * (kLaneValues / 2);
      uint32_t to = codes_of_warp + stage * kCodeBytes;
      arrive_expecting(full[stage], rows * bytes);
      copy_bulk(to, from, bytes, full[stage]);
#pragma unroll 1
      for (uint32_t row = 1; row < rows; ++row) {
        to += bytes;
        from += uint64_t{row_segments} * (kLaneValues / 2);
        copy_bulk(to, from, bytes, full[stage]);
      }
    }
    if (kIsOneRow || lane >> log2_segments < rows) {
      const uint32_t block = (place.segment + lane_segment) >> arguments.log2_segments_per_block;
      if constexpr (kIsNested) {
        asked.code = __ldg(arguments.scales.codes + block);
        asked.absmax = __ldg(arguments.scales.nested_absmax + block / kNestedBlockSize);
      } else {
        asked.absmax = __ldg(arguments.scales.absmax + block);
      }
    }
  };
  const auto store = [&](const Place& place, uint32_t from) {
    const uint32_t rows = rows_of(place);
    const uint32_t bytes = tile_segments * (kLaneValues * 2);
    uint4* to = arguments.y + place.unit;
    store_bulk(to, from, bytes);
#pragma unroll 1
    for (uint32_t row = 1; row < rows; ++row) {
      to += arguments.row_units;
      from += bytes;
      store_bulk(to, from, bytes);
    }
    commit_bulk_stores();
  };

  const uint32_t tiles_per_row = arguments.tiles_per_row;
  const uint32_t tile_units = tile_segments * (kLaneValues / kUnitValues);
  const auto place_of = [&](uint32_t tile) {
    const uint32_t row = tile / tiles_per_row * tile_rows;
    const uint32_t col = tile % tiles_per_row;
    return Place{tile, col, row * row_segments + col * tile_segments, row * arguments.row_units + col * tile_units};
  };
  const Place step = place_of(gridDim.x * kWarps);
  const Place to_next_row = {0, 0, tile_rows * row_segments - tiles_per_row * tile_segments,
                             tile_rows * arguments.row_units - tiles_per_row * tile_units};
  Place next = place_of(blockIdx.x + gridDim.x * warp);
  next.segment += arguments.first_segment;
  Place places[kStages];
  Asked asked[kStages] = {};
#pragma unroll
  for (int stage = 0; stage < kStages; ++stage) {
    places[stage] = next;
    ask_for(next, stage, asked[stage]);
    next.advance(step, tiles_per_row, to_next_row);
  }
  for (uint32_t parity = 0;; parity ^= 1) {
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      if (places[stage].tile >= arguments.num_tiles) {
        if (lane == 0) wait_for_bulk_reads<0>();
        return;
      }
      float scale = asked[stage].absmax;
      if constexpr (kIsNested) {
        scale = __fadd_rn(__fmul_rn(shared.nested_code[asked[stage].code], scale), nested_offset);
      }
      const ProductTable<T, F> table(scale);
      const uint32_t buffer = stage % kBuffers * kValueBytes;
      if (lane == 0) wait_for_bulk_reads<kBuffers - 1>();
      __syncwarp();
      wait(full[stage], parity);
      uint32_t words[kLaneWords];
#pragma unroll
      for (int j = 0; j < kLaneWords; ++j) words[j] = load_shared_word(word_addresses[j] + stage * kCodeBytes);
#pragma unroll
      for (int j = 0; j < kLaneWords; ++j) {
        uint32_t pairs[4];
        table.look_up(words[j], pairs);
        store_shared_16_bytes(unit_addresses[j] + buffer, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
      }
      publish_to_bulk_stores();
      __syncwarp();
      if (lane == 0) store(places[stage], y_of_warp + buffer);
      places[stage] = next;
      ask_for(next, stage, asked[stage]);
      next.advance(step, tiles_per_row, to_next_row);
    }
  }
#endif
}

// The largest power of two up to 32 that divides `segments`.
uint32_t log2_tile_segments(int64_t segments) {
  uint32_t log2 = 0;
  while (log2 < 5 && segments % (int64_t{2} << log2) == 0) ++log2;
  return log2;
}

}  // namespace

bool has_dequantize_sm90(const qlora_weight_4bit& weight, qlora_dtype dtype, const Device& device) {
  constexpr int64_t kMaxIndex = int64_t{1} << 31;
  if (dtype == QLORA_FLOAT32 || device.major < 9) return false;
  if (device.max_shared_bytes < static_cast<int64_t>(sizeof(Shared))) return false;
  if (weight.block_size < kLaneValues || num_values(weight) / kLaneValues >= kMaxIndex) return false;
  const auto kernel = dequantize_sm90_kernel<__nv_bfloat16, Format::kNF4, true, true>;
  return is_compiled_for_sm90(device, reinterpret_cast<const void*>(kernel));
}

bool supports_dequantize_sm90(const qlora_weight_4bit& weight, const DequantizeFew& window, const Device& device) {
  constexpr int64_t kMaxUnits = int64_t{1} << 31;
  if (!is_aligned(weight.packed, 16) || !is_aligned(window.y, 16)) return false;
  for (const int64_t length : {window.first, window.cols, window.row_stride}) {
    if (length % kLaneValues != 0) return false;  // Lanes begin with a block, or a half, and copies at 16 bytes.
  }
  if (window.leading_dimension % kUnitValues != 0) return false;
  if ((window.rows + kTile / kLaneValues) * window.leading_dimension / kUnitValues >= kMaxUnits) return false;
  return has_dequantize_sm90(weight, window.dtype, device);
}

void dequantize_sm90(const qlora_weight_4bit& weight, const DequantizeFew& window, const Device& device,
                     cudaStream_t stream) {
  Arguments arguments = {};
  arguments.packed = weight.packed;
  arguments.scales = scales_of(weight);
  arguments.log2_segments_per_block = arguments.scales.log2_block_size - kLog2LaneValues;
  arguments.y = static_cast<uint4*>(window.y);
  const uint32_t log2_segments = log2_tile_segments(window.cols / kLaneValues);
  arguments.tiles_per_row = static_cast<uint32_t>(window.cols / kLaneValues >> log2_segments);
  arguments.num_tiles = static_cast<uint32_t>(ceil_div(window.rows, 32 >> log2_segments)) * arguments.tiles_per_row;
  arguments.first_segment = static_cast<uint32_t>(window.first / kLaneValues);
  arguments.row_segments = static_cast<uint32_t>(window.row_stride / kLaneValues);
  arguments.row_units = static_cast<uint32_t>(window.leading_dimension / kUnitValues);
  arguments.rows = static_cast<uint32_t>(window.rows);
  arguments.log2_tile_segments = log2_segments;
  dispatch_dtype(window.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      dispatch_format(weight.format, [&](auto format) {
        dispatch_bool(is_nested(weight), [&](auto nested) {
          dispatch_bool(log2_segments == 5, [&](auto one_row) {
            launch_on_few(
                "dequantize_sm90_kernel",
                dequantize_sm90_kernel<T, decltype(format)::value, decltype(nested)::value, decltype(one_row)::value>,
                window.multiprocessors, kThreads, static_cast<int>(sizeof(Shared)), device, stream, arguments);
          });
        });
      });
    }
  });
}

}  // namespace qlora
