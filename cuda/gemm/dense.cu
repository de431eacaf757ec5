// y = x W^T + bias and dx = dy W through chunks of W: dequantise a chunk, multiply it with cuBLAS, take the next one.
//
//   forward         chunk = rows n0..n1 of W [n, k]:  y[:, n0:n1] = x W[n0:n1, :]^T + bias[n0:n1]
//   input gradient  chunk = columns k0..k1 of W:      dx[:, k0:k1] = dy W[:, k0:k1]
//
// No chunk adds to another's output, so each output is rounded once. On Hopper, from some rows on, a few
// multiprocessors decode the next chunk on a stream of their own while cuBLAS multiplies this one on the others:
//
//   decoders  chunk 1    chunk 2    chunk 3    ...          chunk i + 1 waits for the product of chunk i - 1, whose
//   cuBLAS      product 0  product 1  product 2  ...        buffer it takes; product i for chunk i
//
// A chunk is as wide as makes whole waves of tiles of cuBLAS on the multiprocessors that are left. Elsewhere all
// multiprocessors decode a chunk, then all multiply it. Buffers are reused: where many rows allow narrow chunks they
// are written and read in L2, without reaching HBM. With a bias the product stays in fp32, chunk by
// chunk, and is rounded once with the bias added: cuBLAS rounds some 16-bit products before it adds to them. A low-rank
// term is added to the chunk of the weight, if it is a product of the same input, else to that of the output, which
// then lies in L2 for the most part. Best for m of some hundreds and more.
//
// Workspace: [cuBLAS 32 MiB][one chunk, or two][with a bias: fp32 product, m rows of a chunk's columns]
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <optional>

#include "core/status.h"
#include "cuda/dequantize_sm90.h"
#include "cuda/device/numeric.cuh"
#include "cuda/dispatch.h"
#include "cuda/gemm/cublas.h"
#include "cuda/gemm/gemm.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/lora/lora.h"
#include "cuda/side_stream.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunkMultiple = 256;                     // of rows or columns: whole tiles of cuBLAS' kernels
constexpr int64_t kMinChunkBytes = int64_t{16} << 20;       // below, launches cost more than L2 saves
constexpr int64_t kMaxChunkBytes = int64_t{128} << 20;      // what a caller's workspace may be asked for
constexpr int64_t kMaxChunkBytesAhead = int64_t{32} << 20;  // of each of two
constexpr int64_t kMaxProductBytes = int64_t{64} << 20;
constexpr int64_t kProductBytes = sizeof(float);
constexpr int64_t kBufferAlignment = 256;
constexpr int64_t kRankDepthPerRow = 256;  // see adds_to_weight
constexpr int64_t kMinRowsAhead = 8192;
constexpr int64_t kMinRowsAheadMerged = 16384;  // where the weight has a low-rank term added; a guess
constexpr int kDecoders = 4;
constexpr int64_t kWaves = 2;
constexpr int64_t kTileValues = 128 * 256;  // of the output, that a block of cuBLAS computes

// Columns of the output that a chunk should cover: few enough to stay in L2, enough that cuBLAS fills the machine.
// H100, 2026-11: QLORA_DENSE_CHUNK_BYTES swept over widths 512 to 14336 on the layers of Llama-3-8B; 2048 was up to 8 %
// better than the whole weight from m = 4096 on, and up to a third worse than 4096 below m = 1024.
int64_t best_width(int64_t m) {
  if (m >= 4096) return 2048;
  return m >= 1024 ? 16384 : 4096;
}

// A positive number of the environment, or `otherwise` where it is not set.
int64_t environment_number(const char* name, int64_t smallest, int64_t otherwise) {
  const char* const text = std::getenv(name);
  if (text == nullptr || *text == '\0') return otherwise;
  char* end = nullptr;
  const long long number = std::strtoll(text, &end, 10);
  expect(*end == '\0' && number >= smallest, name, ": expected a number from ", smallest, " on, got ", text);
  return number;
}

