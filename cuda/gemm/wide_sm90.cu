// y = x W^T + bias for up to 256 rows of x on Hopper's wgmma: the weight is read once from HBM and decoded once, to the
// registers from which the tensor cores take it.
//
//   block     a tile of 128 rows of W against all rows of x, over a part of k. Warpgroup 0 copies,
//             pairs of warpgroups multiply: 64 rows of W each, and of two pairs each every second block of 64 columns.
//   x         kTokens columns of the product, through a ring of stages of 64 values of k; the blocks of a cluster, which
//             have neighbouring tiles, copy a half each to both
//   W         through a ring of stages of 128 x 256; the warps that copy its scales decode them
//   decode    lane i of a quad owns byte i of every 32-bit word, as the operand's layout and the order of x ask
//   scale     the table's pair as it is: the products of 64 columns of W are summed from zero and then scaled, in fp32
//   parts     where tiles are fewer than multiprocessors k is split: fp32 parts in the workspace, added in their order
//
// Rounding: see PairTable; fp32 sums; y.
#include <algorithm>
#include <array>
#include <cstdint>

#include "core/status.h"
#include "cuda/device/barrier.cuh"
#include "cuda/device/copy_async.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/device/tensor_copy.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/dispatch.h"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/split.h"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

constexpr int kWarpgroup = 128;  // threads
constexpr int kTileRows = 128;   // of W: two warpgroups
constexpr int kBlockCols = 64;   // of W, with one scale a row
constexpr int kStepBlocks = 4;   // of a stage of W: 128 bytes of a row
constexpr int kStepCols = kBlockCols * kStepBlocks;
constexpr int kStepBytes = kStepCols / 2;
constexpr int kMaxTokens = 256;
constexpr int kWeightStages = 3;
constexpr int kMaxXStages = 8;
[[maybe_unused]] constexpr int kScaleThreads = 64;  // that copy scales of W

template <typename T, int kTokens>
struct Config {
  static constexpr int kPairs = kTokens <= 32 ? 2 : 1;  // of warpgroups that multiply
  static constexpr int kConsumers = 2 * kPairs * kWarpgroup;
  static constexpr int kThreads = kWarpgroup + kConsumers;
  static constexpr int kCluster = kTokens >= 64 ? 2 : 1;
  static constexpr int kXStages = kTokens == 256 ? 3 : kTokens == 128 ? 6 : kMaxXStages;
  static constexpr int kXStageBytes = kTokens * kBlockCols * 2;
  static constexpr int kCols = kTokens < 128 ? kTokens : 128;  // of a product
  static constexpr int kHalves = kTokens / kCols;
  static constexpr int kBuffers = kHalves == 1 ? 2 : 1;  // of fragments; with 2 the next block is decoded ahead
  static constexpr int kExchangeBytes = (kPairs - 1) * kTileRows * kTokens * 4;
  // Registers of a thread that copies and of one that multiplies: together those of the launch.
  static constexpr int kCopyRegisters = kPairs == 2 ? 64 : 56;
  static constexpr int kRegisters = kPairs == 2 ? 104 : 224;
};

struct Arguments {
  const uint8_t* packed;
  Scales scales;
  float table_scale_inverse;  // of PairTable
  const void* x;
  const void* bias;
  void* y;
  float* parts;  // null: y is written
  int num_parts;
  int m;
  int n;
  int k;
  bool is_weight_aligned;   // packed to 16 bytes
  bool is_x_aligned;        // to 16 bytes
  bool are_scales_aligned;  // the 4 scales of a stage's row are 4 or 16 aligned bytes in one nested block
};

struct WeightStage {
  unsigned char bytes[kTileRows][kStepBytes];  // the 16-byte piece p of row r at place p ^ r % 8
  float scales[kTileRows][kStepBlocks];
};

constexpr int kWeightStageBytes = sizeof(WeightStage);

