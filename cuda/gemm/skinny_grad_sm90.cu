// dx = dy W for 1 to 32 rows of dy on Hopper: the weight is read once from HBM and decoded once.
//
// The sum runs over n, whose scales cannot wait until after it: dy is scaled instead, for each block of 64 columns, in
// fp16. The weight's codes, transposed, are the 16-row operand of mma.m16n8k16 and scaled dy the 8-column one.
//
//   grid     a block of threads an item: a tile of 256 columns and a part of n in steps of 128 rows
//   warps    16 multiply: of a step a warp has a block of 64 columns and 32 rows. One copies W, by the tensor memory
//            accelerator, through a ring of steps, and asks for some more ahead into L2
//   dy       of a segment of up to 16 steps at once, with its scales, before the products: see skinny_grad_segment.cuh
//   decode   a lane has columns 8g..8g+7 of rows 2i, 2i+1, 2i+8 and 2i+9 (g = lane / 4, i = lane % 4). Nibbles of two
//            neighbouring rows make a byte, which PairTable takes to the pair of values that the operand has there
//   sums     of the warps that share columns: through shared memory; of parts: through that of the blocks of a cluster,
//            or, where the GPU has no room for all of these at once, in memory, by add_parts; in a fixed order
//
// Rounding: of the table's values, of scales and of scaled dy to fp16 (0.008, 0.02 and 0.02 %, rms; a weight rounded to
// bf16 has 0.17 %), fp32 sums, dx. In fp16 that would be more than other kernels have: bf16 alone.
#include <cstdint>

#include "core/status.h"
#include "cuda/device/cluster.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/tensor_copy.cuh"
#include "cuda/device/unaligned.cuh"
#include "cuda/dispatch.h"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/skinny_grad_segment.cuh"
#include "cuda/gemm/split.h"
#include "cuda/gemm/wgmma_kernels.h"
#include "cuda/launch.h"
#include "cuda/remember.h"
#include "cuda/tensor_map.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

using namespace skinny_grad;

constexpr int kMaxCluster = 8;         // blocks in a portable cluster
constexpr int kMaxClusterTokens = 16;  // whose sums shared memory holds
constexpr int kFirstSteps = 2;  // that are asked for at once; more would keep the memory from dy and the scales

#if __CUDA_ARCH__ >= 900

struct Item {
  int first_col;
  int part;
  int step_begin;
  int step_end;

  __device__ __forceinline__ explicit Item(const Arguments& arguments) {
    const int num_steps = (arguments.rows + kStep - 1) / kStep;
    part = static_cast<int>(blockIdx.x) % arguments.num_parts;
    first_col = static_cast<int>(blockIdx.x) / arguments.num_parts * kTileCols;
    step_begin = static_cast<int>(int64_t{num_steps} * part / arguments.num_parts);
    step_end = static_cast<int>(int64_t{num_steps} * (part + 1) / arguments.num_parts);
  }
};

// By a warp, where the tensor memory accelerator does not take the weight.
__device__ __forceinline__ void copy_plainly(const Arguments& arguments, const Item& item, int step,
                                             unsigned char* target) {
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < kStep * kTileBytes / 16; i += 32) {
    const int row = i / 8;
    const int byte = item.first_col / 2 + i % 8 * 16;
    if (byte >= arguments.cols / 2) continue;  // Whatever is there counts nothing.
    const int64_t source = int64_t{min(step * kStep + row, arguments.rows - 1)} * (arguments.cols / 2) + byte;
    *reinterpret_cast<uint4*>(target + row * kTileBytes + (i % 8 ^ row % 8) * 16) =
        load_16_unaligned_bytes(arguments.packed + source);
  }
  __syncwarp();
}