// How a problem is cut up.
struct Chunks {
  int64_t width;        // of the output: n forward, k for the input gradient
  int64_t depth;        // summed over
  int64_t step;         // columns of the output that a chunk covers
  int64_t buffer_size;  // bytes, padded so that what follows is aligned
  int decoders;         // multiprocessors that decode ahead; 0: none, and one buffer
};

// Multiprocessors that decode ahead, half of them at most; 0: none. QLORA_DENSE_DECODERS overrides.
//
// H100, 2026-11, us without and with 4, forward / input gradient of 14336 x 4096: 1478 and 1406 / 1445 and 1426 at 8192
// rows; 4096 x 14336 1416 and 1405 / 1447 and 1434; 4096 x 4096 416 and 407 / 402 and 406. At 4096 rows 729 and 814 /
// 684 and 745: 4 multiprocessors decode 15 values a clock each, a product of 2048 columns waits for them. With a
// low-rank term they decode 6.
int num_decoders(const Gemm& problem, const Device& device, bool is_in_weight) {
  if (device.major != 9 || problem.weight.cols % 64 != 0 || !cublas_shares_device()) return 0;
  if (!has_dequantize_sm90(problem.weight, problem.dtype, device)) return 0;  // Few would decode for long.
  const int64_t otherwise = problem.m >= (is_in_weight ? kMinRowsAheadMerged : kMinRowsAhead) ? kDecoders : 0;
  const int64_t most = device.num_multiprocessors / 2;
  return static_cast<int>(std::min(environment_number("QLORA_DENSE_DECODERS", 0, otherwise), most));
}

// Columns of the output whose tiles fill the multiprocessors that `decoders` leave for whole waves.
int64_t columns_of_waves(int64_t m, const Device& device, int decoders) {
  return kWaves * (device.num_multiprocessors - decoders) * kTileValues / m;
}

Chunks chunks_of(const Gemm& problem, const Device& device, bool is_in_weight) {
  const bool is_forward = problem.direction == Direction::kForward;
  Chunks chunks = {};
  chunks.width = is_forward ? problem.weight.rows : problem.weight.cols;
  chunks.depth = is_forward ? problem.weight.cols : problem.weight.rows;
  chunks.decoders = num_decoders(problem, device, is_in_weight);
  const int64_t column_bytes = chunks.depth * size_of(problem.dtype);
  const bool is_ahead = chunks.decoders > 0;
  const int64_t columns = is_ahead ? columns_of_waves(problem.m, device, chunks.decoders) : best_width(problem.m);
  const int64_t most = is_ahead ? kMaxChunkBytesAhead : kMaxChunkBytes;
  const int64_t bytes =
      environment_number("QLORA_DENSE_CHUNK_BYTES", 1, std::clamp(columns * column_bytes, kMinChunkBytes, most));
  int64_t widest = bytes / column_bytes;
  if (problem.has_bias) widest = std::min(widest, kMaxProductBytes / kProductBytes / problem.m);
  widest = std::max(widest / kChunkMultiple * kChunkMultiple, kChunkMultiple);
  const int64_t count = ceil_div(chunks.width, widest);
  if (count == 1) chunks.decoders = 0;
  chunks.step = std::min(chunks.width, round_up(ceil_div(chunks.width, count), kChunkMultiple));
  chunks.buffer_size = round_up(chunks.step * column_bytes, kBufferAlignment);
  return chunks;
}