// Shared memory: this, the pair table at the first multiple of 64 KiB, the stages of x, the exchange of pairs' sums.
struct Shared {
  WeightStage weight[kWeightStages];
  float nested_code[256];
  Barrier weight_full[kWeightStages];
  Barrier weight_empty[kWeightStages];
  Barrier x_full[kMaxXStages];
  Barrier x_empty[kMaxXStages];
};
constexpr int kTableAlignment = PairTable<__half>::kBytes;
constexpr int kReservedBytes = 1024;  // that CUDA puts before a block's shared memory
static_assert(sizeof(Shared) + kReservedBytes <= kTableAlignment);

template <typename Config>
constexpr int kSharedBytes =
    2 * kTableAlignment - kReservedBytes + Config::kXStages * Config::kXStageBytes + Config::kExchangeBytes;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ int num_steps(const Arguments& arguments) {
  return (arguments.k + kStepCols - 1) / kStepCols;
}

// A cluster's share of the work: items from its index on, dealt in turn; an item is a group of tiles and a part of k.
template <int kCluster>
struct Items {
  int num_groups;
  int count;

  __device__ __forceinline__ explicit Items(const Arguments& arguments)
      : num_groups((arguments.n + kTileRows * kCluster - 1) / (kTileRows * kCluster)),
        count(num_groups * arguments.num_parts) {}
  static __device__ __forceinline__ int first() { return blockIdx.x / kCluster; }
  static __device__ __forceinline__ int stride() { return gridDim.x / kCluster; }
};

template <int kCluster>
struct Item {
  int first_row;
  int part;
  int step_begin;
  int step_end;

  __device__ __forceinline__ Item(const Arguments& arguments, const Items<kCluster>& items, int index) {
    // Neighbouring tiles at once: their rows share pages of memory.
    first_row = (index % items.num_groups * kCluster + static_cast<int>(blockIdx.x) % kCluster) * kTileRows;
    part = index / items.num_groups;
    step_begin = static_cast<int>(int64_t{num_steps(arguments)} * part / arguments.num_parts);
    step_end = static_cast<int>(int64_t{num_steps(arguments)} * (part + 1) / arguments.num_parts);
  }
};

// A row's 4 scales of a step, on their way: load asks for them, decode waits.
template <bool kIsNested>
struct RowScales {
  uint32_t codes;
  float4 values;  // absmax; nested_absmax in x

  __device__ __forceinline__ void load(const Arguments& arguments, int row, int step) {
    if (!arguments.are_scales_aligned) return;
    const int64_t block = (int64_t{row} * arguments.k + step * kStepCols) / kBlockCols;
    if constexpr (kIsNested) {
      codes = *reinterpret_cast<const uint32_t*>(arguments.scales.codes + block);
      values.x = arguments.scales.nested_absmax[block / kNestedBlockSize];
    } else {
      values = *reinterpret_cast<const float4*>(arguments.scales.absmax + block);
    }
  }

  __device__ __forceinline__ float4 decode(const Arguments& arguments, int row, int step, const float* nested_code,
                                           float nested_offset) const {
    if (!arguments.are_scales_aligned) return load_plainly(arguments, row, step);
    if constexpr (!kIsNested) return values;
    const auto scale = [&](int i) {
      return __fadd_rn(__fmul_rn(nested_code[codes >> i * 8 & 0xFF], values.x), nested_offset);
    };
    return make_float4(scale(0), scale(1), scale(2), scale(3));
  }

  static __device__ __noinline__ float4 load_plainly(const Arguments& arguments, int row, int step) {
    float scales[kStepBlocks] = {};
#pragma unroll
    for (int i = 0; i < kStepBlocks; ++i) {
      const int col = step * kStepCols + i * kBlockCols;
      if (col < arguments.k) scales[i] = load_scale(arguments.scales, int64_t{row} * arguments.k + col);
    }
    return make_float4(scales[0], scales[1], scales[2], scales[3]);
  }
};

__device__ __noinline__ uint4 load_bytes(const void* address) {
  const auto* const bytes = static_cast<const uint8_t*>(address);
  uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < 16; ++i) words[i / 4] |= static_cast<uint32_t>(bytes[i]) << i % 4 * 8;
  return {words[0], words[1], words[2], words[3]};
}

