// dx = dy W for up to 256 rows of dy on Hopper's wgmma (wide_sm90.cuh has the frame): the weight is read once from HBM,
// by rows as it lies there, and transposed on its way to the registers from which the tensor cores take it.
//
//   transpose  ldmatrix deals the packed bytes such that a lane holds bytes 2g and 2g + 1 of rows 2i and 2i + 1 of W
//              (g = lane / 4, i = lane % 4): columns 4g..4g+3 of dx for two neighbouring values of n
//   decode     the two values of a byte in fp32, each scaled with its row's scale and rounded with its neighbour in n;
//              the sum runs over n, so no scale can wait until after it
//   work       a warpgroup multiplies all 128 columns, two operands of 64, by the tokens; warpgroups take turns at
//              blocks of 64 values of n and add up in shared memory at the end; with 256 tokens they have 128 each
//
// Rounding: of weights see ScaledWeightTable; fp32 sums; dx.
#include "cuda/gemm/wide_sm90.cuh"

namespace qlora::wide {

template <int kTokenCount>
struct GradConfig {
  static constexpr int kTokens = kTokenCount;
  static constexpr int kGroups = kTokens <= 32    ? 4
                                 : kTokens <= 128 ? 2
                                                  : 1;    // of warpgroups: each every kGroups-th block
  static constexpr int kShares = kTokens == 256 ? 2 : 1;  // of the tokens, one a warpgroup
  static constexpr int kConsumers = kGroups * kShares * kWarpgroup;
  static constexpr int kReaders = kShares * kWarpgroup / 32;
  static constexpr int kCluster = cluster_of(kTokens);
  static constexpr int kInputStages = kTokens == 256 ? 3 : kTokens == 128 ? 4 : kMaxInputStages;
  static constexpr int kCols = kTokens / kShares;  // of a product
  static constexpr bool kHasWholeSteps = false;
  static constexpr int kExchangeBytes = kGroups == 1 ? 0 : kTile * (kTokens / 2) * 4;
  static constexpr int kCopyRegisters = kConsumers == 512 ? 64 : 56;
  static constexpr int kRegisters = kConsumers == 512 ? 104 : 224;
};

}  // namespace qlora::wide

namespace qlora {
namespace {

using namespace wide;

constexpr int kTileBytes = kTile / 2;  // of a row of W

// For 256 tokens, whose sums fill the registers, the one that needs the fewest.
template <typename T, typename Config>
using GradTable = std::conditional_t<Config::kTokens == 256, FloatPairTable, ScaledWeightTable<T>>;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr int kTileBlocks = kTile / kBlockCols;  // scales of a row
constexpr int kRowsPerThread = kStep / kScaleThreads;

// 4 matrices of 8 rows of 16 bytes, the addresses of rows 8 j.. in lanes 8 j..: word j has the 16-bit columns lane / 4
// of rows 2 (lane % 4), low half, and the next of matrix j.
__device__ __forceinline__ void load_transposed(uint32_t address, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address));
}