// y [m, cols] of row length row_length = product [m, cols] + bias [cols], each thread kValues columns, rows strided
// over gridDim.y.
template <typename T, int kValues>
__global__ __launch_bounds__(kThreads) void add_bias_kernel(const float* __restrict__ product,
                                                            const T* __restrict__ bias, int64_t m, int64_t cols,
                                                            T* __restrict__ y, int64_t row_length) {
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kValues;
  if (col >= cols) return;
  float terms[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) terms[i] = to_float(bias[col + i]);
  for (int64_t row = blockIdx.y; row < m; row += gridDim.y) {
    const float* const sums = product + row * cols + col;
    T* const out = y + row * row_length + col;
    if constexpr (kValues == 1) {
      *out = from_float<T>(*sums + terms[0]);
    } else {
      float values[kValues];
#pragma unroll
      for (int i = 0; i < kValues; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(sums + i);
        values[i] = four.x + terms[i];
        values[i + 1] = four.y + terms[i + 1];
        values[i + 2] = four.z + terms[i + 2];
        values[i + 3] = four.w + terms[i + 3];
      }
      store_16_bytes(out, values);
    }
  }
}

template <typename T, int kValues>
void launch_add_bias(const float* product, const T* bias, int64_t m, int64_t cols, T* y, int64_t row_length,
                     cudaStream_t stream) {
  launch("add_bias_kernel", add_bias_kernel<T, kValues>,
         dim3(grid_size(cols, kThreads * kValues), grid_size(m, 1, kMaxGridY)), kThreads, stream, product, bias, m,
         cols, y, row_length);
}

// Rounds a chunk's product, `cols` columns of y from `begin` on, with the bias added.
void add_bias(const Gemm& problem, const float* product, int64_t begin, int64_t cols, cudaStream_t stream) {
  dispatch_dtype(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kVector = kValuesPer16Bytes<T>;
    const T* const bias = static_cast<const T*>(problem.bias) + begin;
    T* const y = static_cast<T*>(problem.output) + begin;
    const int64_t row_length = problem.weight.rows;
    if (row_length % kVector == 0 && cols % kVector == 0 && is_aligned(y, 16)) {
      launch_add_bias<T, kVector>(product, bias, problem.m, cols, y, row_length, stream);
    } else {
      launch_add_bias<T, 1>(product, bias, problem.m, cols, y, row_length, stream);
    }
  });
}

// Whether the low-rank term is added to the chunks of the weight, not to those of the output. That costs the
// multiplications of depth x width x rank, this a reading and a writing of m x width, mostly in L2: as much at a rank x
// depth of some hundred times m. (A guess until measured.)
bool adds_to_weight(const Gemm& problem, const Device& device) {
  const LowRank& term = problem.low_rank;
  if (term.rank == 0 || term.adapter == nullptr) return false;
  const int64_t depth = problem.direction == Direction::kForward ? problem.weight.cols : problem.weight.rows;
  return term.rank * depth <= kRankDepthPerRow * problem.m &&
         supports_merged_weight(problem.weight, term.rank, problem.dtype, device);
}

int64_t num_buffers(const Chunks& chunks) { return chunks.decoders > 0 ? 2 : 1; }

struct Range {
  int64_t begin;
  int64_t end;
};

// Columns of the output that a chunk covers.
Range columns_of(const Chunks& chunks, int64_t chunk) {
  return {chunk * chunks.step, std::min((chunk + 1) * chunks.step, chunks.width)};
}

// The chunk's part of W.
Window window_of(const Gemm& problem, const Chunks& chunks, int64_t chunk) {
  const auto [begin, end] = columns_of(chunks, chunk);
  const bool is_forward = problem.direction == Direction::kForward;
  return is_forward ? Window{begin, end, 0, chunks.depth} : Window{0, chunks.depth, begin, end};
}

// y = the chunk of W, with the low-rank term if is_in_weight, by `multiprocessors` of the device; 0: by all.
void decode_chunk(const Gemm& problem, const Chunks& chunks, int64_t chunk, bool is_in_weight, void* y,
                  int multiprocessors, const Device& device, cudaStream_t stream) {
  const Window window = window_of(problem, chunks, chunk);
  const int64_t row_length = window.col_end - window.col_begin;
  if (is_in_weight) {
    merged_weight(problem.weight, *problem.low_rank.adapter, window, y, row_length, problem.dtype, multiprocessors,
                  device, stream);
  } else {
    dequantize_4bit(problem.weight, window, y, row_length, problem.dtype, multiprocessors, device, stream);
  }
}

