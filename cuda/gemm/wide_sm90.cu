// y = x W^T + bias for up to 256 rows of x on Hopper's wgmma: the weight is read once from HBM and decoded once, to the
// registers from which the tensor cores take it.
//
//   block     a tile of 128 rows of W against all rows of x, over a part of k. Warpgroup 0 copies, 1 and 2 multiply 64
//             rows of W each; work items are dealt in turn to as many blocks as there are multiprocessors.
//   x         the 64-row operand's counterpart, kTokens columns: through a ring of stages of 64 values of k
//   W         through a ring of stages of 128 x 256; its scales are decoded by the warpgroup that copies
//   decode    lane i of a quad owns byte i of every 32-bit word, as the operand's layout and the order of x ask
//   scale     up to 128 rows: the table's pair as it is, the products of 64 columns of W summed from zero and then scaled
//             in fp32; above: fp32 values, scaled and rounded to the dtype, since registers hold no second sum
//   parts     where tiles are fewer than multiprocessors k is split: fp32 parts in the workspace, added in their order
//
// Rounding: see PairTable up to 128 rows; above, weights rounded to the dtype as dequantize_4bit rounds them.
#include <algorithm>
#include <cstdint>

#include "core/status.h"
#include "cuda/device/barrier.cuh"
#include "cuda/device/copy_async.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/wgmma.cuh"
#include "cuda/dispatch.h"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/split.h"
#include "cuda/launch.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumers = 2;    // warpgroups
constexpr int kThreads = kWarpgroup * (1 + kConsumers);
constexpr int kTileRows = 64 * kConsumers;  // of W
constexpr int kBlockCols = 64;              // of W, with one scale a row
constexpr int kStepBlocks = 4;              // of a stage of W: 128 bytes of a row
constexpr int kStepCols = kBlockCols * kStepBlocks;
constexpr int kStepBytes = kStepCols / 2;
constexpr int kMaxTokens = 256;
constexpr int kWeightStages = 3;

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
  bool are_scales_aligned;  // the 4 scales of a stage's row are 4 or 16 aligned bytes in one nested block
};

struct WeightStage {
  unsigned char bytes[kTileRows][kStepBytes];  // the 16-byte piece p of row r at place p ^ r % 8
  float4 scales[kTileRows];                    // of the 4 blocks
};

template <int kTokens>
struct Stages {
  static constexpr int kBytes = kTokens * kBlockCols * 2;
  static constexpr int kCount = kTokens == 256 ? 3 : kTokens == 128 ? 6 : 8;
};

// Shared memory: this, the pair table at the first multiple of 64 KiB, the stages of x behind it.
struct Shared {
  WeightStage weight[kWeightStages];
  float nested_code[256];
  Barrier weight_full[kWeightStages];
  Barrier weight_empty[kWeightStages];
  Barrier x_full[8];
  Barrier x_empty[8];
};
constexpr int kTableAlignment = FloatPairTable::kBytes;
constexpr int kReservedBytes = 1024;  // that CUDA puts before a block's shared memory
static_assert(sizeof(Shared) + kReservedBytes <= kTableAlignment);

template <int kTokens>
constexpr int kSharedBytes = 2 * kTableAlignment - kReservedBytes + Stages<kTokens>::kCount * Stages<kTokens>::kBytes;

template <int kTokens, typename T>
struct TableOf {
  static constexpr bool kIsExact = kTokens > 128;
  using Table = std::conditional_t<kIsExact, FloatPairTable, PairTable<T>>;
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A block's share of the work: items blockIdx.x, blockIdx.x + gridDim.x, ..; an item is a tile and a part of k.
struct Item {
  int tile;
  int part;
  int step_begin;
  int step_end;

  __device__ Item(const Arguments& arguments, int index) {
    const int num_steps = (arguments.k + kStepCols - 1) / kStepCols;
    const int num_tiles = (arguments.n + kTileRows - 1) / kTileRows;
    tile = index % num_tiles;  // Neighbouring tiles at once: their rows share pages of memory.
    part = index / num_tiles;
    step_begin = static_cast<int>(int64_t{num_steps} * part / arguments.num_parts);
    step_end = static_cast<int>(int64_t{num_steps} * (part + 1) / arguments.num_parts);
  }
};

__device__ __forceinline__ int num_items(const Arguments& arguments) {
  return (arguments.n + kTileRows - 1) / kTileRows * arguments.num_parts;
}

// 16 bytes, or zeros.
__device__ __forceinline__ void copy_16_bytes_or_zero_async(uint32_t shared, const void* global, bool is_there) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(is_there ? 16 : 0)
               : "memory");
}

