// y = x W^T + bias and dx = dy W through chunks of W: dequantise a chunk, multiply it with cuBLAS, take the next one.
//
//   forward         chunk = rows n0..n1 of W [n, k]:  y[:, n0:n1] = x W[n0:n1, :]^T + bias[n0:n1]
//   input gradient  chunk = columns k0..k1 of W:      dx[:, k0:k1] = dy W[:, k0:k1]
//
// No chunk adds to another's output, so each output is rounded once. The chunk buffer is reused: where many rows allow
// narrow chunks it is written and read in L2, without reaching HBM. With a bias the product stays in fp32, chunk by
// chunk, and is rounded once with the bias added: cuBLAS rounds some 16-bit products before it adds to them. A low-rank
// term is added to the chunk of the weight, if it is a product of the same input, else to that of the output, which
// then lies in L2 for the most part. Best for m of some hundreds and more.
//
// Workspace: [cuBLAS 32 MiB][chunk][with a bias: fp32 product, m rows of a chunk's columns]
#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "core/status.h"
#include "cuda/device/numeric.cuh"
#include "cuda/dispatch.h"
#include "cuda/gemm/cublas.h"
#include "cuda/gemm/gemm.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/lora/lora.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunkMultiple = 256;                 // of rows or columns: whole tiles of cuBLAS' kernels
constexpr int64_t kMinChunkBytes = int64_t{16} << 20;   // below, launches cost more than L2 saves
constexpr int64_t kMaxChunkBytes = int64_t{128} << 20;  // what a caller's workspace may be asked for
constexpr int64_t kMaxProductBytes = int64_t{64} << 20;
constexpr int64_t kProductBytes = sizeof(float);
constexpr int64_t kBufferAlignment = 256;
constexpr int64_t kRankDepthPerRow = 256;  // see adds_to_weight

// Columns of the output that a chunk should cover: few enough to stay in L2, enough that cuBLAS fills the machine.
// H100, 2026-11: QLORA_DENSE_CHUNK_BYTES swept over widths 512 to 14336 on the layers of Llama-3-8B; 2048 was up to 8 %
// better than the whole weight from m = 4096 on, and up to a third worse than 4096 below m = 1024.
int64_t best_width(int64_t m) {
  if (m >= 4096) return 2048;
  return m >= 1024 ? 16384 : 4096;
}

// Bytes of a chunk; QLORA_DENSE_CHUNK_BYTES overrides.
int64_t chunk_bytes(int64_t m, int64_t column_bytes) {
  const char* const text = std::getenv("QLORA_DENSE_CHUNK_BYTES");
  if (text == nullptr || *text == '\0') return std::clamp(best_width(m) * column_bytes, kMinChunkBytes, kMaxChunkBytes);
  char* end = nullptr;
  const long long bytes = std::strtoll(text, &end, 10);
  expect(*end == '\0' && bytes > 0, "QLORA_DENSE_CHUNK_BYTES: expected a positive number of bytes, got ", text);
  return bytes;
}

// Rows (forward) or columns (input gradient) of a chunk: the number of chunks that the size asks for, evenly wide.
int64_t chunk_width(const Gemm& problem) {
  const bool is_forward = problem.direction == Direction::kForward;
  const int64_t width = is_forward ? problem.weight.rows : problem.weight.cols;
  const int64_t depth = is_forward ? problem.weight.cols : problem.weight.rows;
  const int64_t column_bytes = depth * size_of(problem.dtype);
  int64_t widest = chunk_bytes(problem.m, column_bytes) / column_bytes;
  if (problem.has_bias) widest = std::min(widest, kMaxProductBytes / kProductBytes / problem.m);
  widest = widest / kChunkMultiple * kChunkMultiple;
  const int64_t num_chunks = ceil_div(width, std::max(widest, kChunkMultiple));
  return std::min(width, round_up(ceil_div(width, num_chunks), kChunkMultiple));
}

// Bytes of the chunk buffer, padded so that what follows is aligned.
int64_t chunk_buffer_size(const Gemm& problem) {
  const int64_t depth = problem.direction == Direction::kForward ? problem.weight.cols : problem.weight.rows;
  return round_up(chunk_width(problem) * depth * size_of(problem.dtype), kBufferAlignment);
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

}  // namespace

bool supports_dense(const Gemm& problem, const Device&, std::string* why_not) {
  if (problem.m == 0 || num_values(problem.weight) == 0) return refuse(why_not, "m, n and k: expected at least 1 each");
  const std::string missing = cublas_missing();
  return missing.empty() || refuse(why_not, missing);
}

int64_t dense_workspace_size(const Gemm& problem, const Device&) {
  const int64_t product = problem.has_bias ? problem.m * chunk_width(problem) * kProductBytes : 0;
  return kCublasWorkspaceBytes + chunk_buffer_size(problem) + product;
}

void dense(const Gemm& problem, const Device& device, cudaStream_t stream) {
  const bool is_forward = problem.direction == Direction::kForward;
  const int64_t n = problem.weight.rows;
  const int64_t k = problem.weight.cols;
  const int64_t width = is_forward ? n : k;
  const int64_t step = chunk_width(problem);
  const bool is_in_weight = adds_to_weight(problem, device);
  char* const chunk = static_cast<char*>(problem.workspace) + kCublasWorkspaceBytes;
  float* const product = reinterpret_cast<float*>(chunk + chunk_buffer_size(problem));
  for (int64_t begin = 0; begin < width; begin += step) {
    const int64_t end = std::min(begin + step, width);
    const Window window = is_forward ? Window{begin, end, 0, k} : Window{0, n, begin, end};
    const int64_t chunk_row = window.col_end - window.col_begin;
    if (is_in_weight) {
      merged_weight(problem.weight, *problem.low_rank.adapter, window, chunk, chunk_row, problem.dtype, 0, device,
                    stream);
    } else {
      dequantize_4bit(problem.weight, window, chunk, chunk_row, problem.dtype, 0, device, stream);
    }
    CublasGemm gemm = {};
    gemm.dtype = problem.dtype;
    gemm.c_dtype = problem.has_bias ? QLORA_FLOAT32 : problem.dtype;
    gemm.m = problem.m;
    gemm.n = end - begin;
    gemm.k = is_forward ? k : n;
    gemm.a = problem.input;
    gemm.lda = gemm.k;
    gemm.b = chunk;
    gemm.ldb = chunk_row;
    gemm.is_b_transposed = is_forward;
    gemm.c = problem.has_bias ? static_cast<void*>(product)
                              : static_cast<char*>(problem.output) + begin * size_of(problem.dtype);
    gemm.ldc = problem.has_bias ? gemm.n : width;
    cublas_gemm(gemm, device.index, problem.workspace, stream);
    if (problem.has_bias) add_bias(problem, product, begin, gemm.n, stream);
    if (problem.low_rank.rank > 0 && !is_in_weight) add_update(problem, begin, end, device, stream);
  }
}

}  // namespace qlora
