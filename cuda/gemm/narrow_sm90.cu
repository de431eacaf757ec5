// y = x W^T + bias for up to 64 rows of x on Hopper's wgmma: the weight is read once from HBM and decoded once, to the
// registers from which the tensor cores take it as their 64-row operand; x is their column operand, kTokens columns.
//
//   grid     a block a multiprocessor. Blocks take turns at the items: a tile of 128 rows of W, over a part of k in
//            steps of 256 columns
//   slots    a ring in shared memory; a slot has a step's packed bytes, scales and columns of x
//   copies   by warpgroup 0: warps 0 and 1 decode scales, warp 2 copies x, a lane of warp 3 the packed bytes
//   decode   see WeightOperand; unscaled: the products of a block of 64 columns are summed from zero and then scaled,
//            in fp32
//   work     two pairs of warpgroups, 64 rows of W each; the pairs take turns at the steps
//   sums     of the pairs in shared memory; of the parts, where tiles are fewer than multiprocessors, by add_products
//
// Rounding: see PairTable; fp32 sums; y.
#include <cstdint>
#include <type_traits>

#include "cuda/device/barrier.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/device/tensor_copy.cuh"
#include "cuda/device/unaligned.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/dispatch.h"
#include "cuda/gemm/add_products.h"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/product.cuh"
#include "cuda/gemm/split.h"
#include "cuda/gemm/step_scales.cuh"
#include "cuda/gemm/weight_operand.cuh"
#include "cuda/gemm/wgmma_kernels.h"
#include "cuda/launch.h"
#include "cuda/remember.h"
#include "cuda/tensor_map.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

constexpr int kWarpgroup = 128;  // threads
constexpr int kPairs = 2;
constexpr int kPairThreads = 2 * kWarpgroup;
constexpr int kConsumers = kPairs * kPairThreads;
constexpr int kThreads = kWarpgroup + kConsumers;
constexpr int kTile = kScaledRows;
constexpr int kStep = kStepBlocks * kBlockCols;
constexpr int kRowBytes = kStep / 2;
constexpr int kMaxTokens = 64;
constexpr int kMaxSlots = 5;
constexpr int kPrefetchSteps = 4;
constexpr int kPrefetchValueBytes = 4;  // of that matrix' description
constexpr int kFirstSteps = 2;  // whose bytes are asked for at once; more would keep the memory from the first scales
constexpr int kCopyRegisters = 64;
constexpr int kRegisters = 104;

template <int kTokens>
constexpr int kSlots = kTokens == 16   ? 5
                       : kTokens == 32 ? 4
                                       : 3;

template <int kTokens>
struct Slot {
  unsigned char weight[kTile * kRowBytes];  // the 16-byte piece p of row r at place p ^ r % 8
  float scales[kTile * kStepBlocks];
  unsigned char input[kStepBlocks][kTokens * kBlockCols * 2];  // as describe_columns says
};

// Shared memory: the pair table, the slots, this.
struct alignas(16) Rest {
  float nested_code[256];
  Barrier full[kMaxSlots];
  Barrier empty[kMaxSlots];
  Barrier started;    // the first scales are there
  Barrier exchanged;  // the second pair's sums of an item are there
  Barrier taken;      // and added to the first pair's
  alignas(16) unsigned char staging[kPairThreads / 32][kStoreBytes];
};
template <int kTokens>
constexpr int kSharedBytes = PairTable<__half>::kBytes + kSlots<kTokens> * static_cast<int>(sizeof(Slot<kTokens>)) +
                             static_cast<int>(sizeof(Rest));

struct Arguments {
  const uint8_t* packed;
  Scales scales;
  float scale_factor;  // that the table asks for
  const void* x;
  ProductTarget y;
  int num_parts;
  int num_tiles;
  int part_steps;  // of a part, and one more of the first num_longer_parts
  int num_longer_parts;
  int rows;  // of the weight
  int cols;
  bool is_weight_aligned;   // packed to 16 bytes
  bool is_x_aligned;        // to 16 bytes
  bool are_scales_aligned;  // see StepScales
};