// What a thread of the copying warpgroup reads of a row's scales of a step, not yet decoded.
template <bool kIsNested>
struct RawScales {
  uint32_t codes = 0;
  float values[kStepBlocks] = {};  // absmax, or nested_absmax

  __device__ __forceinline__ RawScales(const Arguments& arguments, int row, int step) {
    const Scales& scales = arguments.scales;
    const int64_t first = int64_t{row} * arguments.k + step * kStepCols;
    if (arguments.are_scales_aligned) {
      const int64_t block = first / kBlockCols;
      if constexpr (kIsNested) {
        codes = *reinterpret_cast<const uint32_t*>(scales.codes + block);
        const float absmax = scales.nested_absmax[block / kNestedBlockSize];
#pragma unroll
        for (float& value : values) value = absmax;
      } else {
        const float4 four = *reinterpret_cast<const float4*>(scales.absmax + block);
        values[0] = four.x;
        values[1] = four.y;
        values[2] = four.z;
        values[3] = four.w;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kStepBlocks; ++i) {
      if (step * kStepCols + i * kBlockCols >= arguments.k) break;
      const int64_t block = (first + i * kBlockCols) >> scales.log2_block_size;
      if constexpr (kIsNested) {
        codes |= static_cast<uint32_t>(scales.codes[block]) << i * 8;
        values[i] = scales.nested_absmax[block / kNestedBlockSize];
      } else {
        values[i] = scales.absmax[block];
      }
    }
  }

  __device__ __forceinline__ float4 decode(const float* nested_code, float nested_offset, float factor) const {
    float scales[kStepBlocks];
#pragma unroll
    for (int i = 0; i < kStepBlocks; ++i) {
      scales[i] = values[i];
      if constexpr (kIsNested) {
        scales[i] = __fadd_rn(__fmul_rn(nested_code[codes >> i * 8 & 0xFF], values[i]), nested_offset);
      }
      scales[i] *= factor;
    }
    return make_float4(scales[0], scales[1], scales[2], scales[3]);
  }
};

// Warpgroup 0: fills the rings.
template <int kTokens, bool kIsNested>
__device__ __forceinline__ void copy_operands(const Arguments& arguments, Shared& shared, unsigned char* x_stages) {
  constexpr int kXStages = Stages<kTokens>::kCount;
  const int thread = threadIdx.x;  // of the warpgroup
  const int num_steps = (arguments.k + kStepCols - 1) / kStepCols;
  const float nested_offset = kIsNested ? *arguments.scales.nested_offset : 0.0f;
  RingPlace<kWeightStages> weight_place;
  RingPlace<kXStages> x_place;
  for (int index = blockIdx.x; index < num_items(arguments); index += gridDim.x) {
    const Item item(arguments, index);
    const int first_row = item.tile * kTileRows;
    const int last_row = arguments.n - 1;  // that rows behind the last repeat
    const int scale_row = min(first_row + thread, last_row);
    RawScales<kIsNested> raw(arguments, scale_row, item.step_begin);
    for (int step = item.step_begin; step < item.step_end; ++step) {
      WeightStage& stage = shared.weight[weight_place.stage()];
      wait(shared.weight_empty[weight_place.stage()], weight_place.free_parity());
      const int piece = thread % 8;
      const bool is_inside = step * kStepBytes + piece * 16 < arguments.k / 2;
#pragma unroll 2
      for (int i = 0; i < kTileRows / 16; ++i) {
        const int row = thread / 8 + i * 16;
        const uint8_t* const source = arguments.packed + int64_t{min(first_row + row, last_row)} * (arguments.k / 2) +
                                      step * kStepBytes + piece * 16;
        copy_16_bytes_or_zero_async(shared_address(&stage.bytes[row][(piece ^ row % 8) * 16]),
                                    is_inside ? source : arguments.packed, is_inside);
      }
      stage.scales[thread] = raw.decode(shared.nested_code, nested_offset, arguments.table_scale_inverse);
      arrive_after_copies(shared.weight_full[weight_place.stage()]);
      arrive(shared.weight_full[weight_place.stage()]);
      weight_place.advance();
      if (step + 1 < item.step_end) raw = RawScales<kIsNested>(arguments, scale_row, step + 1);
      if (step + kWeightStages < num_steps) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(arguments.packed + int64_t{scale_row} * (arguments.k / 2) +
                                                      (step + kWeightStages) * kStepBytes));
      }
#pragma unroll 1
      for (int block = 0; block < kStepBlocks; ++block) {
        const int col = step * kStepCols + block * kBlockCols;
        if (col >= arguments.k) break;
        wait(shared.x_empty[x_place.stage()], x_place.free_parity());
        const uint32_t target = shared_address(x_stages + x_place.stage() * Stages<kTokens>::kBytes);
#pragma unroll 4
        for (int i = 0; i < kTokens / 16; ++i) {
          const int token = thread / 8 + i * 16;
          const bool is_there = token < arguments.m;
          const auto* const source =
              static_cast<const uint8_t*>(arguments.x) + (int64_t{token} * arguments.k + col) * 2 + piece * 16;
          copy_16_bytes_or_zero_async(target + token * 128 + (piece ^ token % 8) * 16,
                                      is_there ? source : arguments.x, is_there);
        }
        arrive_after_copies(shared.x_full[x_place.stage()]);
        x_place.advance();
      }
    }
  }
}

