// y = x W^T + bias on Hopper's wgmma (wide_sm90.cuh has the frame): the weight is decoded, once for 256 rows of x, to
// the registers from which the tensor cores take it. Up to 64 rows narrow_sm90 is faster.
//
//   work      two warpgroups, 64 rows of W each; of W the next block of 64 columns is decoded (WeightOperand) while the
//             tensor cores work
//   scale     up to 128 rows of x that of the products of a block, summed from zero, in fp32; the warpgroups take turns
//             at the tensor cores, so that one adds up its products while the other's are computed. Of more rows there
//             are more products than weights: then that of the weights, and the tensor cores sum without a pause.
//             (Measured on an H100, 14336 x 4096: products 32.1 and 61.6 µs at 128 and 256 rows, weights 34.9
//             and 53.3.)
//
// Rounding: of products see PairTable, of weights ScaledWeightTable; fp32 sums; y.
#include "cuda/gemm/add_products.h"
#include "cuda/gemm/low_rank_operand.cuh"
#include "cuda/gemm/weight_operand.cuh"
#include "cuda/gemm/wide_sm90.cuh"

namespace qlora::wide {

template <int kTokenCount>
struct ForwardConfig {
  static constexpr int kTokens = kTokenCount;
  static constexpr int kGroups = 1;
  static constexpr int kConsumers = 2 * kWarpgroup;
  static constexpr int kCluster = cluster_of(kTokens);
  static constexpr int kInputStages = kTokens == 256 ? 3 : kStepInputs;
  static constexpr int kCols = 128;  // of a product
  static constexpr bool kScalesWeights = kTokens == 256;
  static constexpr int kExchangeBytes = 0;
  static constexpr int kCopyRegisters = 56;
  static constexpr int kRegisters = 224;
};

}  // namespace qlora::wide

namespace qlora {
namespace {

using namespace wide;

template <typename T, typename Config>
using ForwardTable = std::conditional_t<Config::kScalesWeights, ScaledWeightTable<T>, PairTable<T>>;

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Of the lane's two rows of W, for a block.
struct RowScales {
  float of[2];
};

// A warp's 16 rows of W with their scales.
template <typename T, typename Config>
class ForwardOperand {
 public:
  __device__ __forceinline__ ForwardOperand(const Shared& shared, const unsigned char* table, int = 0)
      : operand_(shared.weight[0].bytes, table, first_product_col()),
        scales_(
            keep(shared_address(shared.weight[0].scales) + (first_product_col() + Operand::row()) * kStepInputs * 4)) {}

  __device__ __forceinline__ RowScales load_scales(uint32_t offset, int block) const {
    const uint32_t place = scales_ + offset + block * 4;
    return {{load_shared_float(place), load_shared_float(place + 8 * kStepInputs * 4)}};
  }
  __device__ __forceinline__ void decode(uint32_t offset, int block, Fragments& a) const {
    if constexpr (Config::kScalesWeights) {
      operand_.template decode_scaled<T>(offset, block, load_scales(offset, block).of, a);
    } else {
      operand_.decode(offset, block, a);
    }
  }
  __device__ __forceinline__ void load_values(const Shared&, uint32_t offset, Fragments& a) const {
    operand_.load_values(offset, a);
  }

 private:
  using Operand = WeightOperand<ForwardTable<T, Config>>;

  Operand operand_;
  uint32_t scales_;  // shared address in the first stage, of those of the lane's first row
};

template <typename T, int kCols>
__device__ __forceinline__ void store_products(const Arguments& arguments, Shared& shared, int first, int token,
                                               int part, const float* sums) {
  if (arguments.target.parts != nullptr) {
    store_part<kCols>(sums, arguments.target, part, first, token / kProductTokens);
  } else {
    store_product<T, kCols>(sums, arguments.target, first, token / kProductTokens,
                            shared.staging[threadIdx.x / 32 - kWarpgroup / 32]);
  }
}

// A warpgroup that scales products: those of a block, summed from zero.
template <typename T, typename Config>
class ProductConsumer {
 public:
  __device__ __forceinline__ ProductConsumer(const Arguments& arguments, Shared& shared, const unsigned char* table,
                                             const unsigned char* input_stages, float*)
      : arguments_(arguments), shared_(shared), rings_(shared, input_stages), operand_(shared, table) {}

  __device__ __forceinline__ void run() {
    if (warpgroup() == 1) give_turn();
    for_each_item<Config>(arguments_, [&](const auto& item) {
#pragma unroll
      for (float& sum : sums_) sum = 0.0f;
      rings_.wait_for_weight();
      operand_.decode(rings_.weight_offset(), 0, a_[0]);
#pragma unroll 1
      for (int step = item.step_begin; step < item.step_end; ++step) multiply_step(step + 1 == item.step_end);
      add_low_rank(item);
      store_products<T, kCols>(arguments_, shared_, item.first + first_product_col(), item.token, item.part, sums_);
    });
    if (warpgroup() == 0) wait_for_turn();
  }

 private:
  static constexpr int kCols = Config::kCols;
  static_assert(kCols == Config::kTokens);

  static __device__ __forceinline__ int warpgroup() { return threadIdx.x / kWarpgroup - 1; }
  static __device__ __forceinline__ void wait_for_turn() { synchronize<2 * kWarpgroup>(kTurnOfFirst + warpgroup()); }
  static __device__ __forceinline__ void give_turn() { arrive_at<2 * kWarpgroup>(kTurnOfSecond - warpgroup()); }