// Descriptions for the copies: of the packed bytes in boxes of a step and of kPrefetchSteps, and of x.
struct Maps {
  CUtensorMap weight;
  CUtensorMap prefetch;
  CUtensorMap x;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

enum NamedBarrier { kAllThreads, kAllScaleThreads, kInputWarps, kCopyWarps, kSecondPair };

struct Item {
  int first_row;
  int part;
  int step_begin;
  int step_end;
};

// Item `index` of a block, if it has so many. Without divisions, which the first copies would wait for.
__device__ __forceinline__ bool find_item(const Arguments& arguments, int index, Item& item) {
  int place = static_cast<int>(blockIdx.x + index * gridDim.x);
  item.part = 0;
  for (; place >= arguments.num_tiles; place -= arguments.num_tiles) ++item.part;
  item.first_row = place * kTile;
  item.step_begin = item.part * arguments.part_steps + min(item.part, arguments.num_longer_parts);
  item.step_end = item.step_begin + arguments.part_steps + (item.part < arguments.num_longer_parts ? 1 : 0);
  return item.part < arguments.num_parts;
}

// f(item, step) for each step of the block's items.
template <typename Function>
__device__ __forceinline__ void for_each_step(const Arguments& arguments, Function&& f) {
  Item item;
  for (int index = 0; find_item(arguments, index, item); ++index) {
    for (int step = item.step_begin; step < item.step_end; ++step) f(item, step);
  }
}

// Warps 0 and 1: the scales, and the packed bytes where the tensor memory accelerator does not take them.
template <int kTokens, bool kIsNested>
__device__ __forceinline__ void copy_scales(const Arguments& arguments, Slot<kTokens>* slots, Rest& rest) {
  Item first;
  find_item(arguments, 0, first);
  StepScales<kIsNested> scales;
  cudaGridDependencySynchronize();
  // All that is read first is asked for before any of it is waited for.
  NestedCode nested_code;
  float nested_offset = 0.0f;
  scales.load(arguments, first.first_row, first.step_begin);
  if constexpr (kIsNested) {
    nested_code.load(arguments.scales.nested_code);
    nested_offset = *arguments.scales.nested_offset;
  }
  synchronize<kScaleThreads + 2 * 32>(kCopyWarps);
  arrive_at<kThreads>(kAllThreads);
  if constexpr (kIsNested) {
    nested_code.store(rest.nested_code);
    synchronize<kScaleThreads>(kAllScaleThreads);
  }
  bool is_loaded = true;
  bool is_first = true;
  RingPlace<kSlots<kTokens>> place;
  for_each_step(arguments, [&](const Item& item, int step) {
    Slot<kTokens>& slot = slots[place.stage()];
    wait(rest.empty[place.stage()], place.free_parity());
    if (!is_loaded) scales.load(arguments, item.first_row, step);
    scales.store(arguments, item.first_row, step, rest.nested_code, nested_offset, slot.scales);
    is_loaded = step + 1 < item.step_end;
    if (is_loaded) scales.load(arguments, item.first_row, step + 1);
    if (!arguments.is_weight_aligned) {
      for (int piece = threadIdx.x; piece < kTile * 8; piece += kScaleThreads) {
        const int row = piece / 8;
        const int byte = step * kRowBytes + piece % 8 * 16;
        if (byte >= arguments.cols / 2) continue;
        const int64_t source = int64_t{min(item.first_row + row, arguments.rows - 1)} * (arguments.cols / 2) + byte;
        *reinterpret_cast<uint4*>(slot.weight + row * kRowBytes + (piece % 8 ^ row % 8) * 16) =
            load_16_unaligned_bytes(arguments.packed + source);
      }
    }
    arrive(rest.full[place.stage()]);
    if (is_first) arrive(rest.started);
    is_first = false;
    place.advance();
  });
}

// A step of x by a warp, where the tensor memory accelerator does not take it; zeros behind the last row and column.
template <int kTokens>
__device__ __noinline__ void copy_x_plainly(const Arguments& arguments, int step, Slot<kTokens>& slot) {
  for (int i = threadIdx.x % 32; i < kStepBlocks * kTokens * 8; i += 32) {
    const int block = i / (kTokens * 8);
    const int token = i / 8 % kTokens;
    const int col = step * kStep + block * kBlockCols + i % 8 * 8;
    const bool is_there = token < arguments.y.m && col < arguments.cols;
    const auto* const row = static_cast<const uint8_t*>(arguments.x) + int64_t{token} * arguments.cols * 2;
    *reinterpret_cast<uint4*>(slot.input[block] + token * 128 + (i % 8 ^ token % 8) * 16) =
        is_there ? load_16_unaligned_bytes(row + col * 2) : make_uint4(0, 0, 0, 0);
  }
  fence_shared();
  __syncwarp();
}

// Warp 2: x.
template <int kTokens>
__device__ __forceinline__ void copy_x(const Arguments& arguments, const CUtensorMap& map, Slot<kTokens>* slots,
                                       Rest& rest) {
  const bool is_first = threadIdx.x % 32 == 0;
  RingPlace<kSlots<kTokens>> place;
  for_each_step(arguments, [&](const Item&, int step) {
    Slot<kTokens>& slot = slots[place.stage()];
    Barrier& full = rest.full[place.stage()];
    wait(rest.empty[place.stage()], place.free_parity());
    if (!arguments.is_x_aligned) {
      copy_x_plainly(arguments, step, slot);
      if (is_first) arrive(full);
    } else if (is_first) {
      arrive_expecting(full, sizeof(slot.input));
#pragma unroll
      for (int b = 0; b < kStepBlocks; ++b) copy_box(slot.input[b], map, step * kStep + b * kBlockCols, 0, full);
    }
    place.advance();
  });
}

// The packed bytes on their way to shared memory, for one thread. What a row has for kPrefetchSteps steps is brought
// into L2 at once: it shares a page of memory.
class WeightCopies {
 public:
  __device__ __forceinline__ WeightCopies(const Arguments& arguments, const CUtensorMap& map,
                                          const CUtensorMap& prefetch_map)
      : arguments_(arguments), map_(map), prefetch_map_(prefetch_map) {}

