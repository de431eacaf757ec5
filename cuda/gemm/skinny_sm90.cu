// The plan of skinny_sm90.cuh's kernel and its launch.
#include <algorithm>
#include <array>

#include "core/status.h"
#include "cuda/dispatch.h"
#include "cuda/gemm/gemm.h"
#include "cuda/gemm/skinny_sm90.cuh"
#include "cuda/launch.h"
#include "cuda/remember.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

using namespace skinny;

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
