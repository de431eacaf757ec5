// dx = dy W on Hopper's wgmma (wide_sm90.cuh has the frame): the weight is decoded, once for 256 rows of dy, to the
// registers from which the tensor cores take it, transposed on the way (wide_grad_operand.cuh).
//
//   work    a warpgroup has 64 columns of dx, whose weights share scales; up to 64 rows two pairs of warpgroups take
//   turns
//           at blocks of 64 values of n, where there is little to hide the decoding behind
//   decode  the two values of a byte in fp32, each scaled with its row's scale and rounded with its neighbour in n; the
//           sum runs over n, so no scale can wait until after it
//
// Rounding: of weights see ScaledWeightTable; fp32 sums; dx.
#include "cuda/gemm/wide_grad_operand.cuh"
#include "cuda/gemm/wide_sm90.cuh"

namespace qlora::wide {

template <int kTokenCount>
struct GradConfig {
  static constexpr int kTokens = kTokenCount;
  static constexpr int kGroups = kTokens <= 64 ? 2 : 1;
  static constexpr int kConsumers = kGroups * 2 * kWarpgroup;
  static constexpr int kCluster = cluster_of(kTokens);
  static constexpr int kInputStages = kTokens == 256 ? 3 : kTokens == 128 ? 6 : kMaxInputStages;
  static constexpr int kCols = kTokens == 256 ? 128 : kTokens;  // of a product
  static constexpr int kExchangeBytes = kGroups == 1 ? 0 : kTile * kTokens * 4;
  static constexpr int kCopyRegisters = kGroups == 1 ? 72 : 64;
  static constexpr int kRegisters = kGroups == 1 ? 216 : 104;
};

template <typename T>
struct Grad {
  template <int kTokens>
  using Config = GradConfig<kTokens>;
  template <typename Config>
  using Table = ScaledWeightTable<T>;

  static int tokens_of(int64_t m) { return m <= 16 ? 16 : m <= 32 ? 32 : m <= 64 ? 64 : m <= 128 ? 128 : kMaxTokens; }
  template <typename Function>
  static void dispatch_tokens(int64_t m, Function&& f) {
    dispatch_constant<16, 32, 64, 128, kMaxTokens>("wide_grad_sm90", tokens_of(m), f);
  }
  static constexpr int kScaleVector = kTileBlocks;
  static int64_t num_part_floats(int64_t m, int64_t width) { return m * width; }
  static void add(const ProductTarget& target, int num_parts, qlora_dtype dtype, const Device& device,
                  cudaStream_t stream) {
    add_dealt_parts(target.parts, num_parts, target.m, target.width, target.output, dtype, device, stream);
  }
  static CUtensorMap describe_weight(const qlora_weight_4bit& weight) {
    return describe_matrix(weight.packed, 1, kTileBytes, weight.rows, weight.cols / 2, kStep);
  }

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  template <bool kIsNested>
  using Scales = GradScales<kIsNested>;
  template <typename Config>
  using Operand = GradOperand<T, Config, Table<Config>>;
  template <typename Config>
  using Consumer = ScaledConsumer<T, Config, Grad>;

  static __device__ __forceinline__ int box_col(int first, int) { return first / 2; }
  static __device__ __forceinline__ int box_row(int, int step) { return step * kStep; }

  template <typename Config>
  static __device__ __forceinline__ void store(const Arguments& arguments, Shared& shared, const Item<Config>& item,
                                               const typename Consumer<Config>::Sums& sums) {
    const int first = item.first + first_product_col() / kPairCols * kPairCols;
#pragma unroll
    for (int h = 0; h < Config::kTokens / Config::kCols; ++h) {
      const int token = item.token + h * Config::kCols;
      if (arguments.target.parts != nullptr) {
        store_grad_part<Config::kCols>(sums[h], arguments.target, item.part, first, token);
      } else {
        store_grad<T, Config::kCols>(sums[h], arguments.target, first, token,
                                     shared.staging[(threadIdx.x / 32 - kWarpgroup / 32) / 2 * 2]);
      }
    }
  }

  static __device__ __forceinline__ void copy_right(const Arguments& arguments, int first, int block,
                                                    unsigned char* bytes) {
    copy_grad_right<T>(arguments, first, block, bytes);
  }

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

}  // namespace qlora::wide

namespace qlora {

bool supports_wide_grad_sm90(const Gemm& problem, const Device& device, std::string* why_not) {
  if (problem.direction != Direction::kGradInput) return refuse(why_not, "expected the input gradient");
  return wide::supports<wide::Grad>(problem, device, why_not);
}

int64_t wide_grad_sm90_workspace_size(const Gemm& problem, const Device& device) {
  return wide::workspace_size<wide::Grad>(problem, device);
}

void wide_grad_sm90(const Gemm& problem, const Device& device, cudaStream_t stream) {
  wide::run_wide<wide::Grad>(problem, device, stream);
}

}  // namespace qlora