// A stage of W by the threads that copy scales.
__device__ __forceinline__ void copy_weight_plainly(const Arguments& arguments, int first_row, int step,
                                                    WeightStage& stage) {
  const int row_bytes = arguments.k / 2;
#pragma unroll 1
  for (int i = threadIdx.x; i < kTileRows * 8; i += kScaleThreads) {
    const int row = i / 8;
    const int first_byte = step * kStepBytes + i % 8 * 16;
    if (first_byte >= row_bytes) continue;
    const int64_t source = int64_t{min(first_row + row, arguments.n - 1)} * row_bytes + first_byte;
    *reinterpret_cast<uint4*>(&stage.bytes[row][(i % 8 ^ row % 8) * 16]) = load_bytes(arguments.packed + source);
  }
}

// Warps 0 and 1: the scales of W, and its bytes where the tensor memory accelerator does not take them.
template <typename Config, bool kIsNested>
__device__ __forceinline__ void copy_scales(const Arguments& arguments, Shared& shared) {
  constexpr int kScaleRows = kTileRows / kScaleThreads;
  const int thread = threadIdx.x;
  const int last_row = arguments.n - 1;  // that rows behind the last repeat
  float nested_offset = 0.0f;
  if constexpr (kIsNested) {
    nested_offset = *arguments.scales.nested_offset;
    for (int i = thread; i < 256; i += kScaleThreads) shared.nested_code[i] = arguments.scales.nested_code[i];
    asm volatile("bar.sync 4, %0;" ::"n"(kScaleThreads) : "memory");
  }
  RingPlace<kWeightStages> place;
  const Items<Config::kCluster> items(arguments);
  for (int index = items.first(); index < items.count; index += items.stride()) {
    const Item<Config::kCluster> item(arguments, items, index);
    RowScales<kIsNested> scales[kScaleRows];
#pragma unroll
    for (int i = 0; i < kScaleRows; ++i) {
      scales[i].load(arguments, min(item.first_row + thread + i * kScaleThreads, last_row), item.step_begin);
    }
    for (int step = item.step_begin; step < item.step_end; ++step) {
      WeightStage& stage = shared.weight[place.stage()];
      wait(shared.weight_empty[place.stage()], place.free_parity());
#pragma unroll
      for (int i = 0; i < kScaleRows; ++i) {
        const int row = min(item.first_row + thread + i * kScaleThreads, last_row);
        float4 four = scales[i].decode(arguments, row, step, shared.nested_code, nested_offset);
        four.x *= arguments.table_scale_inverse;
        four.y *= arguments.table_scale_inverse;
        four.z *= arguments.table_scale_inverse;
        four.w *= arguments.table_scale_inverse;
        *reinterpret_cast<float4*>(stage.scales[thread + i * kScaleThreads]) = four;
        if (step + 1 < item.step_end) scales[i].load(arguments, row, step + 1);
      }
      if (!arguments.is_weight_aligned) copy_weight_plainly(arguments, item.first_row, step, stage);
      arrive(shared.weight_full[place.stage()]);
      place.advance();
    }
  }
}

// Warp 3: the bytes of W.
template <typename Config>
__device__ __forceinline__ void copy_weight(const Arguments& arguments, const CUtensorMap& map, Shared& shared) {
  if (threadIdx.x % 32 != 0) return;
  RingPlace<kWeightStages> place;
  const Items<Config::kCluster> items(arguments);
  if (arguments.is_weight_aligned) {
    // All that may be done before the kernels before this one in the stream have ended: they may write the weight.
    const Item<Config::kCluster> item(arguments, items, items.first());
    for (int step = item.step_begin; step < min(item.step_begin + kWeightStages, item.step_end); ++step) {
      prefetch_box_to_l2(map, step * kStepBytes, item.first_row);
    }
  }
  cudaGridDependencySynchronize();
  for (int index = items.first(); index < items.count; index += items.stride()) {
    const Item<Config::kCluster> item(arguments, items, index);
    for (int step = item.step_begin; step < item.step_end; ++step) {
      WeightStage& stage = shared.weight[place.stage()];
      Barrier& full = shared.weight_full[place.stage()];
      wait(shared.weight_empty[place.stage()], place.free_parity());
      if (arguments.is_weight_aligned) {
        arrive_expecting(full, sizeof(stage.bytes));
        copy_box(stage.bytes, map, step * kStepBytes, item.first_row, full);
        if (step + kWeightStages < item.step_end) {
          prefetch_box_to_l2(map, (step + kWeightStages) * kStepBytes, item.first_row);
        }
      } else {
        arrive(full);
      }
      place.advance();
    }
  }
}