// The operand fragments of a lane for a block of 64 columns: 4 products of 16.
using Fragments = uint32_t[4][4];

template <typename T, int kTokens>
class Consumer {
 public:
  static constexpr bool kIsExact = TableOf<kTokens, T>::kIsExact;
  static constexpr int kCols = kTokens < 128 ? kTokens : 128;  // of a product
  static constexpr int kHalves = kTokens / kCols;
  using Table = typename TableOf<kTokens, T>::Table;

  __device__ __forceinline__ Consumer(const Arguments& arguments, Shared& shared, const unsigned char* table,
                                      const unsigned char* x_stages)
      : arguments_(arguments), shared_(shared), table_(table), x_(describe_columns(x_stages)) {}

  __device__ __forceinline__ void run() {
    for (int index = blockIdx.x; index < num_items(arguments_); index += gridDim.x) {
      const Item item(arguments_, index);
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (float& sum : sums_[h]) sum = 0.0f;
      }
      for (int step = item.step_begin; step < item.step_end; ++step) multiply_step(step, item);
      if constexpr (kIsExact) {
        wait_for_products<0>();
        release_x();
        held_x_ = -1;
      }
      store(item);
    }
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  // First of the two rows of the tile that the lane holds; the other is 8 further.
  static __device__ __forceinline__ int row() {
    return (threadIdx.x / kWarpgroup - 1) * 64 + threadIdx.x % kWarpgroup / 32 * 16 + lane() / 4;
  }

  __device__ __forceinline__ void wait_for_weight() {
    wait(shared_.weight_full[weight_place_.stage()], weight_place_.parity());
    const WeightStage& stage = shared_.weight[weight_place_.stage()];
    scales_[0] = stage.scales[row()];
    scales_[1] = stage.scales[row() + 8];
  }

  __device__ __forceinline__ void release_weight() {
    __syncwarp();
    if (lane() == 0) arrive(shared_.weight_empty[weight_place_.stage()]);
    weight_place_.advance();
  }

  __device__ __forceinline__ void release_x() {
    __syncwarp();
    if (lane() == 0) arrive(shared_.x_empty[held_x_]);
  }

  template <int kBlock>
  __device__ __forceinline__ float scale(int half) const {
    const float4& four = scales_[half];
    return kBlock == 0 ? four.x : kBlock == 1 ? four.y : kBlock == 2 ? four.z : four.w;
  }