// The 2 scales of each of a thread's rows of a step, on their way: load asks for them, store waits.
template <bool kIsNested>
class GradScales {
 public:
  __device__ __forceinline__ void load(const Arguments& arguments, int first, int step) {
    const int num_blocks = min(kTileBlocks, (arguments.cols - first + kBlockCols - 1) / kBlockCols);
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
      const int64_t index = int64_t{min(row(step, i), arguments.rows - 1)} * arguments.cols + first;
#pragma unroll
      for (int b = 0; b < kTileBlocks; ++b) {
        if (b >= num_blocks) continue;
        const int64_t block = (index + b * kBlockCols) >> arguments.scales.log2_block_size;
        if constexpr (kIsNested) {
          codes_[i][b] = arguments.scales.codes[block];
          values_[i][b] = arguments.scales.nested_absmax[block / kNestedBlockSize];
        } else {
          values_[i][b] = arguments.scales.absmax[block];
        }
      }
    }
  }

  // To scales [2][kStep]; 0 for rows behind the last, whose bytes may decode to anything.
  __device__ __forceinline__ void store(const Arguments& arguments, int, int step, const float* nested_code,
                                        float nested_offset, float* scales) const {
#pragma unroll
    for (int i = 0; i < kRowsPerThread; ++i) {
#pragma unroll
      for (int b = 0; b < kTileBlocks; ++b) {
        float scale = values_[i][b];
        if constexpr (kIsNested) {
          scale = __fadd_rn(__fmul_rn(nested_code[codes_[i][b]], scale), nested_offset);
        }
        scales[b * kStep + threadIdx.x + i * kScaleThreads] =
            row(step, i) < arguments.rows ? scale * arguments.scale_factor : 0.0f;
      }
    }
  }

 private:
  static __device__ __forceinline__ int row(int step, int i) { return step * kStep + threadIdx.x + i * kScaleThreads; }

  uint8_t codes_[kRowsPerThread][kTileBlocks] = {};
  float values_[kRowsPerThread][kTileBlocks] = {};
};

// The operand fragments of a lane for 32 values of n: 2 products of 16, for columns 4g, 4g + 1 and 4g + 2, 4g + 3.
using Fragments = uint32_t[2][2][4];

// A warpgroup that multiplies.
template <typename T, typename Config>
class GradConsumer {
 public:
  __device__ __forceinline__ GradConsumer(const Arguments& arguments, Shared& shared, const unsigned char* table,
                                          const unsigned char* input_stages, float* exchange)
      : arguments_(arguments),
        rings_(shared, input_stages),
        table_(table),
        exchange_(exchange),
        group_(keep(Config::kGroups == 1 ? 0 : warpgroup())),
        share_(keep(Config::kShares == 1 ? 0 : warpgroup())),
        weight_(keep(shared_address(shared.weight[0].bytes) + threadIdx.x % 32 * kTileBytes +
                     (warp() ^ threadIdx.x % 32 / 2 % 4) * 16)),
        scales_(keep(shared_address(shared.weight[0].scales) + (warp() / 2 * kStep + threadIdx.x % 4 * 2) * 4)) {}

  __device__ __forceinline__ void run() {
    for_each_item<Config>(arguments_, [&](const auto& item) {
#pragma unroll
      for (auto& operand : sums_) {
#pragma unroll
        for (float& sum : operand) sum = 0.0f;
      }
      for (int step = item.step_begin; step < item.step_end; ++step) multiply_step(step, item);
      wait_for_products<0>();
      hold_registers(sums_[0]);
      hold_registers(sums_[1]);
      if (held_input_ >= 0) rings_.release_input(held_input_);
      held_input_ = -1;
      exchange_sums();
      if (group() == 0) store(item);
    });
  }

 private:
  static constexpr int kCols = Config::kCols;

  static __device__ __forceinline__ int warpgroup() { return threadIdx.x / kWarpgroup - 1; }
  static __device__ __forceinline__ int warp() { return threadIdx.x % kWarpgroup / 32; }  // 32 columns each
  __device__ __forceinline__ int group() const { return Config::kGroups == 1 ? 0 : static_cast<int>(group_); }
  __device__ __forceinline__ int share() const { return Config::kShares == 1 ? 0 : static_cast<int>(share_); }