// Warp 2: fills the ring of x.
template <typename Config>
__device__ __forceinline__ void copy_x(const Arguments& arguments, const CUtensorMap& map, Shared& shared,
                                       unsigned char* stages) {
  constexpr int kTokens = Config::kXStageBytes / (kBlockCols * 2);
  constexpr int kRows = kTokens / Config::kCluster;  // that this block copies, to all of its cluster
  const int lane = threadIdx.x % 32;
  const int rank = static_cast<int>(blockIdx.x) % Config::kCluster;
  RingPlace<Config::kXStages> place;
  const Items<Config::kCluster> items(arguments);
  for (int index = items.first(); index < items.count; index += items.stride()) {
    const Item<Config::kCluster> item(arguments, items, index);
    const int end = min(item.step_end * kStepCols, arguments.k);
    for (int col = item.step_begin * kStepCols; col < end; col += kBlockCols) {
      unsigned char* const stage = stages + place.stage() * Config::kXStageBytes;
      Barrier& full = shared.x_full[place.stage()];
      wait(shared.x_empty[place.stage()], place.free_parity());
      if (arguments.is_x_aligned) {
        if (lane == 0) {
          arrive_expecting(full, Config::kXStageBytes);
          copy_box(stage + rank * kRows * 128, map, col, rank * kRows, full, (1 << Config::kCluster) - 1);
        }
      } else {
        for (int i = lane; i < kTokens * 8; i += 32) {
          const int token = i / 8;
          const auto* const source = static_cast<const uint8_t*>(arguments.x) +
                                     (int64_t{min(token, arguments.m - 1)} * arguments.k + col) * 2 + i % 8 * 16;
          *reinterpret_cast<uint4*>(stage + token * 128 + (i % 8 ^ token % 8) * 16) = load_bytes(source);
        }
        fence_shared();
        __syncwarp();
        if (lane == 0) arrive(full);
      }
      place.advance();
    }
  }
}

// The operand fragments of a lane for a block of 64 columns: 4 products of 16.
using Fragments = uint32_t[4][4];

template <int kCount>
__device__ __forceinline__ void synchronize_consumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kCount) : "memory");
}

