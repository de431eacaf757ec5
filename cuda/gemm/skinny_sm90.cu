// y = x W^T + bias for 1 to 16 rows of x: the weight is read once from HBM, in the order in which it lies there.
//
// The weight is the 16-row operand of mma.m16n8k16 and x the 8-column one, so few rows of x waste little; they are
// dealt as block_product.cuh says.
//
//   grid     clusters of `split` blocks, one block a multiprocessor. Clusters take turns at the tiles of 16 rows of W;
//            a block of a cluster has a range of k, a warp of it kChunks chunks of 256 columns.
//   group    several W that share x: their tiles are numbered through, each W from a tile of its own on
//   x        the columns that a warp owns stay in its registers from beginning to end
//   W        each warp copies its own 16 x 256 pieces, with their scales, through a ring of kStages in shared memory
//   decode   a packed byte to two values through PairTable, unscaled; the products of a block of 64 are summed in fp32
//            from zero and then multiplied with the block's scale: 4 FFMA instead of 32 multiplications of weights
//   sums     warps: through shared memory; blocks of a cluster: through distributed shared memory; in a fixed order
//
// Rounding: the table's entries (0.08 % rms for NF4 in bf16, where a weight rounded to bf16 has 0.17 %), fp32 sums, y.
//
// Best for 1 to 16 rows. The constants are from sweeps on an H100 (2026-11-24) over 14336 x 4096, 4096 x 14336 and
// 4096 x 4096: 3 stages of 3 to 5, 16 warps of 8 and 16, a prefetch of 1 tile of 0 to 8.
#include <cooperative_groups.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "core/status.h"
#include "cuda/device/numeric.cuh"
#include "cuda/dispatch.h"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/skinny_sm90.cuh"
#include "cuda/launch.h"
#include "cuda/remember.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

using namespace skinny;

template <typename T>
__device__ __forceinline__ void store_output(const Member& member, int m, int token, int row, float sum) {
  if (row >= member.n || token >= m) return;
  if (member.bias != nullptr) sum += to_float(static_cast<const T*>(member.bias)[row]);
  static_cast<T*>(member.y)[int64_t{token} * member.n + row] = from_float<T>(sum);
}