  // Half `half` of the step's block `block`.
  __device__ __forceinline__ void decode(int block, int half, Fragments& a) const {
    const uint32_t row = block * kInputDepth + half * 32;
    uint32_t words[4];
    load_transposed(weight_ + rings_.weight_offset() + row * kTileBytes, words);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        const float2 scale = load_shared_two_floats(scales_ + rings_.weight_offset() + (row + j * 16 + eight * 8) * 4);
        const uint32_t word = words[2 * j + eight];
#pragma unroll
        for (int operand = 0; operand < 2; ++operand) {
          const float2 even = table_.floats(word, table_selector(operand));
          const float2 odd = table_.floats(word, table_selector(operand + 2));
          const float first[2] = {even.x * scale.x, odd.x * scale.y};
          const float second[2] = {even.y * scale.x, odd.y * scale.y};
          a[j][operand][2 * eight] = Word<T>::pack(first);
          a[j][operand][2 * eight + 1] = Word<T>::pack(second);
        }
      }
    }
  }

  // The warpgroup's blocks of a step, in halves; the next half is decoded while the tensor cores work.
  __device__ __forceinline__ void multiply_step(int step, const Item<Config>& item) {
    const int count = num_inputs<Config>(arguments_, step);
    if (step == item.step_begin) {
      rings_.wait_for_weight();
      if (group() < count) decode(group(), 0, a_[0]);
    }
    const bool is_last = step + 1 == item.step_end;
#pragma unroll 1
    for (int block = group(); block < count; block += Config::kGroups) {
      const uint32_t input = rings_.wait_for_input(block) + share() * (kCols * 128 / 16);
      start_products(a_[0], input);
      wait_for_products<1>();  // those of the half before, whose fragments and stage are free now
      if (held_input_ >= 0) rings_.release_input(held_input_);
      held_input_ = rings_.input_stage(block);
      decode(block, 1, a_[1]);
      start_products(a_[1], input + 2 * kProductStep);
      wait_for_products<1>();
      const int next = block + Config::kGroups;
      if (next < count) {
        decode(next, 0, a_[0]);
      } else {
        rings_.release_weight();
        if (is_last) break;
        rings_.wait_for_weight();
        if (group() < num_inputs<Config>(arguments_, step + 1)) decode(group(), 0, a_[0]);
      }
    }
    if (group() >= count) {  // The last step of all, and too short for this group.
      rings_.release_weight();
    }
    rings_.advance_input(count);
  }

  __device__ __forceinline__ void start_products(const Fragments& a, uint32_t input) {
    fence_registers();
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int operand = 0; operand < 2; ++operand) {
        multiply<T, kCols>(sums_[operand], a[j][operand], input + j * kProductStep, true);
      }
    }
    commit_products();
  }

  // Adds the sums of all groups to those of group 0, in their order, an operand at a time.
  __device__ __forceinline__ void exchange_sums() {
    float* const place = exchange_ + threadIdx.x % kWarpgroup;
#pragma unroll 1
    for (int from = 1; from < Config::kGroups; ++from) {
#pragma unroll
      for (int operand = 0; operand < 2; ++operand) {
        if (group() == from) {
#pragma unroll
          for (int i = 0; i < kCols / 2; ++i) place[i * kWarpgroup] = sums_[operand][i];
        }
        synchronize<Config::kConsumers>(kAllConsumers);
        if (group() == 0) {
#pragma unroll
          for (int i = 0; i < kCols / 2; ++i) sums_[operand][i] += place[i * kWarpgroup];
        }
        synchronize<Config::kConsumers>(kAllConsumers);
      }
    }
  }

  // A lane has columns 4g..4g+3 of its warp's 32.
  __device__ __forceinline__ void store(const Item<Config>& item) const {
    const int col = item.first + warp() * 32 + rings_.lane() / 4 * 4;
    const ProductTarget& target = arguments_.target;
    if (col >= target.width) return;
#pragma unroll
    for (int i = 0; i < kCols / 4; ++i) {
      const int token = item.token + share() * kCols + i / 2 * 8 + rings_.lane() % 4 * 2 + i % 2;
      if (token >= target.m) continue;
      const int low = i / 2 * 4 + i % 2;
      const float4 four = make_float4(sums_[0][low], sums_[0][low + 2], sums_[1][low], sums_[1][low + 2]);
      if (target.parts != nullptr) {
        const int64_t index = (int64_t{item.part} * target.m + token) * target.width + col;
        *reinterpret_cast<float4*>(target.parts + index) = four;
      } else {
        T values[4] = {from_float<T>(four.x), from_float<T>(four.y), from_float<T>(four.z), from_float<T>(four.w)};
        T* const output = static_cast<T*>(target.output) + int64_t{token} * target.width + col;
        if (target.is_aligned) {
          *reinterpret_cast<uint2*>(output) = *reinterpret_cast<const uint2*>(values);
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j) output[j] = values[j];
        }
      }
    }
  }

  const Arguments& arguments_;
  Rings<Config> rings_;
  GradTable<T, Config> table_;
  float* exchange_;
  uint32_t group_;
  uint32_t share_;
  uint32_t weight_;      // shared addresses in the first stage of W: of the lane's row and the warp's bytes
  uint32_t scales_;      // and of the scales of the warp's columns, from n = 2i on
  int held_input_ = -1;  // stage that products in flight may read
  Fragments a_[2];
  float sums_[2][kCols / 2];
};

