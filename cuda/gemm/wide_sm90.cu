// y = x W^T + bias for up to 256 rows of x on Hopper's wgmma (wide_sm90.cuh has the frame): the weight is read once
// from HBM and decoded once, to the registers from which the tensor cores take it.
//
//   decode    lane i of a quad owns byte i of every 32-bit word of W, as the operand's layout and the order of x ask
//   scale     the table's pair as it is: the products of 64 columns of W are summed from zero and then scaled, in fp32
//   work      pairs of warpgroups, 64 rows of W each; of two pairs each takes every second block of 64 columns
//
// Rounding: see PairTable; fp32 sums; y.
#include "cuda/gemm/wide_sm90.cuh"

namespace qlora::wide {

template <int kTokenCount>
struct ForwardConfig {
  static constexpr int kTokens = kTokenCount;
  static constexpr int kPairs = kTokens <= 64 ? 2 : 1;  // of warpgroups that multiply
  static constexpr int kConsumers = 2 * kPairs * kWarpgroup;
  static constexpr int kReaders = 2 * kWarpgroup / 32;
  static constexpr int kCluster = cluster_of(kTokens);
  static constexpr int kInputStages = kTokens == 256 ? 3 : kTokens == 128 ? 6 : kMaxInputStages;
  static constexpr int kCols = kTokens < 128 ? kTokens : 128;  // of a product
  static constexpr int kHalves = kTokens / kCols;
  static constexpr int kBuffers = kTokens == 64 || kTokens == 256 ? 1 : 2;  // with 2 the next block is decoded ahead
  static constexpr int kExchangeBytes = (kPairs - 1) * kTile * kTokens * 4;
  static constexpr int kCopyRegisters = kPairs == 2 ? 64 : 56;
  static constexpr int kRegisters = kPairs == 2 ? 104 : 224;
};

}  // namespace qlora::wide

namespace qlora {
namespace {

using namespace wide;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A row's 4 scales of a step, on their way: load asks for them, store waits.
template <bool kIsNested>
class StepScales {
 public:
  __device__ __forceinline__ void load(const Arguments& arguments, int first, int step) {
    if (!arguments.are_scales_aligned) return;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t block = (int64_t{row(arguments, first, i)} * arguments.cols + step * kStep) / kBlockCols;
      if constexpr (kIsNested) {
        codes_[i] = *reinterpret_cast<const uint32_t*>(arguments.scales.codes + block);
        values_[i].x = arguments.scales.nested_absmax[block / kNestedBlockSize];
      } else {
        values_[i] = *reinterpret_cast<const float4*>(arguments.scales.absmax + block);
      }
    }
  }

  // To scales [kTile][4].
  __device__ __forceinline__ void store(const Arguments& arguments, int first, int step, const float* nested_code,
                                        float nested_offset, float* scales) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float4 four = values_[i];
      if (!arguments.are_scales_aligned) {
        four = load_plainly(arguments, row(arguments, first, i), step);
      } else if constexpr (kIsNested) {
        const auto scale = [&](int b) {
          return __fadd_rn(__fmul_rn(nested_code[codes_[i] >> b * 8 & 0xFF], values_[i].x), nested_offset);
        };
        four = make_float4(scale(0), scale(1), scale(2), scale(3));
      }
      const float factor = arguments.scale_factor;
      reinterpret_cast<float4*>(scales)[threadIdx.x + i * kScaleThreads] =
          make_float4(four.x * factor, four.y * factor, four.z * factor, four.w * factor);
    }
  }

 private:
  static constexpr int kRows = kTile / kScaleThreads;

  // Rows behind the last repeat it.
  static __device__ __forceinline__ int row(const Arguments& arguments, int first, int i) {
    return min(first + static_cast<int>(threadIdx.x) + i * kScaleThreads, arguments.rows - 1);
  }

  static __device__ __noinline__ float4 load_plainly(const Arguments& arguments, int row, int step) {
    float scales[kStepInputs] = {};
#pragma unroll
    for (int i = 0; i < kStepInputs; ++i) {
      const int col = step * kStep + i * kBlockCols;
      if (col < arguments.cols) scales[i] = load_scale(arguments.scales, int64_t{row} * arguments.cols + col);
    }
    return make_float4(scales[0], scales[1], scales[2], scales[3]);
  }

  uint32_t codes_[kRows];
  float4 values_[kRows];  // absmax; nested_absmax in x
};

// The operand fragments of a lane for a block of 64 columns: 4 products of 16.
using Fragments = uint32_t[4][4];