// A warpgroup that multiplies.
template <typename T, typename Config>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const Arguments& arguments, Shared& shared, const unsigned char* table,
                                      const unsigned char* x_stages, float* exchange)
      : arguments_(arguments),
        shared_(shared),
        table_(table),
        x_(describe_columns(x_stages)),
        exchange_(exchange),
        lane_(keep(threadIdx.x % 32)),
        pair_(keep(warpgroup() / 2)),
        selector_(keep(table_selector(threadIdx.x % 4))),
        weight_(keep(shared_address(shared.weight[0].bytes[row()]))),
        scales_(keep(shared_address(shared.weight[0].scales[row()]))),
        swizzle_(keep(threadIdx.x % 32 / 4 * 16)) {}

  __device__ __forceinline__ void run() {
    const Items<Config::kCluster> items(arguments_);
    if (Config::kPairs == 1 && warpgroup() == 1) give_turn();
    for (int index = items.first(); index < items.count; index += items.stride()) {
      const Item<Config::kCluster> item(arguments_, items, index);
#pragma unroll
      for (auto& half : sums_) {
#pragma unroll
        for (float& sum : half) sum = 0.0f;
      }
      for (int step = item.step_begin; step < item.step_end; ++step) multiply_step(step, item);
      if (Config::kPairs == 1 || exchange_sums()) store(item);
    }
    if (Config::kPairs == 1 && warpgroup() == 0) wait_for_turn();
  }

 private:
  static constexpr int kCols = Config::kCols;

  static __device__ __forceinline__ int warpgroup() { return threadIdx.x / kWarpgroup - 1; }
  __device__ __forceinline__ int lane() const { return static_cast<int>(lane_); }
  __device__ __forceinline__ int pair() const { return Config::kPairs == 1 ? 0 : static_cast<int>(pair_); }
  // First of the two rows of the tile that the lane holds; the other is 8 further.
  static __device__ __forceinline__ int row() {
    return warpgroup() % 2 * 64 + threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
  }

  __device__ __forceinline__ void wait_for_weight() {
    wait(shared_.weight_full[weight_place_.stage()], weight_place_.parity());
  }

  __device__ __forceinline__ void release_weight() {
    __syncwarp();
    if (lane() == 0) arrive(shared_.weight_empty[weight_place_.stage()]);
    weight_place_.advance();
  }

  __device__ __forceinline__ void release_x(int stage) {
    __syncwarp();
    if constexpr (Config::kCluster == 1) {
      if (lane() == 0) arrive(shared_.x_empty[stage]);
    } else {
      if (lane() < Config::kCluster) arrive_remote(shared_.x_empty[stage], lane());
    }
  }

  __device__ __forceinline__ int num_blocks(int step) const {
    return min(kStepBlocks, arguments_.k / kBlockCols - step * kStepBlocks);
  }

  __device__ __forceinline__ float scale(int block, int half) const {
    constexpr int kEightRows = 8 * kStepBlocks * 4;
    return load_shared_float(scales_ + weight_place_.stage() * kWeightStageBytes + half * kEightRows + block * 4);
  }

  __device__ __forceinline__ void decode(int block, Fragments& a) const {
    const uint32_t source = weight_ + weight_place_.stage() * kWeightStageBytes + ((block * 32) ^ swizzle_);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const uint4 words = load_shared_16_bytes((source ^ p * 16) + h * 8 * kStepBytes);
        a[2 * p][h] = table_.pair(words.x, selector_);
        a[2 * p][2 + h] = table_.pair(words.y, selector_);
        a[2 * p + 1][h] = table_.pair(words.z, selector_);
        a[2 * p + 1][2 + h] = table_.pair(words.w, selector_);
      }
    }
  }

  __device__ __forceinline__ uint64_t wait_for_x(const RingPlace<Config::kXStages>& place) {
    wait(shared_.x_full[place.stage()], place.parity());
    return x_ + place.stage() * (Config::kXStageBytes / 16);
  }

  // Two warpgroups take turns at the tensor cores, so that one adds up its products while the other's are computed.
  static __device__ __forceinline__ void wait_for_turn() {
    asm volatile("bar.sync %0, %1;" ::"r"(2 + warpgroup()), "n"(2 * kWarpgroup) : "memory");
  }
  static __device__ __forceinline__ void give_turn() {
    asm volatile("bar.arrive %0, %1;" ::"r"(3 - warpgroup()), "n"(2 * kWarpgroup) : "memory");
  }

  // The products of a block of columns and of a half of x, from zero.
  __device__ __forceinline__ void start_products(const Fragments& a, uint64_t x) {
    if constexpr (Config::kPairs == 1) wait_for_turn();
    fence_registers();
#pragma unroll
    for (int j = 0; j < 4; ++j) multiply<T, kCols>(products_, a[j], x + j * kProductStep, j > 0);
    commit_products();
    if constexpr (Config::kPairs == 1) give_turn();
  }

  __device__ __forceinline__ void add_products(float (&sums)[kCols / 2], float scale_low, float scale_high) {
#pragma unroll
    for (int c = 0; c < kCols / 8; ++c) {
      sums[4 * c] = fmaf(scale_low, products_[4 * c], sums[4 * c]);
      sums[4 * c + 1] = fmaf(scale_low, products_[4 * c + 1], sums[4 * c + 1]);
      sums[4 * c + 2] = fmaf(scale_high, products_[4 * c + 2], sums[4 * c + 2]);
      sums[4 * c + 3] = fmaf(scale_high, products_[4 * c + 3], sums[4 * c + 3]);
    }
  }

  // The warpgroup's blocks of a step: all, or of two pairs every second.
  __device__ __forceinline__ void multiply_step(int step, const Item<Config::kCluster>& item) {
    const int count = num_blocks(step);
    if (Config::kBuffers == 1 || step == item.step_begin) wait_for_weight();
    if (Config::kBuffers == 2 && step == item.step_begin && pair() < count) decode(pair(), a_[0]);
    const bool is_last = step + 1 == item.step_end;
#pragma unroll 1
    for (int block = pair(); block < count; block += Config::kPairs * Config::kBuffers) {
      multiply_block<0>(block, count, is_last);
      if constexpr (Config::kBuffers == 2) {
        if (block + Config::kPairs < count) multiply_block<1>(block + Config::kPairs, count, is_last);
      }
    }
    if (Config::kBuffers == 1 || pair() >= count) release_weight();
    x_place_.advance(count);
  }

  template <int kBuffer>
  __device__ __forceinline__ void multiply_block(int block, int count, bool is_last) {
    const float scale_low = scale(block, 0);
    const float scale_high = scale(block, 1);
    const auto place = x_place_.plus(block);
    if constexpr (Config::kBuffers == 1) decode(block, a_[0]);
    const uint64_t x = wait_for_x(place);
    start_products(a_[kBuffer], x);
    if constexpr (Config::kBuffers == 2) decode_ahead(block + Config::kPairs, count, is_last, a_[1 - kBuffer]);
#pragma unroll
    for (int h = 0; h < Config::kHalves; ++h) {
      wait_for_products<0>();
      hold_registers(products_);
      if (h == Config::kHalves - 1) release_x(place.stage());
      add_products(sums_[h], scale_low, scale_high);
      if (h < Config::kHalves - 1) start_products(a_[kBuffer], x + (h + 1) * (kCols * 128 / 16));
    }
  }

  // A step of another number of blocks than kStepBlocks is the last of all, so each begins with the first buffer.
  __device__ __forceinline__ void decode_ahead(int block, int count, bool is_last, Fragments& a) {
    if (block >= count) {
      release_weight();
      if (is_last) return;
      wait_for_weight();
      block = pair();
    }
    decode(block, a);
  }

  // Adds the sums of the second pair to those of the first; false for the second, which has no more to do.
  __device__ __forceinline__ bool exchange_sums() {
    constexpr int kCount = 2 * kWarpgroup;
    float* const place = exchange_ + (threadIdx.x - kWarpgroup) % kCount;
    if (pair() == 1) {
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) place[i * kCount] = sums_[0][i];
    }
    synchronize_consumers<Config::kConsumers>();
    if (pair() == 0) {
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) sums_[0][i] += place[i * kCount];
    }
    synchronize_consumers<Config::kConsumers>();
    return pair() == 0;
  }

  __device__ __forceinline__ void store(const Item<Config::kCluster>& item) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = item.first_row + row() + 8 * half;
      if (n >= arguments_.n) continue;
      const bool has_bias = arguments_.parts == nullptr && arguments_.bias != nullptr;
      const float bias = has_bias ? to_float(static_cast<const T*>(arguments_.bias)[n]) : 0.0f;