// The warp that copies the weight.
template <int kTokens>
__device__ __forceinline__ void copy_weight(const Arguments& arguments, const CUtensorMap& map, const Item& item,
                                            Shared<kTokens>& shared) {
  const bool is_first = threadIdx.x % 32 == 0;
  RingPlace<kStages<kTokens>> place;
  for (int step = item.step_begin; step < item.step_end; ++step) {
    const int done = step - item.step_begin;
    Barrier& full = shared.full[place.stage()];
    if (done == kFirstSteps) wait(shared.started, 0);
    wait(shared.empty[place.stage()], place.free_parity());
    if (!arguments.is_weight_aligned) {
      copy_plainly(arguments, item, step, shared.weight[place.stage()]);
      if (is_first) arrive(full);
    } else if (is_first) {
      arrive_expecting(full, sizeof(shared.weight[0]));
      copy_box(shared.weight[place.stage()], map, item.first_col / 2, step * kStep, full);
      // The bytes of the next round of the ring into L2: the memory does not wait for products.
      if (done >= kFirstSteps) {
        const int last = min(step + kStages<kTokens>, item.step_end - 1);
        for (int ahead = done == kFirstSteps ? item.step_begin + kStages<kTokens> : step + kStages<kTokens>;
             ahead <= last; ++ahead) {
          prefetch_box_to_l2(map, item.first_col / 2, ahead * kStep);
        }
      }
    }
    __syncwarp();
    place.advance();
  }
}

template <int kTokens, bool kIsNested>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const Arguments& arguments, const Item& item, Shared<kTokens>& shared)
      : arguments_(arguments), item_(item), shared_(shared), table_(shared.table) {
    const int piece = block() * 2 + group() / 4;
    const int first = row_group() * kGroupDepths * kDepth + 2 * quad();
    const uint32_t weight = shared_address(shared.weight[0]) + group() % 4 * 4;
    even_rows_ = keep(weight + first * kTileBytes + (piece ^ first % 8) * 16);
    odd_rows_ = keep(weight + (first + 1) * kTileBytes + (piece ^ (first + 1) % 8) * 16);
    const int depth = row_group() * kGroupDepths;
    scales_ = keep(shared_address(&shared.scales[block()][depth * kDepth + quad() * 4]));
#pragma unroll
    for (int d = 0; d < kGroupDepths; ++d) {
      dy_[d] = keep(shared_address(&shared.dy[depth + d][0][dy_place(depth + d, group(), quad())]));
    }
  }

  __device__ __forceinline__ void run() {
    SegmentOperands<kTokens, kIsNested> operands(arguments_, shared_, item_.first_col);
    const int end = min(item_.step_end * kStep, arguments_.rows);
    operands.template prepare<true>(item_.step_begin * kStep, end, turn_);
    multiply_segment(item_.step_begin);
    for (int step = item_.step_begin + kSegmentSteps<kTokens>; step < item_.step_end; step += kSegmentSteps<kTokens>) {
      turn_ ^= 1;
      operands.template prepare<false>(step * kStep, end, turn_);
      follow_powers();
      multiply_segment(step);
    }
    add_and_store();
  }

 private:
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr int kVectors = kTokenTiles * 4;          // of 4 sums a lane, that are exchanged
  static constexpr int kPieces = kVectors * kTileBlocks;    // of 4 sums a lane, of a block of threads
  static constexpr int kPieceBytes = 32 * sizeof(float4);
  static constexpr int kExchangeBytes = kRowGroups * kPieces * kPieceBytes;
  static constexpr int kReceiveBytes = (kPieces + kMaxCluster - 1) * kPieceBytes;
  static constexpr bool kCanCluster = kTokens <= kMaxClusterTokens;

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int group() { return lane() / 4; }
  static __device__ __forceinline__ int quad() { return lane() % 4; }
  static __device__ __forceinline__ int block() { return threadIdx.x / 32 % kTileBlocks; }
  static __device__ __forceinline__ int row_group() { return threadIdx.x / 32 / kTileBlocks; }

  // That the sums of token 2i + p of tile t are multiplied with in a segment, as a biased exponent twice over.
  __device__ __forceinline__ int power(int turn, int t, int p) const {
    return shared_.dy_power[turn][t * 8 + 2 * quad() + p] + shared_.scale_power[turn][block()];
  }

  // Sums of the segments before, in the powers of two of this one, which are no larger.
  __device__ __forceinline__ void follow_powers() {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const float factor = power_value(max(127 + power(turn_, t, p) - power(turn_ ^ 1, t, p), 1));
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums_[t][j][p] *= factor;
          sums_[t][j][2 + p] *= factor;
        }
      }
    }
  }

  __device__ __forceinline__ void multiply_segment(int first_step) {
    const int num_steps = min(kSegmentSteps<kTokens>, item_.step_end - first_step);
#pragma unroll 1
    for (int step = 0; step < num_steps; ++step) multiply_step(step);
  }

  // Step `step` of the segment.
  __device__ __forceinline__ void multiply_step(int step) {
    const uint32_t stage = place_.stage() * static_cast<uint32_t>(sizeof(shared_.weight[0]));
    wait(shared_.full[place_.stage()], place_.parity());
    uint32_t words[kGroupDepths][4];  // of rows 2i, 2i+1, 2i+8, 2i+9
    const auto load_words = [&](int d) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t offset = stage + d * kDepth * kTileBytes + h * 8 * kTileBytes;
        words[d][2 * h] = load_shared_word(even_rows_ + offset);
        words[d][2 * h + 1] = load_shared_word(odd_rows_ + offset);
      }
    };
    constexpr bool kAllAtOnce = kTokens < 32;  // or what registers hold
