// y = x W^T + bias and dx = dy W through chunks of W: dequantise a chunk, multiply it with cuBLAS, take the next one.
//
//   forward         chunk = rows n0..n1 of W [n, k]:  y[:, n0:n1] = x W[n0:n1, :]^T + bias[n0:n1]
//   input gradient  chunk = columns k0..k1 of W:      dx[:, k0:k1] = dy W[:, k0:k1]
//
// No chunk adds to another's output, so each output is rounded once. The chunk buffer is reused: where many rows allow
// narrow chunks it is written and read in L2, without reaching HBM. Bias: y is filled with it and the product is added
// in fp32 (beta = 1). Best for m of some hundreds and more.
//
// Workspace: [cuBLAS 32 MiB][chunk]
#include <algorithm>
#include <cstdint>
#include <cstdlib>

#include "core/status.h"
#include "cuda/dispatch.h"
#include "cuda/gemm/cublas.h"
#include "cuda/gemm/gemm.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunkMultiple = 256;                 // of rows or columns: whole tiles of cuBLAS' kernels
constexpr int64_t kMinChunkBytes = int64_t{16} << 20;   // below, launches cost more than L2 saves
constexpr int64_t kMaxChunkBytes = int64_t{128} << 20;  // what a caller's workspace may be asked for

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
  const int64_t widest = chunk_bytes(problem.m, column_bytes) / column_bytes / kChunkMultiple * kChunkMultiple;
  const int64_t num_chunks = ceil_div(width, std::max(widest, kChunkMultiple));
  return std::min(width, ceil_div(ceil_div(width, num_chunks), kChunkMultiple) * kChunkMultiple);
}

// y [m, row_words] with every row = bias [row_words]; a thread a column, rows strided over gridDim.y.
template <typename Word>
__global__ __launch_bounds__(kThreads) void fill_rows_kernel(const Word* __restrict__ bias, int64_t m,
                                                             int64_t row_words, Word* __restrict__ y) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t col = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; col < row_words; col += stride) {
    const Word word = bias[col];
    for (int64_t row = blockIdx.y; row < m; row += gridDim.y) y[row * row_words + col] = word;
  }
}

template <typename Word>
void fill_rows_of(const Gemm& problem, int64_t row_bytes, cudaStream_t stream) {
  const int64_t row_words = row_bytes / static_cast<int64_t>(sizeof(Word));
  launch("fill_rows_kernel", fill_rows_kernel<Word>,
         dim3(grid_size(row_words, kThreads), grid_size(problem.m, 1, kMaxGridY)), kThreads, stream,
         static_cast<const Word*>(problem.bias), problem.m, row_words, static_cast<Word*>(problem.output));
}

void fill_with_bias(const Gemm& problem, cudaStream_t stream) {
  const int64_t row_bytes = problem.weight.rows * size_of(problem.dtype);
  if (row_bytes % 16 == 0 && is_aligned(problem.bias, 16) && is_aligned(problem.output, 16)) {
    fill_rows_of<uint4>(problem, row_bytes, stream);
  } else if (problem.dtype == QLORA_FLOAT32) {
    fill_rows_of<uint32_t>(problem, row_bytes, stream);
  } else {
    fill_rows_of<uint16_t>(problem, row_bytes, stream);
  }
}

}  // namespace

std::string supports_dense(const Gemm& problem, const Device&) {
  if (problem.m == 0 || num_values(problem.weight) == 0) return "m, n and k: expected at least 1 each";
  return cublas_missing();
}

int64_t dense_workspace_size(const Gemm& problem, const Device&) {
  const int64_t depth = problem.direction == Direction::kForward ? problem.weight.cols : problem.weight.rows;
  return kCublasWorkspaceBytes + chunk_width(problem) * depth * size_of(problem.dtype);
}

void dense(const Gemm& problem, const Device& device, cudaStream_t stream) {
  const bool is_forward = problem.direction == Direction::kForward;
  const int64_t n = problem.weight.rows;
  const int64_t k = problem.weight.cols;
  const int64_t width = is_forward ? n : k;
  const int64_t step = chunk_width(problem);
  char* const chunk = static_cast<char*>(problem.workspace) + kCublasWorkspaceBytes;
  if (problem.bias != nullptr) fill_with_bias(problem, stream);
  for (int64_t begin = 0; begin < width; begin += step) {
    const int64_t end = std::min(begin + step, width);
    const Window window = is_forward ? Window{begin, end, 0, k} : Window{0, n, begin, end};
    const int64_t chunk_row = window.col_end - window.col_begin;
    dequantize_4bit(problem.weight, window, chunk, chunk_row, problem.dtype, stream);
    CublasGemm gemm = {};
    gemm.dtype = problem.dtype;
    gemm.m = problem.m;
    gemm.n = end - begin;
    gemm.k = is_forward ? k : n;
    gemm.a = problem.input;
    gemm.lda = gemm.k;
    gemm.b = chunk;
    gemm.ldb = chunk_row;
    gemm.is_b_transposed = is_forward;
    gemm.beta = problem.bias != nullptr ? 1.0f : 0.0f;
    gemm.c = static_cast<char*>(problem.output) + begin * size_of(problem.dtype);
    gemm.ldc = width;
    cublas_gemm(gemm, device.index, problem.workspace, stream);
  }
}

}  // namespace qlora