#pragma unroll
      for (int h = 0; h < Config::kHalves; ++h) {
#pragma unroll
        for (int i = 0; i < kCols / 4; ++i) {
          const int token = h * kCols + i / 2 * 8 + lane() % 4 * 2 + i % 2;
          if (token >= arguments_.m) continue;
          const float sum = sums_[h][i / 2 * 4 + half * 2 + i % 2];
          if (arguments_.parts != nullptr) {
            arguments_.parts[(int64_t{item.part} * arguments_.m + token) * arguments_.n + n] = sum;
          } else {
            static_cast<T*>(arguments_.y)[int64_t{token} * arguments_.n + n] =
                from_float<T>(has_bias ? sum + bias : sum);
          }
        }
      }
    }
  }

  const Arguments& arguments_;
  Shared& shared_;
  PairTable<T> table_;
  uint64_t x_;  // descriptor of the first stage
  float* exchange_;
  uint32_t lane_;
  uint32_t pair_;
  uint32_t selector_;
  uint32_t weight_;   // shared addresses in the first stage of W: of the row's bytes
  uint32_t scales_;   // and of its scales
  uint32_t swizzle_;  // of the row
  RingPlace<kWeightStages> weight_place_;
  RingPlace<Config::kXStages> x_place_;
  Fragments a_[Config::kBuffers];
  float sums_[Config::kHalves][kCols / 2];
  float products_[kCols / 2];  // not yet scaled
};