// The chunk's columns of the output, or, with a bias, of the fp32 product.
void multiply_chunk(const Gemm& problem, const Chunks& chunks, int64_t chunk, const void* weight, float* product,
                    const Device& device, cudaStream_t stream) {
  const auto [begin, end] = columns_of(chunks, chunk);
  CublasGemm gemm = {};
  gemm.dtype = problem.dtype;
  gemm.c_dtype = problem.has_bias ? QLORA_FLOAT32 : problem.dtype;
  gemm.m = problem.m;
  gemm.n = end - begin;
  gemm.k = chunks.depth;
  gemm.a = problem.input;
  gemm.lda = gemm.k;
  gemm.b = weight;
  gemm.is_b_transposed = problem.direction == Direction::kForward;
  gemm.ldb = gemm.is_b_transposed ? gemm.k : gemm.n;
  gemm.c = problem.has_bias ? static_cast<void*>(product)
                            : static_cast<char*>(problem.output) + begin * size_of(problem.dtype);
  gemm.ldc = problem.has_bias ? gemm.n : chunks.width;
  gemm.multiprocessors = chunks.decoders == 0 ? 0 : device.num_multiprocessors - chunks.decoders;
  cublas_gemm(gemm, device.index, problem.workspace, stream);
}

}  // namespace

bool supports_dense(const Gemm& problem, const Device&, std::string* why_not) {
  if (problem.m == 0 || num_values(problem.weight) == 0) return refuse(why_not, "m, n and k: expected at least 1 each");
  const std::string missing = cublas_missing();
  return missing.empty() || refuse(why_not, missing);
}

int64_t dense_workspace_size(const Gemm& problem, const Device& device) {
  const auto size = [&](bool is_in_weight) {
    const Chunks chunks = chunks_of(problem, device, is_in_weight);
    const int64_t product = problem.has_bias ? problem.m * chunks.step * kProductBytes : 0;
    return kCublasWorkspaceBytes + num_buffers(chunks) * chunks.buffer_size + product;
  };
  // Whether the term is one of the same input, which may be added to the weight, is not known yet.
  return problem.low_rank.rank == 0 ? size(false) : std::max(size(false), size(true));
}

void dense(const Gemm& problem, const Device& device, cudaStream_t stream) {
  const bool is_in_weight = adds_to_weight(problem, device);
  const Chunks chunks = chunks_of(problem, device, is_in_weight);
  char* const buffers = static_cast<char*>(problem.workspace) + kCublasWorkspaceBytes;
  float* const product = reinterpret_cast<float*>(buffers + num_buffers(chunks) * chunks.buffer_size);
  const auto buffer = [&](int64_t chunk) { return buffers + chunk % num_buffers(chunks) * chunks.buffer_size; };
  const int64_t count = ceil_div(chunks.width, chunks.step);
  std::optional<SideStream> ahead;
  if (chunks.decoders > 0) {
    ahead.emplace(device, stream);
    ahead->mark_main();
  }
  for (int64_t i = 0; i < count; ++i) {
    if (i == 0 || !ahead) {
      decode_chunk(problem, chunks, i, is_in_weight, buffer(i), 0, device, stream);
    } else {
      ahead->await_side();
    }
    if (ahead && i + 1 < count) {
      ahead->await_main();
      decode_chunk(problem, chunks, i + 1, is_in_weight, buffer(i + 1), chunks.decoders, device, ahead->get());
      ahead->mark_side();
    }
    multiply_chunk(problem, chunks, i, buffer(i), product, device, stream);
    if (ahead) ahead->mark_main();
    const auto [begin, end] = columns_of(chunks, i);
    if (problem.has_bias) add_bias(problem, product, begin, end - begin, stream);
    if (problem.low_rank.rank > 0 && !is_in_weight) add_update(problem, begin, end, device, stream);
  }
}

}  // namespace qlora