template <typename T, int kTokens, int kChunks, bool kIsNested, int kMembers>
__global__ __launch_bounds__(kThreads, 1) void skinny_kernel(const __grid_constant__ Arguments<kMembers> arguments,
                                                             const __grid_constant__ CodeValues values) {
#if __CUDA_ARCH__ >= 900
  namespace cg = cooperative_groups;
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  auto& shared = *reinterpret_cast<Shared<kTokens, kIsNested, kMembers>*>(shared_bytes);
  unsigned char* const table_bytes = shared_bytes + (kTableAlignment - shared_address(shared_bytes) % kTableAlignment);
  const cg::cluster_group cluster = cg::this_cluster();
  const int warp = threadIdx.x / 32;
  const int group = threadIdx.x % 32 / 4;
  const int i = threadIdx.x % 4;
  StageWeight* const ring = reinterpret_cast<StageWeight*>(table_bytes + kTableAlignment) + warp * kStages;

  const int split = 1 << arguments.log2_split;
  const int rank = blockIdx.x & (split - 1);
  const int cluster_index = blockIdx.x >> arguments.log2_split;
  const int num_clusters = gridDim.x >> arguments.log2_split;
  const int num_chunks = arguments.k / kChunkCols;
  const int chunk_begin = num_chunks * rank >> arguments.log2_split;
  const int chunk_end = num_chunks * (rank + 1) >> arguments.log2_split;

  const int first_chunk = chunk_begin + warp;
  Fetcher<kChunks, kIsNested, kMembers> fetcher(arguments, cluster_index, num_clusters, first_chunk, chunk_end);
  // The next tile into L2, ahead of the copies: more bytes are under way than the ring holds. It is all that may be
  // done before the kernels before this one in the stream have ended, since they may write the weight.
  const auto prefetch = [&](int tile) {
    if (threadIdx.x >= kTileRows) return;
    const int member = arguments.member_of(tile);
    const Member& source = arguments.members[member];
    const int row = arguments.first_row(member, tile) + threadIdx.x;
    if (row >= source.num_whole_tiles * kTileRows) return;
    prefetch_to_l2(source.packed + int64_t{row} * (arguments.k / 2) + chunk_begin * kChunkBytes,
                   (chunk_end - chunk_begin) * kChunkBytes);
  };
  prefetch(cluster_index);
  PairTable<T>::template fill<kThreads>(table_bytes, values);
  cudaGridDependencySynchronize();
  // All that is read first is asked for before any of it is waited for.
  if constexpr (kIsNested) {
#pragma unroll
    for (int member = 0; member < kMembers; ++member) {
      const Scales& scales = arguments.members[member].scales;
      if (threadIdx.x < 256) {
        copy_4_bytes_async(&shared.nested_code[member][threadIdx.x], scales.nested_code + threadIdx.x);
      } else if (kMembers > 1 && threadIdx.x == 256) {
        copy_4_bytes_async(&shared.nested_offset[member], scales.nested_offset);
      }
    }
  }
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) fetcher.next(step % kChunks, ring[step], shared.scales[warp][step]);
  Fragments<kTokens> x[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = first_chunk + c * kWarps;
    if (chunk < chunk_end) load_x<kTokens>(arguments, chunk * kChunkBlocks, x[c]);
  }
  // That of a single weight stays in a register.
  const float only_offset = kIsNested && kMembers == 1 ? *arguments.members[0].scales.nested_offset : 0.0f;
  wait_for_copies<kStages - 2>();  // nested_code and nested_offset went with the first
  __syncthreads();
  cudaTriggerProgrammaticLaunchCompletion();  // The next kernel may be set up; it waits for this one where it reads.

  const PairTable<T> table(table_bytes);
  int stage = 0;
  int turn = 0;
  for (int tile = cluster_index; tile < arguments.num_tiles; tile += num_clusters, ++turn) {
    prefetch(tile + num_clusters);
    const int member = arguments.member_of(tile);
    const float nested_offset = kIsNested && kMembers > 1 ? shared.nested_offset[member] : only_offset;
    float sums[kTokens / 8][4] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      wait_for_copies<kStages - 2>();
      __syncwarp();  // The stage is there for all lanes, and the one before is read by all.
      const int free_stage = stage == 0 ? kStages - 1 : stage - 1;
      fetcher.next((c + kStages - 1) % kChunks, ring[free_stage], shared.scales[warp][free_stage]);
      if (first_chunk + c * kWarps < chunk_end) {
        multiply_stage<T, kTokens, kIsNested>(ring[stage], shared.scales[warp][stage], table,
                                              shared.nested_code[kIsNested ? member : 0], nested_offset,
                                              arguments.table_scale_inverse, x[c], sums);
      }
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    // Two buffers: a warp that is a tile ahead writes the other one, and waits at the barrier before it is two ahead.
    auto& partial = shared.partial[turn % 2];
#pragma unroll
    for (int q = 0; q < kTokens / 8; ++q) {
      float (&tokens)[kTokens][kPaddedRows] = partial[warp];
      tokens[q * 8 + 2 * i][group] = sums[q][0];
      tokens[q * 8 + 2 * i + 1][group] = sums[q][1];
      tokens[q * 8 + 2 * i][group + 8] = sums[q][2];
      tokens[q * 8 + 2 * i + 1][group + 8] = sums[q][3];
    }
    __syncthreads();
    const int slot = turn % kTilesPerExchange;
    if (static_cast<int>(threadIdx.x) < kTileRows * kTokens) {
      const int row = threadIdx.x % kTileRows;
      const int token = threadIdx.x / kTileRows;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partial[w][token][row];
      if (split == 1) {
        store_output<T>(arguments.members[member], arguments.m, token, arguments.first_row(member, tile) + row, sum);
      } else {
        shared.exchange[slot][token][row] = sum;
      }
    }
    if (split > 1 && (slot == kTilesPerExchange - 1 || tile + num_clusters >= arguments.num_tiles)) {
      cluster.sync();
      const int num_sums = (slot + 1) * kTileRows * kTokens;
      for (int index = rank * kThreads + threadIdx.x; index < num_sums; index += split * kThreads) {
        float sum = 0.0f;
        for (int r = 0; r < split; ++r) sum += cluster.map_shared_rank(&shared.exchange[0][0][0], r)[index];
        const int turns_ago = slot - index / (kTileRows * kTokens);
        const int summed_tile = tile - turns_ago * num_clusters;
        const int owner = arguments.member_of(summed_tile);
        const int row = arguments.first_row(owner, summed_tile) + index % kTileRows;
        store_output<T>(arguments.members[owner], arguments.m, index / kTileRows % kTokens, row, sum);
      }
      cluster.sync();
    }
  }