#endif

template <typename T, typename Config, bool kIsNested>
__global__ __launch_bounds__(Config::kThreads, 1) void wide_kernel(
    const __grid_constant__ Arguments arguments, const __grid_constant__ CUtensorMap weight_map,
    const __grid_constant__ CUtensorMap x_map, const __grid_constant__ typename PairTable<T>::Values values) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  unsigned char* const table = shared_bytes + (kTableAlignment - shared_address(shared_bytes) % kTableAlignment);
  unsigned char* const x_stages = table + kTableAlignment;
  constexpr int kWarpsOfPair = 2 * kWarpgroup / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kWeightStages; ++i) {
      init_barrier(shared.weight_full[i], kScaleThreads + 1);
      init_barrier(shared.weight_empty[i], Config::kPairs * kWarpsOfPair);
    }
    for (int i = 0; i < Config::kXStages; ++i) {
      init_barrier(shared.x_full[i], 1);
      init_barrier(shared.x_empty[i], Config::kCluster * kWarpsOfPair);
    }
    publish_barriers();
  }
  __syncthreads();
  if constexpr (Config::kCluster > 1) synchronize_cluster();
  if (threadIdx.x < kWarpgroup) {
    limit_registers<Config::kCopyRegisters, false>();
    if (threadIdx.x < kScaleThreads) {
      cudaGridDependencySynchronize();
      copy_scales<Config, kIsNested>(arguments, shared);
    } else if (threadIdx.x < kScaleThreads + 32) {
      cudaGridDependencySynchronize();
      copy_x<Config>(arguments, x_map, shared, x_stages);
    } else {
      copy_weight<Config>(arguments, weight_map, shared);
    }
  } else {
    limit_registers<Config::kRegisters, true>();
    PairTable<T>::template fill<Config::kConsumers>(table, values, threadIdx.x - kWarpgroup);
    synchronize_consumers<Config::kConsumers>();
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
    float* const exchange = reinterpret_cast<float*>(x_stages + Config::kXStages * Config::kXStageBytes);
    Consumer<T, Config>(arguments, shared, table, x_stages, exchange).run();
  }
  // A block may leave only when none of its cluster copies to it any more.
  if constexpr (Config::kCluster > 1) synchronize_cluster();
#else
  __trap();  // supports_wide_sm90 lets no device here that this was not compiled for.
#endif
}

int tokens_of(int64_t m) {
  for (int tokens : {16, 32, 64, 128}) {
    if (m <= tokens) return tokens;
  }
  return kMaxTokens;
}

template <typename Function>
void dispatch_tokens(int tokens, Function&& f) {
  switch (tokens) {
    case 16:
      return f(std::integral_constant<int, 16>{});
    case 32:
      return f(std::integral_constant<int, 32>{});
    case 64:
      return f(std::integral_constant<int, 64>{});
    case 128:
      return f(std::integral_constant<int, 128>{});
    case 256:
      return f(std::integral_constant<int, 256>{});
  }
  fail(QLORA_INTERNAL_ERROR, "dispatch_tokens: expected 16 to 256, got ", tokens);
}