  // The step's block, or of the next step, if there is one, the first.
  __device__ __forceinline__ void decode_ahead(int block, bool is_last, Fragments& a) {
    if (block == kStepInputs) {
      rings_.release_weight();
      if (is_last) return;
      rings_.wait_for_weight();
      block = 0;
    }
    operand_.decode(rings_.weight_offset(), block, a);
  }

  // The fragments of the step's first block are there, and at the end those of the next step's, if there is one.
  __device__ __forceinline__ void multiply_step(bool is_last) {
#pragma unroll
    for (int block = 0; block < kStepInputs; ++block) {
      const uint32_t x = __shfl_sync(0xFFFFFFFFu, rings_.wait_for_input(0), 0);
      const RowScales scales = operand_.load_scales(rings_.weight_offset(), block);
      wait_for_turn();
      start(products_, a_[block % 2], x, false);
      give_turn();
      decode_ahead(block + 1, is_last, a_[(block + 1) % 2]);
      wait_for_products<0>();
      hold_registers(products_);
      rings_.release_input(rings_.input_stage(0));
      add_scaled(sums_, products_, scales.of[0], scales.of[1]);
      rings_.advance_input(1);
    }
  }

  // The low-rank term, if the item has it: its blocks are not scaled.
  __device__ __forceinline__ void add_low_rank(const Item<Config>& item) {
#pragma unroll 1
    for (int block = 0; block < num_low_blocks(arguments_, item.part); ++block) {
      rings_.wait_for_weight();
      operand_.load_values(shared_, rings_.weight_offset(), a_[0]);
      start(sums_, a_[0], __shfl_sync(0xFFFFFFFFu, rings_.wait_for_input(0), 0), true);
      wait_for_products<0>();
      hold_registers(sums_);
      rings_.release_input(rings_.input_stage(0));
      rings_.advance_input(1);
      rings_.release_weight();
    }
  }

  static __device__ __forceinline__ void start(float (&sums)[kCols / 2], const Fragments& a, uint32_t x,
                                               bool accumulate) {
    fence_registers();
#pragma unroll
    for (int j = 0; j < 4; ++j) multiply<T, kCols>(sums, a[j], x + j * kProductStep, accumulate || j > 0);
    commit_products();
  }

  const Arguments& arguments_;
  Shared& shared_;
  Rings<Config> rings_;
  ForwardOperand<T, Config> operand_;
  Fragments a_[2];
  float sums_[kCols / 2];
  float products_[kCols / 2];  // not yet scaled
};

#endif

}  // namespace

namespace wide {

template <typename T>
struct Forward {
  template <int kTokens>
  using Config = ForwardConfig<kTokens>;
  template <typename Config>
  using Table = ForwardTable<T, Config>;

  static int tokens_of(int64_t m) { return m <= 128 ? 128 : kMaxTokens; }
  template <typename Function>
  static void dispatch_tokens(int64_t m, Function&& f) {
    dispatch_constant<128, kMaxTokens>("wide_sm90", tokens_of(m), f);
  }
  static constexpr int kScaleVector = kStepBlocks;
  static int64_t num_part_floats(int64_t m, int64_t width) { return qlora::num_part_floats(m, width); }
  static void add(const ProductTarget& target, int num_parts, qlora_dtype dtype, const Device& device,
                  cudaStream_t stream) {
    add_products(target, num_parts, dtype, device, stream);
  }
  static CUtensorMap describe_weight(const qlora_weight_4bit& weight) {
    return describe_matrix(weight.packed, 1, kStep / 2, weight.rows, weight.cols / 2, kTile);
  }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  template <bool kIsNested>
  using Scales = StepScales<kIsNested>;
  template <typename Config>
  using Operand = ForwardOperand<T, Config>;
  template <typename Config>
  using Consumer =
      std::conditional_t<Config::kScalesWeights, ScaledConsumer<T, Config, Forward>, ProductConsumer<T, Config>>;

  static __device__ __forceinline__ int box_col(int, int step) { return step * (kStep / 2); }
  static __device__ __forceinline__ int box_row(int first, int) { return first; }

  template <typename Config>
  static __device__ __forceinline__ void store(const Arguments& arguments, Shared& shared, const Item<Config>& item,
                                               const typename ScaledConsumer<T, Config, Forward>::Sums& sums) {
#pragma unroll
    for (int h = 0; h < Config::kTokens / Config::kCols; ++h) {
      store_products<T, Config::kCols>(arguments, shared, item.first + first_product_col(),
                                       item.token + h * Config::kCols, item.part, sums[h]);
    }
  }

  // The low-rank term's right operand in place of packed bytes, as many of a row.
  static __device__ __forceinline__ void copy_right(const Arguments& arguments, int first, int block,
                                                    unsigned char* bytes) {
    qlora::copy_right<T, kTile, kScaleThreads>(arguments.low_rank, first, arguments.rows, block * kInputDepth,
                                               arguments.are_right_rows_whole, bytes);
    fence_shared();
  }

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

int64_t wide_sm90_workspace_size(const Gemm& problem, const Device& device) {
  return workspace_size<Forward>(problem, device);
}

void wide_sm90(const Gemm& problem, const Device& device, cudaStream_t stream) {
  run_wide<Forward>(problem, device, stream);
}

}  // namespace qlora