  // The first of all steps.
  __device__ __forceinline__ void prefetch_first() const {
    Item item;
    find_item(arguments_, 0, item);
    if (arguments_.is_weight_aligned) prefetch(item, item.step_begin, item.step_begin + kFirstSteps);
  }

  template <int kTokens>
  __device__ __forceinline__ void run(Slot<kTokens>* slots, Rest& rest) const {
    int count = 0;
    RingPlace<kSlots<kTokens>> place;
    for_each_step(arguments_, [&](const Item& item, int step) {
      Slot<kTokens>& slot = slots[place.stage()];
      Barrier& full = rest.full[place.stage()];
      if (count++ == kFirstSteps) wait(rest.started, 0);
      wait(rest.empty[place.stage()], place.free_parity());
      if (arguments_.is_weight_aligned) {
        arrive_expecting(full, sizeof(slot.weight));
        copy_box(slot.weight, map_, step * kRowBytes, item.first_row, full);
        prefetch_ahead(item, step);
      } else {
        arrive(full);
      }
      place.advance();
    });
  }

 private:
  __device__ __forceinline__ void prefetch(const Item& item, int begin, int end) const {
    for (int step = begin; step < min(end, item.step_end); ++step) {
      prefetch_box_to_l2(map_, step * kRowBytes, item.first_row);
    }
  }
  __device__ __forceinline__ void prefetch_ahead(const Item& item, int step) const {
    const int done = step - item.step_begin;
    if (done == kFirstSteps) prefetch(item, step + 1, item.step_begin + kPrefetchSteps);
    if (done % kPrefetchSteps != (done < kPrefetchSteps ? kFirstSteps : 0)) return;
    const int ahead = item.step_begin + (done / kPrefetchSteps + 1) * kPrefetchSteps;
    if (ahead < item.step_end) {
      prefetch_box_to_l2(prefetch_map_, ahead * (kRowBytes / kPrefetchValueBytes), item.first_row);
    }
  }