// A warpgroup that multiplies.
template <typename T, typename Config>
class ForwardConsumer {
 public:
  __device__ __forceinline__ ForwardConsumer(const Arguments& arguments, Shared& shared, const unsigned char* table,
                                             const unsigned char* input_stages, float* exchange)
      : arguments_(arguments),
        rings_(shared, input_stages),
        table_(table),
        exchange_(exchange),
        pair_(keep(warpgroup() / 2)),
        selector_(keep(table_selector(threadIdx.x % 4))),
        weight_(keep(shared_address(shared.weight[0].bytes) + row() * kRowBytes)),
        scales_(keep(shared_address(shared.weight[0].scales) + row() * kStepInputs * 4)),
        swizzle_(keep(threadIdx.x % 32 / 4 * 16)) {}

  __device__ __forceinline__ void run() {
    if (Config::kPairs == 1 && warpgroup() == 1) give_turn();
    for_each_item<Config::kCluster>(arguments_, [&](const auto& item) {
#pragma unroll
      for (auto& half : sums_) {
#pragma unroll
        for (float& sum : half) sum = 0.0f;
      }
      for (int step = item.step_begin; step < item.step_end; ++step) multiply_step(step, item);
      if (Config::kPairs == 1 || exchange_sums()) store(item);
    });
    if (Config::kPairs == 1 && warpgroup() == 0) wait_for_turn();
  }

 private:
  static constexpr int kCols = Config::kCols;
  static constexpr int kRowBytes = kStep / 2;  // of a stage; the 16-byte piece p of row r at place p ^ r % 8

  static __device__ __forceinline__ int warpgroup() { return threadIdx.x / kWarpgroup - 1; }
  __device__ __forceinline__ int pair() const { return Config::kPairs == 1 ? 0 : static_cast<int>(pair_); }
  // First of the two rows of the tile that the lane holds; the other is 8 further.
  static __device__ __forceinline__ int row() {
    return warpgroup() % 2 * 64 + threadIdx.x % kWarpgroup / 32 * 16 + threadIdx.x % 32 / 4;
  }

  __device__ __forceinline__ float scale(int block, int half) const {
    return load_shared_float(scales_ + rings_.weight_offset() + (half * 8 * kStepInputs + block) * 4);
  }

  __device__ __forceinline__ void decode(int block, Fragments& a) const {
    const uint32_t source = weight_ + rings_.weight_offset() + ((block * 32) ^ swizzle_);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const uint4 words = load_shared_16_bytes((source ^ p * 16) + h * 8 * kRowBytes);
        a[2 * p][h] = table_.pair(words.x, selector_);
        a[2 * p][2 + h] = table_.pair(words.y, selector_);
        a[2 * p + 1][h] = table_.pair(words.z, selector_);
        a[2 * p + 1][2 + h] = table_.pair(words.w, selector_);
      }
    }
  }

  // Two warpgroups take turns at the tensor cores, so that one adds up its products while the other's are computed.
  static __device__ __forceinline__ void wait_for_turn() { synchronize<2 * kWarpgroup>(kTurnOfFirst + warpgroup()); }
  static __device__ __forceinline__ void give_turn() { arrive_at<2 * kWarpgroup>(kTurnOfSecond - warpgroup()); }

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
    const int count = num_inputs(arguments_, step);
    if (Config::kBuffers == 1 || step == item.step_begin) rings_.wait_for_weight();
    if (Config::kBuffers == 2 && step == item.step_begin && pair() < count) decode(pair(), a_[0]);
    const bool is_last = step + 1 == item.step_end;