  template <int kBlock>
  __device__ __forceinline__ void decode(Fragments& a) const {
    const WeightStage& stage = shared_.weight[weight_place_.stage()];
    const uint32_t selector = table_selector(lane() % 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const unsigned char* const bytes = stage.bytes[row() + 8 * h];
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const uint4 words = *reinterpret_cast<const uint4*>(bytes + ((2 * kBlock + p) ^ lane() / 4) * 16);
        a[2 * p][h] = value<kBlock>(words.x, selector, h);
        a[2 * p][2 + h] = value<kBlock>(words.y, selector, h);
        a[2 * p + 1][h] = value<kBlock>(words.z, selector, h);
        a[2 * p + 1][2 + h] = value<kBlock>(words.w, selector, h);
      }
    }
  }

  template <int kBlock>
  __device__ __forceinline__ uint32_t value(uint32_t word, uint32_t selector, int half) const {
    if constexpr (kIsExact) {
      const float2 pair = table_.pair(word, selector);
      const float scaled[2] = {pair.x * scale<kBlock>(half), pair.y * scale<kBlock>(half)};
      return Word<T>::pack(scaled);
    } else {
      return table_.pair(word, selector);
    }
  }

  __device__ __forceinline__ void multiply_step(int step, const Item& item) {
    const int num_blocks = min(kStepBlocks, arguments_.k / kBlockCols - step * kStepBlocks);
    if (step == item.step_begin) {
      wait_for_weight();
      decode<0>(a_[0]);
    }
    const bool is_last = step + 1 == item.step_end;
    multiply_block<0>(num_blocks, is_last);
    if (num_blocks > 1) multiply_block<1>(num_blocks, is_last);
    if (num_blocks > 2) multiply_block<2>(num_blocks, is_last);
    if (num_blocks > 3) multiply_block<3>(num_blocks, is_last);
  }

  // Block kBlock of the step, whose fragments are decoded; decodes the next while the tensor cores work.
  template <int kBlock>
  __device__ __forceinline__ void multiply_block(int num_blocks, bool is_last) {
    Fragments& a = a_[kBlock % 2];
    const float scale_low = scale<kBlock>(0);
    const float scale_high = scale<kBlock>(1);
    wait(shared_.x_full[x_place_.stage()], x_place_.parity());
    fence_shared();
    fence_registers();
    const uint64_t x = x_ + x_place_.stage() * (Stages<kTokens>::kBytes / 16);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (kIsExact) {
#pragma unroll
        for (int h = 0; h < kHalves; ++h) {
          multiply<T, kCols>(sums_[h], a[j], x + h * (kCols * 128 / 16) + j * kProductStep, true);
        }
      } else {
        multiply<T, kCols>(products_, a[j], x + j * kProductStep, j > 0);
      }
    }
    commit_products();
    if constexpr (kIsExact) {
      wait_for_products<1>();  // of the block before, whose fragments and stage are free now
      if (held_x_ >= 0) release_x();
      held_x_ = x_place_.stage();
    }
    if (kBlock + 1 < num_blocks) {
      decode<(kBlock + 1) % kStepBlocks>(a_[(kBlock + 1) % 2]);
    } else {
      release_weight();
      if (!is_last) {
        wait_for_weight();
        decode<0>(a_[(kBlock + 1) % 2]);
      }
    }
    if constexpr (!kIsExact) {
      wait_for_products<0>();
      hold_registers(products_);
      held_x_ = x_place_.stage();
      release_x();
#pragma unroll
      for (int c = 0; c < kCols / 8; ++c) {
        sums_[0][4 * c] = fmaf(scale_low, products_[4 * c], sums_[0][4 * c]);
        sums_[0][4 * c + 1] = fmaf(scale_low, products_[4 * c + 1], sums_[0][4 * c + 1]);
        sums_[0][4 * c + 2] = fmaf(scale_high, products_[4 * c + 2], sums_[0][4 * c + 2]);
        sums_[0][4 * c + 3] = fmaf(scale_high, products_[4 * c + 3], sums_[0][4 * c + 3]);
      }
    }
    x_place_.advance();
  }

  __device__ __forceinline__ void store(const Item& item) {
    const int first = item.tile * kTileRows + row();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = first + 8 * half;
      if (n >= arguments_.n) continue;
      const bool has_bias = arguments_.parts == nullptr && arguments_.bias != nullptr;
      const float bias = has_bias ? to_float(static_cast<const T*>(arguments_.bias)[n]) : 0.0f;
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int i = 0; i < kCols / 4; ++i) {
          const int token = h * kCols + i / 2 * 8 + lane() % 4 * 2 + i % 2;
          if (token >= arguments_.m) continue;
          const float sum = sums_[h][i / 2 * 4 + half * 2 + i % 2];
          if (arguments_.parts != nullptr) {
            arguments_.parts[(int64_t{item.part} * arguments_.m + token) * arguments_.n + n] = sum;
          } else {
            static_cast<T*>(arguments_.y)[int64_t{token} * arguments_.n + n] = from_float<T>(has_bias ? sum + bias : sum);
          }
        }
      }
    }
  }

  const Arguments& arguments_;
  Shared& shared_;
  Table table_;
  uint64_t x_;  // descriptor of the first stage
  RingPlace<kWeightStages> weight_place_;
  RingPlace<Stages<kTokens>::kCount> x_place_;
  int held_x_ = -1;  // stage that products in flight may read
  float4 scales_[2];
  Fragments a_[2];
  float sums_[kHalves][kCols / 2];
  float products_[kIsExact ? 1 : kCols / 2];
};