  const Arguments& arguments_;
  const CUtensorMap& map_;
  const CUtensorMap& prefetch_map_;
};

template <typename T, int kTokens>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const Arguments& arguments, const unsigned char* table, Slot<kTokens>* slots,
                                      Rest& rest)
      : arguments_(arguments),
        slots_(slots),
        rest_(rest),
        operand_(slots->weight, table, first_row()),
        pair_(keep(warpgroup() / 2)),
        scales_(keep(shared_address(slots->scales) + (first_row() + Operand::row()) * kStepBlocks * 4)),
        input_(describe_columns(slots->input)) {
    place_.advance(static_cast<int>(pair_));
  }

  __device__ __forceinline__ void run() {
    int next = static_cast<int>(pair_);  // Steps are counted through all items; this pair's next.
    int end = 0;
    Item item;
    for (int index = 0; find_item(arguments_, index, item); ++index) {
#pragma unroll
      for (float& sum : sums_) sum = 0.0f;
      const int begin = end;
      end += item.step_end - item.step_begin;
#pragma unroll 1
      for (; next < end; next += kPairs) {
        multiply_step();
        if (pair_ == 0 || next + kPairs < end) arrive(rest_.empty[place_.stage()]);  // The last: see exchange.
        place_.advance(kPairs);
      }
      const int last_of_second = (end - 2) | 1;
      exchange(last_of_second >= begin, last_of_second % kSlots<kTokens>, index % 2);
      if (pair_ == 0) store(item);
    }
  }

 private:
  using Operand = WeightOperand<FixedPairTable<T, kReservedBytes>>;
  static constexpr int kBuffers = kTokens == 64 ? 1 : 2;  // with 2 the next block is decoded while products run

  static __device__ __forceinline__ int warpgroup() { return threadIdx.x / kWarpgroup - 1; }
  // Of the warp, in a tile.
  static __device__ __forceinline__ int first_row() {
    return warpgroup() % 2 * 64 + threadIdx.x % kWarpgroup / 32 * kProductRows;
  }

  __device__ __forceinline__ void multiply_step() {
    const uint32_t slot = place_.stage() * static_cast<uint32_t>(sizeof(Slot<kTokens>));
    wait(rest_.full[place_.stage()], place_.parity());
    const uint32_t input = __shfl_sync(0xFFFFFFFFu, input_ + slot / 16, 0);
    operand_.decode(slot, 0, a_[0]);
#pragma unroll
    for (int b = 0; b < kStepBlocks; ++b) {
      Fragments& next = a_[(b + 1) % kBuffers];
      fence_registers();
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        multiply<T, kTokens>(products_, a_[b % kBuffers][j],
                             input + b * kTokens * (kBlockCols * 2 / 16) + j * kProductStep, j > 0);
      }
      commit_products();
      const bool has_next = b + 1 < kStepBlocks;
      if (has_next && kBuffers == 2) operand_.decode(slot, b + 1, next);
      const float scale_low = load_shared_float(scales_ + slot + b * 4);
      const float scale_high = load_shared_float(scales_ + slot + (8 * kStepBlocks + b) * 4);
      wait_for_products<0>();
      hold_registers(products_);
      if (has_next && kBuffers == 1) operand_.decode(slot, b + 1, next);
      add_scaled(sums_, products_, scale_low, scale_high);
    }
  }

  // Adds the sums of the second pair, if it had a step of the item, to those of the first, by way of the place of x in
  // the second pair's last slot, which the first pair frees.
  __device__ __forceinline__ void exchange(bool has_second, int slot, uint32_t parity) {
    float* const place = reinterpret_cast<float*>(slots_[slot].input) + threadIdx.x % kPairThreads;
    if (pair_ == 1) {
      wait(rest_.taken, parity ^ 1);
      if (has_second) {
        synchronize<kPairThreads>(kSecondPair);
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) place[i * kPairThreads] = sums_[i];
        fence_shared();
      }
      arrive(rest_.exchanged);
    } else {
      wait(rest_.exchanged, parity);
      if (has_second) {
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) sums_[i] += place[i * kPairThreads];
        arrive(rest_.empty[slot]);
      }
      arrive(rest_.taken);
    }
  }

  __device__ __forceinline__ void store(const Item& item) const {
    const int first = item.first_row + first_row();
    if (arguments_.y.parts != nullptr) {
      store_part<kTokens>(sums_, arguments_.y, item.part, first, 0);
    } else {
      store_product<T, kTokens>(sums_, arguments_.y, first, 0, rest_.staging[threadIdx.x / 32 % (kPairThreads / 32)]);
    }
  }

  const Arguments& arguments_;
  Slot<kTokens>* slots_;
  Rest& rest_;
  Operand operand_;
  uint32_t pair_;
  uint32_t scales_;  // shared address in the first slot, of those of the lane's first row
  uint32_t input_;   // low half of a descriptor
  RingPlace<kSlots<kTokens>> place_;
  Fragments a_[kBuffers];
  float sums_[kTokens / 2];
  float products_[kTokens / 2];  // not yet scaled
};