#pragma unroll 1
    for (int block = pair(); block < count; block += Config::kPairs * Config::kBuffers) {
      multiply_block<0>(block, count, is_last);
      if constexpr (Config::kBuffers == 2) {
        if (block + Config::kPairs < count) multiply_block<1>(block + Config::kPairs, count, is_last);
      }
    }
    if (Config::kBuffers == 1 || pair() >= count) rings_.release_weight();
    rings_.advance_input(count);
  }

  template <int kBuffer>
  __device__ __forceinline__ void multiply_block(int block, int count, bool is_last) {
    const float scale_low = scale(block, 0);
    const float scale_high = scale(block, 1);
    const int stage = rings_.input_stage(block);
    if constexpr (Config::kBuffers == 1) decode(block, a_[0]);
    const uint64_t x = rings_.wait_for_input(block);
    start_products(a_[kBuffer], x);
    if constexpr (Config::kBuffers == 2) decode_ahead(block + Config::kPairs, count, is_last, a_[1 - kBuffer]);
#pragma unroll
    for (int h = 0; h < Config::kHalves; ++h) {
      wait_for_products<0>();
      hold_registers(products_);
      if (h == Config::kHalves - 1) rings_.release_input(stage);
      add_products(sums_[h], scale_low, scale_high);
      if (h < Config::kHalves - 1) start_products(a_[kBuffer], x + (h + 1) * (kCols * 128 / 16));
    }
  }

  // A step of another number of blocks than kStepInputs is the last of its item: each begins with the first buffer.
  __device__ __forceinline__ void decode_ahead(int block, int count, bool is_last, Fragments& a) {
    if (block >= count) {
      rings_.release_weight();
      if (is_last) return;
      rings_.wait_for_weight();
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
    synchronize<Config::kConsumers>(kAllConsumers);
    if (pair() == 0) {
#pragma unroll
      for (int i = 0; i < kCols / 2; ++i) sums_[0][i] += place[i * kCount];
    }
    synchronize<Config::kConsumers>(kAllConsumers);
    return pair() == 0;
  }

  __device__ __forceinline__ void store(const Item<Config::kCluster>& item) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = item.first + row() + 8 * half;
      if (n >= arguments_.width) continue;
      const bool has_bias = arguments_.parts == nullptr && arguments_.bias != nullptr;
      const float bias = has_bias ? to_float(static_cast<const T*>(arguments_.bias)[n]) : 0.0f;
#pragma unroll
      for (int h = 0; h < Config::kHalves; ++h) {
#pragma unroll
        for (int i = 0; i < kCols / 4; ++i) {
          const int token = h * kCols + i / 2 * 8 + rings_.lane() % 4 * 2 + i % 2;
          if (token >= arguments_.m) continue;
          const float sum = sums_[h][i / 2 * 4 + half * 2 + i % 2];
          if (arguments_.parts != nullptr) {
            arguments_.parts[(int64_t{item.part} * arguments_.m + token) * arguments_.width + n] = sum;
          } else {
            static_cast<T*>(arguments_.output)[int64_t{token} * arguments_.width + n] =
                from_float<T>(has_bias ? sum + bias : sum);
          }
        }
      }
    }
  }

  const Arguments& arguments_;
  Rings<Config> rings_;
  PairTable<T> table_;
  float* exchange_;
  uint32_t pair_;
  uint32_t selector_;
  uint32_t weight_;   // shared addresses in the first stage of W: of the row's bytes
  uint32_t scales_;   // and of its scales
  uint32_t swizzle_;  // of the row
  Fragments a_[Config::kBuffers];
  float sums_[Config::kHalves][kCols / 2];
  float products_[kCols / 2];  // not yet scaled
};

#endif

}  // namespace

namespace wide {

template <typename T>
struct Forward {
  template <int kTokens>
  using Config = ForwardConfig<kTokens>;
  using Table = PairTable<T>;

  static float scale_factor(Format format) { return 1.0f / PairTable<T>::scale(format); }
  static CUtensorMap describe_weight(const qlora_weight_4bit& weight) {
    return describe_matrix(weight.packed, 1, kStep / 2, weight.rows, weight.cols / 2, kTile);
  }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  template <bool kIsNested>
  using Scales = StepScales<kIsNested>;
  template <typename Config>
  using Consumer = ForwardConsumer<T, Config>;

  static __device__ __forceinline__ int box_col(int, int step) { return step * (kStep / 2); }
  static __device__ __forceinline__ int box_row(int first, int) { return first; }

  static __device__ __forceinline__ void copy_plainly(const Arguments& arguments, int first, int step,
                                                      unsigned char* bytes) {
    const int row_bytes = arguments.cols / 2;
#pragma unroll 1
    for (int i = threadIdx.x; i < kTile * 8; i += kScaleThreads) {
      const int row = i / 8;
      const int first_byte = step * (kStep / 2) + i % 8 * 16;
      if (first_byte >= row_bytes) continue;
      const int64_t source = int64_t{min(first + row, arguments.rows - 1)} * row_bytes + first_byte;
      *reinterpret_cast<uint4*>(bytes + row * (kStep / 2) + (i % 8 ^ row % 8) * 16) =
          load_bytes(arguments.packed + source, 16);
    }
  }
#endif
};

}  // namespace wide

bool supports_wide_sm90(const Gemm& problem, const Device& device, std::string* why_not) {
  if (problem.direction != Direction::kForward) return refuse(why_not, "expected the forward product");
  return supports<Forward>(problem, device, why_not);
}

int64_t wide_sm90_workspace_size(const Gemm& problem, const Device& device) { return workspace_size(problem, device); }

void wide_sm90(const Gemm& problem, const Device& device, cudaStream_t stream) {
  run_wide<Forward>(problem, device, stream);
}

}  // namespace qlora