template <typename T, typename Config, bool kIsNested>
void launch_wide(const Arguments& arguments, const CUtensorMap& weight_map, const CUtensorMap& x_map, const typename PairTable<T>::Values& values,
                 const Device& device, cudaStream_t stream) {
  const auto kernel = wide_kernel<T, Config, kIsNested>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<Config>),
             "cudaFuncSetAttribute(wide_kernel)");
  std::array<cudaLaunchAttribute, 2> attributes = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = Config::kCluster;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  const int64_t num_items = ceil_div(arguments.n, kTileRows * Config::kCluster) * arguments.num_parts;
  const int64_t num_clusters = std::min<int64_t>(num_items, device.num_multiprocessors / Config::kCluster);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(num_clusters * Config::kCluster));
  config.blockDim = dim3(Config::kThreads);
  config.dynamicSmemBytes = kSharedBytes<Config>;
  config.stream = stream;
  config.attrs = attributes.data();
  config.numAttrs = static_cast<unsigned>(attributes.size());
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments, weight_map, x_map, values), "wide_kernel");
}

int64_t num_tiles_of(const Gemm& problem) { return ceil_div(problem.weight.rows, kTileRows); }

int num_parts_of(const Gemm& problem, const Device& device) {
  return best_num_parts(num_tiles_of(problem), ceil_div(problem.weight.cols, kStepCols), device.num_multiprocessors);
}

}  // namespace

std::string supports_wide_sm90(const Gemm& problem, const Device& device) {
  const qlora_weight_4bit& weight = problem.weight;
  if (problem.direction != Direction::kForward) return "expected the forward product";
  if (device.major != 9) return concat("expected compute capability 9.0, got ", device.major, ".", device.minor);
  if (problem.dtype == QLORA_FLOAT32) return "expected float16 or bfloat16";
  if (problem.m < 1 || problem.m > kMaxTokens) return concat("m: expected 1 to ", kMaxTokens);
  if (weight.block_size < kBlockCols) return concat("block_size: expected at least ", kBlockCols);
  if (weight.cols < 1 || weight.cols % kBlockCols != 0) return concat("k: expected a multiple of ", kBlockCols);
  if (weight.rows < 1 || weight.rows > (1 << 30) || weight.cols > (1 << 30)) return "n, k: expected 1 to 2^30";
  return "";
}

int64_t wide_sm90_workspace_size(const Gemm& problem, const Device& device) {
  const int parts = num_parts_of(problem, device);
  return parts == 1 ? 0 : parts * problem.m * problem.weight.rows * static_cast<int64_t>(sizeof(float));
}

void wide_sm90(const Gemm& problem, const Device& device, cudaStream_t stream) {
  const qlora_weight_4bit& weight = problem.weight;
  const bool is_nested = weight.absmax_codes != nullptr;
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
  arguments.are_scales_aligned = weight.block_size == kBlockCols && weight.cols % kStepCols == 0 &&
                                 is_aligned(weight.absmax_codes, 4) && is_aligned(weight.absmax, 16);
  arguments.is_weight_aligned = is_aligned(weight.packed, 16);
  arguments.is_x_aligned = is_aligned(problem.input, 16);
  dispatch_dtype(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      dispatch_bool(is_nested, [&](auto nested) {
        dispatch_tokens(tokens_of(problem.m), [&](auto tokens) {
          using Kind = Config<T, tokens()>;
          arguments.table_scale_inverse = 1.0f / PairTable<T>::scale(format);
          CUtensorMap weight_map = {};
          CUtensorMap x_map = {};
          if (arguments.is_weight_aligned) {
            weight_map = describe_matrix(weight.packed, 1, weight.rows, weight.cols / 2, kTileRows);
          }
          if (arguments.is_x_aligned) {
            x_map = describe_matrix(problem.input, 2, problem.m, weight.cols, tokens() / Kind::kCluster);
          }
          launch_wide<T, Kind, nested()>(arguments, weight_map, x_map, PairTable<T>::values(format), device, stream);
        });
      });
    }
  });
  if (arguments.num_parts > 1) {
    add_parts(arguments.parts, arguments.num_parts, problem.m, weight.rows, problem.bias, problem.output,
              problem.dtype, stream);
  }
}

}  // namespace qlora