#pragma unroll
    for (int d = 0; d < (kAllAtOnce ? kGroupDepths : 0); ++d) load_words(d);
    const auto free_stage = [&] {
      __syncwarp();
      if (lane() == 0) arrive(shared_.empty[place_.stage()]);
      place_.advance();
    };
    if constexpr (kAllAtOnce) free_stage();
#pragma unroll
    for (int d = 0; d < kGroupDepths; ++d) {
      if constexpr (!kAllAtOnce) load_words(d);
      const int depth = step * kStepDepths + d;
      const uint2 scales = load_shared_8_bytes(scales_ + depth * kDepth * sizeof(__half));
      uint32_t b[kTokenTiles][2];
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const uint2 dy = load_shared_8_bytes(dy_[d] + (step * kStepDepths * kTokenTiles + t) * sizeof(shared_.dy[0][0]));
        b[t][0] = scale(dy.x, scales.x);
        b[t][1] = scale(dy.y, scales.y);
      }
      const uint32_t (&w)[4] = words[d];
      const uint32_t even[2] = {merge(w[0], w[1] >> 4), merge(w[2], w[3] >> 4)};
      const uint32_t odd[2] = {merge(w[0] << 4, w[1]), merge(w[2] << 4, w[3])};
      multiply_columns<0>(even, odd, b);
      multiply_columns<1>(even, odd, b);
      multiply_columns<2>(even, odd, b);
      multiply_columns<3>(even, odd, b);
    }
    if constexpr (!kAllAtOnce) free_stage();
  }

  __device__ __forceinline__ uint32_t merge(uint32_t high, uint32_t low) const {
    return (high & high_nibbles_) | (low & ~high_nibbles_);
  }

  static __device__ __forceinline__ uint32_t scale(uint32_t dy, uint32_t scales) {
    const __half2 product = __hmul2(reinterpret_cast<const __half2&>(dy), reinterpret_cast<const __half2&>(scales));
    return reinterpret_cast<const uint32_t&>(product);
  }

  // Columns 2 kByte of each 8 as rows 0 to 7 of the product, 2 kByte + 1 as rows 8 to 15.
  template <int kByte>
  __device__ __forceinline__ void multiply_columns(const uint32_t (&even)[2], const uint32_t (&odd)[2],
                                                   const uint32_t (&b)[kTokenTiles][2]) {
    const uint32_t a[4] = {table_.template pair<kByte>(even[0]), table_.template pair<kByte>(odd[0]),
                           table_.template pair<kByte>(even[1]), table_.template pair<kByte>(odd[1])};
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) multiply_add<__half>(sums_[t][kByte], a, b[t][0], b[t][1]);
  }

  // Adds the sums of the warps that share columns, and of the blocks of a cluster, by way of the ring and of dy, which
  // all have read.
  __device__ __forceinline__ void add_and_store() {
    static_assert(kExchangeBytes + (kCanCluster ? kReceiveBytes : 0) <= sizeof(shared_.weight) + sizeof(shared_.dy));
    const bool is_cluster = kCanCluster && arguments_.is_cluster;
    if (is_cluster) {
      __syncwarp();
      arrive_at_cluster();
    }
    float4* const exchange = reinterpret_cast<float4*>(shared_.weight) + block() * 32 + lane();
    const auto place = [&](int row_group, int vector) -> float4& {
      return exchange[(row_group * kVectors + vector) * kTileBlocks * 32];
    };
    synchronize<kConsumers>(kAllConsumers);
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const int inverse = 254 - power(turn_, t, p);  // in two halves: its range is twice a float's
        const float first = power_value(127 + (inverse >> 1)) * arguments_.table_scale_inverse;
        const float second = power_value(127 + inverse - (inverse >> 1));
        const auto value = [&](int j, int half) { return sums_[t][j][2 * half + p] * first * second; };
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          place(row_group(), (t * 2 + p) * 2 + c) =
              make_float4(value(2 * c, 0), value(2 * c, 1), value(2 * c + 1, 0), value(2 * c + 1, 1));
        }
      }
    }
    synchronize<kConsumers>(kAllConsumers);
    if (is_cluster) {
      __syncwarp();
      wait_for_cluster();
    }
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      const int vector = row_group() * kTokenTiles + i;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int r = 0; r < kRowGroups; ++r) add(sum, place(r, vector));
      if (is_cluster) {
        send(vector * kTileBlocks + block(), sum);
      } else {
        store(vector * kTileBlocks + block(), sum);
      }
    }
    if (is_cluster) {
      hand_over_to_cluster();
      take_over_from_cluster();
      for (int piece = item_.part + threadIdx.x / 32 * arguments_.num_parts; piece < kPieces;
           piece += kWarps * arguments_.num_parts) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (int part = 0; part < arguments_.num_parts; ++part) add(sum, *received(piece, part));
        store(piece, sum);
      }
    }
  }

  static __device__ __forceinline__ void add(float4& sum, const float4& v) {
    sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
  }

  // A cluster's blocks take turns at the pieces: where the sums of a part lie for the one that adds them up.
  __device__ __forceinline__ float4* received(int piece, int part) const {
    unsigned char* const first = &shared_.weight[0][0] + kExchangeBytes;
    return reinterpret_cast<float4*>(first) +
           ((piece / arguments_.num_parts * arguments_.num_parts + part) * 32 + lane());
  }
  __device__ __forceinline__ void send(int piece, const float4& sum) const {
    const uint32_t target =
        address_in_block(shared_address(received(piece, item_.part)), piece % arguments_.num_parts);
    store_two_floats_in_block(target, sum.x, sum.y);
    store_two_floats_in_block(target + 8, sum.z, sum.w);
  }

  // By a warp: a piece of the sums, vector piece / kTileBlocks of block piece % kTileBlocks.
  __device__ __forceinline__ void store(int piece, const float4& sum) const {
    const int vector = piece / kTileBlocks;
    const int token = vector / 4 * 8 + 2 * quad() + vector / 2 % 2;
    const int col = item_.first_col + piece % kTileBlocks * kBlockCols + group() * 8 + vector % 2 * 4;
    if (token < arguments_.m && col < arguments_.cols) store(token, col, sum);
  }

  __device__ __forceinline__ void store(int token, int col, const float4& sum) const {
    const int64_t index = int64_t{token} * arguments_.cols + col;
    if (arguments_.parts != nullptr) {
      const int64_t part = int64_t{item_.part} * arguments_.m * arguments_.cols;
      *reinterpret_cast<float4*>(arguments_.parts + part + index) = sum;
      return;
    }
    const float four[4] = {sum.x, sum.y, sum.z, sum.w};
    if (arguments_.is_dx_aligned) {
      *reinterpret_cast<uint2*>(arguments_.dx + index) =
          make_uint2(Word<__nv_bfloat16>::pack(four), Word<__nv_bfloat16>::pack(four + 2));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) arguments_.dx[index + i] = from_float<__nv_bfloat16>(four[i]);
    }
  }

  const Arguments& arguments_;
  const Item& item_;
  Shared<kTokens>& shared_;
  FixedPairTable<__half, kReservedBytes> table_;
  uint32_t even_rows_;  // shared addresses in the first stage and step: of the lane's word in row 2i, in row 2i+1
  uint32_t odd_rows_;
  uint32_t scales_;
  uint32_t high_nibbles_ = keep(0xF0F0F0F0);
  uint32_t dy_[kGroupDepths];
  RingPlace<kStages<kTokens>> place_;
  float sums_[kTokenTiles][4][4] = {};
  int turn_ = 0;  // of segments
};