template <typename T, int kTokens, bool kIsNested>
__device__ __forceinline__ void run(const Arguments& arguments, const Maps& maps, const CodeValues& values) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  auto* const slots = reinterpret_cast<Slot<kTokens>*>(shared_bytes + PairTable<T>::kBytes);
  Rest& rest = *reinterpret_cast<Rest*>(slots + kSlots<kTokens>);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (warp < kWarpgroup / 32) {
    limit_registers<kCopyRegisters, false>();
    if (warp < 2) {
      copy_scales<kTokens, kIsNested>(arguments, slots, rest);
    } else if (warp == 2) {
      synchronize<2 * 32>(kInputWarps);
      arrive_at<kScaleThreads + 2 * 32>(kCopyWarps);
      arrive_at<kThreads>(kAllThreads);
      cudaGridDependencySynchronize();
      copy_x<kTokens>(arguments, maps.x, slots, rest);
    } else {
      const bool is_first = threadIdx.x % 32 == 0;
      const WeightCopies copies(arguments, maps.weight, maps.prefetch);
      if (is_first) {
        if (shared_address(shared_bytes) != kReservedBytes) __trap();  // FixedPairTable relies on it.
        for (int i = 0; i < kSlots<kTokens>; ++i) {
          init_barrier(rest.full[i], kScaleThreads + 2);
          init_barrier(rest.empty[i], kPairThreads);
        }
        init_barrier(rest.started, kScaleThreads);
        init_barrier(rest.exchanged, kPairThreads);
        init_barrier(rest.taken, kPairThreads);
        publish_barriers();
        // All that may be done before the kernels before this one in the stream have ended: they may write the weight.
        copies.prefetch_first();
      }
      __syncwarp();
      synchronize<2 * 32>(kInputWarps);
      arrive_at<kScaleThreads + 2 * 32>(kCopyWarps);
      arrive_at<kThreads>(kAllThreads);
      cudaGridDependencySynchronize();
      if (is_first) copies.template run<kTokens>(slots, rest);
    }
  } else {
    limit_registers<kRegisters, true>();
    PairTable<T>::template fill<kConsumers>(shared_bytes, values, threadIdx.x - kWarpgroup);
    synchronize<kThreads>(kAllThreads);
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
    Consumer<T, kTokens>(arguments, shared_bytes, slots, rest).run();
  }
}

#endif

template <typename T, int kTokens, bool kIsNested>
__global__ __launch_bounds__(kThreads, 1) void narrow_kernel(const __grid_constant__ Arguments arguments,
                                                             const __grid_constant__ Maps maps,
                                                             const __grid_constant__ CodeValues values) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  run<T, kTokens, kIsNested>(arguments, maps, values);
#else
  __trap();  // supports_narrow_sm90 lets no device here that this was not compiled for.
#endif
}

int tokens_of(const Gemm& problem) { return problem.m <= 16 ? 16 : problem.m <= 32 ? 32 : kMaxTokens; }