#else
  __trap();  // See is_compiled_for_sm90.
#endif
}

struct Plan {
  int tokens;  // rows of x, rounded up to those of an mma
  int chunks;  // that a warp owns
  int split;   // blocks in a cluster
};

int max_chunks(int tokens) { return tokens == 8 ? 2 : 1; }  // what registers hold of x

// The smallest cluster whose warps hold x; larger where the tiles of 16 rows alone leave multiprocessors idle.
Plan plan_of(int64_t m, int64_t k, int64_t num_tiles, const Device& device) {
  const int tokens = m <= 8 ? 8 : kMaxTokens;
  const int64_t num_chunks = k / kChunkCols;
  int split = 1;
  while (num_chunks > int64_t{split} * kWarps * max_chunks(tokens)) split *= 2;
  while (split < kMaxSplit && num_tiles * split * 2 <= device.num_multiprocessors && num_chunks >= 2 * split * 4) {
    split *= 2;
  }
  return {tokens, static_cast<int>(ceil_div(ceil_div(num_chunks, split), kWarps)), split};
}

template <typename Function>
void dispatch_plan(const Plan& plan, Function&& f) {
  if (plan.tokens == kMaxTokens) {
    f(std::integral_constant<int, kMaxTokens>{}, std::integral_constant<int, 1>{});
  } else if (plan.chunks == 1) {
    f(std::integral_constant<int, 8>{}, std::integral_constant<int, 1>{});
  } else {
    f(std::integral_constant<int, 8>{}, std::integral_constant<int, 2>{});
  }
}

cudaLaunchConfig_t launch_config(int num_clusters, int split, cudaStream_t stream,
                                 std::array<cudaLaunchAttribute, 2>& attributes) {
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = static_cast<unsigned>(split);
  attributes[0].val.clusterDim.y = 1;
  attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(num_clusters * split));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = attributes.data();
  config.numAttrs = static_cast<unsigned>(attributes.size());
  return config;
}

// Clusters of `split` blocks that run at once: those of a cluster share a part of the GPU, so some multiprocessors are
// left over.
int count_clusters(const void* kernel, int split) {
  std::array<cudaLaunchAttribute, 2> attributes = {};
  cudaLaunchConfig_t config = launch_config(1, split, nullptr, attributes);
  config.numAttrs = 1;
  int count = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "cudaOccupancyMaxActiveClusters");
  if (count < 1) fail(QLORA_CUDA_ERROR, "skinny: expected room for a cluster of ", split, " blocks, got none");
  return count;
}

int64_t num_tiles_of(const Gemm& problem) { return ceil_div(problem.weight.rows, kTileRows); }

Member member_of(const Gemm& problem, int64_t first_tile) {
  const qlora_weight_4bit& weight = problem.weight;
  Member member = {};
  member.packed = static_cast<const uint8_t*>(weight.packed);
  member.scales = scales_of(weight);
  member.bias = problem.bias;
  member.y = problem.output;
  member.n = static_cast<int>(weight.rows);
  member.first_tile = static_cast<int>(first_tile);
  const bool is_weight_aligned = is_aligned(weight.packed, 16) && is_aligned(weight.absmax_codes, 4);
  member.num_whole_tiles = is_weight_aligned ? member.n / kTileRows : 0;
  return member;
}