#endif

template <typename T, int kTokens, bool kIsNested>
__global__ __launch_bounds__(kThreads, 1) void wide_kernel(const __grid_constant__ Arguments arguments,
                                                           const __grid_constant__ typename TableOf<kTokens, T>::Table::Values
                                                               values) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  unsigned char* const table = shared_bytes + (kTableAlignment - shared_address(shared_bytes) % kTableAlignment);
  unsigned char* const x_stages = table + kTableAlignment;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kWeightStages; ++i) {
      init_barrier(shared.weight_full[i], 2 * kWarpgroup);  // copies and scales
      init_barrier(shared.weight_empty[i], kConsumers * 4);
    }
    for (int i = 0; i < Stages<kTokens>::kCount; ++i) {
      init_barrier(shared.x_full[i], kWarpgroup);
      init_barrier(shared.x_empty[i], kConsumers * 4);
    }
    publish_barriers();
  }
  TableOf<kTokens, T>::Table::template fill<kThreads>(table, values);
  cudaGridDependencySynchronize();
  if (kIsNested && threadIdx.x < 256) shared.nested_code[threadIdx.x] = arguments.scales.nested_code[threadIdx.x];
  __syncthreads();
  cudaTriggerProgrammaticLaunchCompletion();
  if (threadIdx.x < kWarpgroup) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    copy_operands<kTokens, kIsNested>(arguments, shared, x_stages);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
    Consumer<T, kTokens>(arguments, shared, table, x_stages).run();
  }
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
  if (!is_aligned(weight.packed, 16) || !is_aligned(problem.input, 16)) return "expected operands aligned to 16 bytes";
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
  dispatch_dtype(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      dispatch_bool(is_nested, [&](auto nested) {
        dispatch_tokens(tokens_of(problem.m), [&](auto tokens) {
          using TableKind = TableOf<tokens(), T>;
          if constexpr (TableKind::kIsExact) {
            arguments.table_scale_inverse = 1.0f;
          } else {
            arguments.table_scale_inverse = 1.0f / PairTable<T>::scale(format);
          }
          const auto kernel = wide_kernel<T, tokens(), nested()>;
          check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<tokens()>),
                     "cudaFuncSetAttribute(wide_kernel)");
          cudaLaunchAttribute attribute = {};
          attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
          attribute.val.programmaticStreamSerializationAllowed = 1;
          cudaLaunchConfig_t config = {};
          const int64_t items = num_tiles_of(problem) * arguments.num_parts;
          config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(items, device.num_multiprocessors)));
          config.blockDim = dim3(kThreads);
          config.dynamicSmemBytes = kSharedBytes<tokens()>;
          config.stream = stream;
          config.attrs = &attribute;
          config.numAttrs = 1;
          check_cuda(cudaLaunchKernelEx(&config, kernel, arguments, TableKind::Table::values(format)), "wide_kernel");
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