template <int kTokens, bool kIsNested>
__device__ __forceinline__ void run(const Arguments& arguments, const CUtensorMap& map, const CodeValues& values) {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  Shared<kTokens>& shared = *reinterpret_cast<Shared<kTokens>*>(shared_bytes);
  const Item item(arguments);
  if (threadIdx.x >= kConsumers) {
    if (threadIdx.x == kConsumers) {
      // FixedPairTable relies on it. Addresses begin with the block's place in its cluster.
      if (shared_address(shared_bytes) % (1 << 24) != kReservedBytes) __trap();
      for (int i = 0; i < kStages<kTokens>; ++i) {
        init_barrier(shared.full[i], 1);
        init_barrier(shared.empty[i], kWarps);
      }
      init_barrier(shared.started, 1);
      publish_barriers();
      // All that may be done before the kernels before this one in the stream have ended: they may write the weight.
      if (arguments.is_weight_aligned) {
        for (int step = item.step_begin; step < min(item.step_begin + kFirstSteps, item.step_end); ++step) {
          prefetch_box_to_l2(map, item.first_col / 2, step * kStep);
        }
      }
    }
    __syncwarp();
    arrive_at<kThreads>(kAllThreads);
    cudaGridDependencySynchronize();
    copy_weight(arguments, map, item, shared);
    if (arguments.is_cluster) {
      arrive_at_cluster();
      wait_for_cluster();
      hand_over_to_cluster();
      take_over_from_cluster();
    }
  } else {
    PairTable<__half>::fill<kConsumers>(shared.table, values);
    synchronize<kThreads>(kAllThreads);
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
    Consumer<kTokens, kIsNested>(arguments, item, shared).run();
  }
}