template <int kMembers>
void launch_members(const Gemm* problems, int count, const Device& device, cudaStream_t stream) {
  const Gemm& first = problems[0];
  Arguments<kMembers> arguments = {};
  int64_t num_tiles = 0;
  for (int i = 0; i < count; ++i) {
    arguments.members[i] = member_of(problems[i], num_tiles);
    num_tiles += num_tiles_of(problems[i]);
  }
  for (int i = count; i < kMembers; ++i) {
    arguments.members[i] = member_of(first, num_tiles);
    arguments.members[i].num_whole_tiles = 0;
  }
  const Plan plan = plan_of(first.m, first.weight.cols, num_tiles, device);
  arguments.log2_split = log2_of(plan.split);
  arguments.x = first.input;
  arguments.m = static_cast<int>(first.m);
  arguments.k = static_cast<int>(first.weight.cols);
  arguments.num_tiles = static_cast<int>(num_tiles);
  arguments.is_x_aligned = is_aligned(first.input, 16);
  const Format format = first.weight.format == QLORA_NF4 ? Format::kNF4 : Format::kFP4;
  dispatch_dtype(first.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (!std::is_same_v<T, float>) {
      arguments.table_scale_inverse = 1.0f / PairTable<T>::scale(format);
      dispatch_bool(is_nested(first.weight), [&](auto nested) {
        dispatch_plan(plan, [&](auto tokens, auto chunks) {
          const auto kernel = skinny_kernel<T, tokens(), chunks(), nested(), kMembers>;
          const auto* const pointer = reinterpret_cast<const void*>(kernel);
          allow_shared_bytes(device, pointer, kSharedBytes);
          const int most = remember(device, pointer, plan.split, count_clusters);
          std::array<cudaLaunchAttribute, 2> attributes = {};
          const cudaLaunchConfig_t config =
              launch_config(static_cast<int>(std::min<int64_t>(most, num_tiles)), plan.split, stream, attributes);
          check_cuda(cudaLaunchKernelEx(&config, kernel, arguments, PairTable<T>::values(format)), "skinny_kernel");
        });
      });
    }
  });
}

}  // namespace

bool supports_skinny_sm90(const Gemm& problem, const Device& device, std::string* why_not) {
  const qlora_weight_4bit& weight = problem.weight;
  const int64_t max_cols = int64_t{kMaxSplit} * kWarps * kChunkCols;
  if (problem.direction != Direction::kForward) return refuse(why_not, "expected the forward product");
  if (device.major < 9)
    return refuse(why_not, "expected compute capability 9.0 or newer, got ", device.major, ".", device.minor);
  if (device.max_shared_bytes < kSharedBytes) {
    return refuse(why_not, "expected ", kSharedBytes, " bytes of shared memory, got ", device.max_shared_bytes);
  }
  if (problem.dtype == QLORA_FLOAT32) return refuse(why_not, "expected float16 or bfloat16");
  if (problem.m < 1 || problem.m > kMaxTokens) return refuse(why_not, "m: expected 1 to ", kMaxTokens);
  if (weight.block_size != kBlockSize) return refuse(why_not, "block_size: expected ", kBlockSize);
  if (weight.rows < 1 || weight.rows > INT32_MAX - kTileRows) return refuse(why_not, "n: expected 1 to 2^31 - 17");
  if (weight.cols < 1 || weight.cols % kChunkCols != 0 || weight.cols > max_cols) {
    return refuse(why_not, "k: expected a multiple of ", kChunkCols, " up to ", max_cols);
  }
  const void* const any = reinterpret_cast<const void*>(skinny_kernel<__nv_bfloat16, 8, 1, true, 1>);
  if (!is_compiled_for_sm90(device, any))
    return refuse(why_not, "expected a libqlora built for this GPU's architecture (QLORA_CUDA_ARCHS)");
  return true;
}

void skinny_sm90(const Gemm& problem, const Device& device, cudaStream_t stream) {
  launch_members<1>(&problem, 1, device, stream);
}

bool supports_skinny_sm90_group(const Gemm* problems, int count, const Device& device, std::string* why_not) {
  if (count < 1 || count > kMaxMembers) return refuse(why_not, "expected 1 to ", kMaxMembers, " weights, got ", count);
  const Gemm& first = problems[0];
  int64_t num_tiles = 0;
  for (int i = 0; i < count; ++i) {
    const Gemm& problem = problems[i];
    if (!supports_skinny_sm90(problem, device, why_not)) return false;
    const bool is_alike = problem.weight.cols == first.weight.cols && problem.weight.format == first.weight.format &&
                          problem.m == first.m && problem.dtype == first.dtype && problem.input == first.input;
    if (!is_alike) return refuse(why_not, "expected one input and one format of all weights");
    if (is_nested(problem.weight) != is_nested(first.weight)) {
      return refuse(why_not, "expected scales that are all double-quantised or all plain");
    }
    num_tiles += num_tiles_of(problem);
  }
  if (num_tiles > INT32_MAX / kTileRows) return refuse(why_not, "n: expected 2^31 rows at most in all");
  return true;
}

void skinny_sm90_group(const Gemm* problems, int count, const Device& device, cudaStream_t stream) {
  launch_members<kMaxMembers>(problems, count, device, stream);
}

}  // namespace qlora