#endif

}  // namespace

namespace wide {

template <typename T>
struct Grad {
  template <int kTokens>
  using Config = GradConfig<kTokens>;
  template <typename Config>
  using Table = GradTable<T, Config>;

  static int tokens_of(int64_t m) { return m <= 16 ? 16 : m <= 32 ? 32 : m <= 64 ? 64 : m <= 128 ? 128 : 256; }
  template <typename Function>
  static void dispatch_tokens(int64_t m, Function&& f) {
    dispatch_constant<16, 32, 64, 128, 256>("wide_grad_sm90", tokens_of(m), f);
  }
  static constexpr int kMaxRows = kMaxTokens;
  static constexpr bool kFusesLowRank = false;
  static int64_t num_part_floats(int64_t m, int64_t width) { return m * width; }
  static void add(const ProductTarget& target, int num_parts, qlora_dtype dtype, const Device& device,
                  cudaStream_t stream) {
    add_parts(target.parts, num_parts, target.m, target.width, nullptr, target.output, dtype, device, stream);
  }
  static CUtensorMap describe_weight(const qlora_weight_4bit& weight) {
    return describe_matrix(weight.packed, 1, kTileBytes, weight.rows, weight.cols / 2, kStep);
  }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  template <bool kIsNested>
  using Scales = GradScales<kIsNested>;
  template <typename Config>
  using Consumer = GradConsumer<T, Config>;

  static __device__ __forceinline__ int box_col(int first, int) { return first / 2; }
  static __device__ __forceinline__ int box_row(int, int step) { return step * kStep; }

  static __device__ __forceinline__ void copy_plainly(const Arguments& arguments, int first, int step,
                                                      unsigned char* bytes) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kStep * 4; i += kScaleThreads) {
      const int row = i / 4;
      const int col = first / 2 + i % 4 * 16;
      if (col >= arguments.cols / 2) continue;
      const int64_t source = int64_t{min(step * kStep + row, arguments.rows - 1)} * (arguments.cols / 2) + col;
      *reinterpret_cast<uint4*>(bytes + row * kTileBytes + (i % 4 ^ row / 2 % 4) * 16) =
          load_bytes(arguments.packed + source, 16);
    }
  }
#endif
};

}  // namespace wide

bool supports_wide_grad_sm90(const Gemm& problem, const Device& device, std::string* why_not) {
  if (problem.direction != Direction::kGradInput) return refuse(why_not, "expected the input gradient");
  return supports<Grad>(problem, device, why_not);
}

int64_t wide_grad_sm90_workspace_size(const Gemm& problem, const Device& device) {
  return workspace_size<Grad>(problem, device);
}

void wide_grad_sm90(const Gemm& problem, const Device& device, cudaStream_t stream) {
  run_wide<Grad>(problem, device, stream);
}

}  // namespace qlora