#endif

template <int kTokens, bool kIsNested>
__global__ __launch_bounds__(kThreads, 1) void skinny_grad_kernel(const __grid_constant__ Arguments arguments,
                                                                          const __grid_constant__ CUtensorMap map,
                                                                          const __grid_constant__ CodeValues values) {
#if __CUDA_ARCH__ >= 900
  run<kTokens, kIsNested>(arguments, map, values);
#else
  __trap();  // supports_skinny_grad_sm90 lets no device here that this was not compiled for.
#endif
}

int tokens_of(const Gemm& problem) { return problem.m <= 8 ? 8 : problem.m <= 16 ? 16 : kMaxTokens; }

// Clusters of so many blocks that run at once.
template <int kTokens>
int count_clusters(const void* kernel, int cluster) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes<kTokens>;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "cudaOccupancyMaxActiveClusters");
  return count;
}

// The same for any number of rows.
int num_parts_of(const Gemm& problem, const Device& device) {
  return best_num_parts(ceil_div(problem.weight.cols, kTileCols), ceil_div(problem.weight.rows, kStep),
                        device.num_multiprocessors);
}

}  // namespace

bool supports_skinny_grad_sm90(const Gemm& problem, const Device& device, std::string* why_not) {
  if (problem.direction != Direction::kGradInput) return refuse(why_not, "expected the input gradient");
  if (problem.dtype != QLORA_BFLOAT16) return refuse(why_not, "expected bfloat16");
  const auto* const any = reinterpret_cast<const void*>(skinny_grad_kernel<8, true>);
  return supports_wgmma(problem, device, kMaxTokens, any, why_not);
}