int num_parts_of(const Gemm& problem, const Device& device) {
  return best_num_parts(ceil_div(problem.weight.rows, kTile), ceil_div(problem.weight.cols, kStep),
                        device.num_multiprocessors);
}

}  // namespace

bool supports_narrow_sm90(const Gemm& problem, const Device& device, std::string* why_not) {
  if (problem.direction != Direction::kForward) return refuse(why_not, "expected the forward product");
  const auto* const any = reinterpret_cast<const void*>(narrow_kernel<__half, 16, true>);
  return supports_wgmma(problem, device, kMaxTokens, any, why_not);
}

int64_t narrow_sm90_workspace_size(const Gemm& problem, const Device& device) {
  const int parts = num_parts_of(problem, device);
  return parts == 1 ? 0 : parts * num_part_floats(problem.m, problem.weight.rows) * static_cast<int64_t>(sizeof(float));
}

void narrow_sm90(const Gemm& problem, const Device& device, cudaStream_t stream) {
  const qlora_weight_4bit& weight = problem.weight;
  const Format format = weight.format == QLORA_NF4 ? Format::kNF4 : Format::kFP4;
  Arguments arguments = {};
  arguments.packed = static_cast<const uint8_t*>(weight.packed);
  arguments.scales = scales_of(weight);
  arguments.x = problem.input;
  arguments.num_parts = num_parts_of(problem, device);
  const int num_steps = static_cast<int>(ceil_div(weight.cols, kStep));
  arguments.num_tiles = static_cast<int>(ceil_div(weight.rows, kTile));
  arguments.part_steps = num_steps / arguments.num_parts;
  arguments.num_longer_parts = num_steps % arguments.num_parts;
  arguments.y = {problem.output,
                 problem.bias,
                 arguments.num_parts == 1 ? nullptr : static_cast<float*>(problem.workspace),
                 static_cast<int>(problem.m),
                 static_cast<int>(weight.rows),
                 is_aligned(problem.output, 16) && weight.rows % 8 == 0};
  arguments.rows = static_cast<int>(weight.rows);
  arguments.cols = static_cast<int>(weight.cols);
  arguments.is_weight_aligned = is_aligned(weight.packed, 16);
  arguments.is_x_aligned = is_aligned(problem.input, 16);
  arguments.are_scales_aligned = weight.block_size == kBlockCols && weight.cols % kStep == 0 &&
                                 is_aligned(weight.absmax_codes, 4) && is_aligned(weight.absmax, 16);
  Maps maps = {};
  if (arguments.is_weight_aligned) {
    maps.weight = describe_matrix(weight.packed, 1, kRowBytes, weight.rows, weight.cols / 2, kTile);
    maps.prefetch = describe_matrix(weight.packed, kPrefetchValueBytes, kPrefetchSteps * kRowBytes, weight.rows,
                                    weight.cols / 2 / kPrefetchValueBytes, kTile);
  }
  dispatch_dtype(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      arguments.scale_factor = 1.0f / PairTable<T>::scale(format);
      dispatch_bool(weight.absmax_codes != nullptr, [&](auto nested) {
        dispatch_constant<16, 32, 64>("narrow_sm90", tokens_of(problem), [&](auto tokens) {
          const auto kernel = narrow_kernel<T, tokens(), nested()>;
          const auto* const pointer = reinterpret_cast<const void*>(kernel);
          allow_shared_bytes(device, pointer, kSharedBytes<tokens()>);
          if (arguments.is_x_aligned) maps.x = describe_matrix(problem.input, 2, 128, problem.m, weight.cols, tokens());
          const unsigned blocks =
              grid_size(int64_t{arguments.num_tiles} * arguments.num_parts, 1, device.num_multiprocessors);
          launch_early("narrow_kernel", kernel, LaunchShape{blocks, kThreads, kSharedBytes<tokens()>}, device, stream,
                       arguments, maps, PairTable<T>::values(format));
        });
      });
    }
  });
  if (arguments.num_parts > 1) {
    add_products(arguments.y, arguments.num_parts, problem.dtype, device, stream);
  }
}

}  // namespace qlora