// Also where a cluster needs none: what a GPU has room for is asked when it runs.
int64_t skinny_grad_sm90_workspace_size(const Gemm& problem, const Device& device) {
  const int parts = num_parts_of(problem, device);
  return parts == 1 ? 0 : parts * problem.m * problem.weight.cols * static_cast<int64_t>(sizeof(float));
}

void skinny_grad_sm90(const Gemm& problem, const Device& device, cudaStream_t stream) {
  const qlora_weight_4bit& weight = problem.weight;
  const Format format = weight.format == QLORA_NF4 ? Format::kNF4 : Format::kFP4;
  Arguments arguments = {};
  arguments.packed = static_cast<const uint8_t*>(weight.packed);
  arguments.scales = scales_of(weight);
  arguments.table_scale_inverse = 1.0f / PairTable<__half>::scale(format);
  arguments.dy = static_cast<const __nv_bfloat16*>(problem.input);
  arguments.dx = static_cast<__nv_bfloat16*>(problem.output);
  arguments.num_parts = num_parts_of(problem, device);
  arguments.num_tiles = static_cast<int>(ceil_div(weight.cols, kTileCols));
  arguments.m = static_cast<int>(problem.m);
  arguments.rows = static_cast<int>(weight.rows);
  arguments.cols = static_cast<int>(weight.cols);
  arguments.is_weight_aligned = is_aligned(weight.packed, 16);
  arguments.is_dy_aligned = is_aligned(problem.input, 16) && weight.rows % 8 == 0;
  arguments.are_scales_aligned = weight.block_size == kBlockCols && weight.cols % kTileCols == 0 &&
                                 is_aligned(weight.absmax_codes, 4) && is_aligned(weight.absmax, 16);
  arguments.is_dx_aligned = is_aligned(problem.output, 8);
  CUtensorMap map = {};
  if (arguments.is_weight_aligned) {
    map = describe_matrix(weight.packed, 1, kTileBytes, weight.rows, weight.cols / 2, kStep);
  }
  dispatch_bool(weight.absmax_codes != nullptr, [&](auto nested) {
    dispatch_constant<8, 16, kMaxTokens>("skinny_grad_sm90", tokens_of(problem), [&](auto tokens) {
      const auto kernel = skinny_grad_kernel<tokens(), nested()>;
      const auto* const pointer = reinterpret_cast<const void*>(kernel);
      allow_shared_bytes(device, pointer, kSharedBytes<tokens()>);
      arguments.is_cluster =
          tokens() <= kMaxClusterTokens && arguments.num_parts > 1 && arguments.num_parts <= kMaxCluster &&
          arguments.num_tiles <= remember(device, pointer, arguments.num_parts, count_clusters<tokens()>);
      const bool has_parts = arguments.num_parts > 1 && !arguments.is_cluster;
      arguments.parts = has_parts ? static_cast<float*>(problem.workspace) : nullptr;
      const auto blocks = static_cast<unsigned>(int64_t{arguments.num_tiles} * arguments.num_parts);
      const int cluster = arguments.is_cluster ? arguments.num_parts : 1;
      launch_early("skinny_grad_kernel", kernel, LaunchShape{blocks, kThreads, kSharedBytes<tokens()>, cluster}, device,
                   stream, arguments, map, PairTable<__half>::values(format));
      if (has_parts) {
        add_parts(arguments.parts, arguments.num_parts, problem.m, weight.cols, nullptr, problem.output, problem.dtype,
                  device, stream);
      }
    });
  });
}

}  // namespace qlora
