// Columns of a transposed weight rounded to NF4 in turn (see qlora.h):
//   rounded[j] = book[code(open[j] * inverse[j])] * scales[j], change[j] = before[j] - rounded[j],
//   open[l] += coupling[j, l] * change[j] for l > j; every step rounded to fp32 by itself, as on the CPU.
//
// A thread a row of the weight: its open values are registers, since the loops over columns are unrolled. Neighbouring
// threads are neighbouring rows, hence whole lines of memory in each column. coupling [32, 32] is in shared memory,
// where a warp reads one word at a time.
#include <cstdint>

#include "cuda/device/decode.cuh"
#include "cuda/device/encode.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace qlora {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxColumns = QLORA_MAX_ROUND_COLUMNS;

// values, scales, inverse, previous, rounded, change [num_columns, rows]; coupling [num_columns, num_columns]
__global__ __launch_bounds__(kThreads) void round_columns_kernel(
    const float* __restrict__ values, const float* __restrict__ scales, const float* __restrict__ inverse,
    const float* __restrict__ coupling, const float* __restrict__ previous, int num_columns, int64_t rows,
    float* __restrict__ rounded, float* __restrict__ change) {
  __shared__ EncodeTable table;
  __shared__ float code_values[kNumCodes];
  __shared__ float shared_coupling[kMaxColumns][kMaxColumns];
  load_encode_table<Format::kNF4>(table);
  if (threadIdx.x < kNumCodes) code_values[threadIdx.x] = code_value<Format::kNF4>(threadIdx.x);
  for (int i = static_cast<int>(threadIdx.x); i < kMaxColumns * kMaxColumns; i += kThreads) {
    const int j = i / kMaxColumns, l = i % kMaxColumns;
    shared_coupling[j][l] = l > j && l < num_columns ? coupling[j * num_columns + l] : 0.0f;
  }
  __syncthreads();

  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  float open[kMaxColumns];
#pragma unroll
  for (int j = 0; j < kMaxColumns; ++j) open[j] = j < num_columns ? values[j * rows + row] : 0.0f;
#pragma unroll
  for (int j = 0; j < kMaxColumns; ++j) {
    if (j >= num_columns) break;
    const int64_t at = j * rows + row;
    const float scaled = fminf(fmaxf(__fmul_rn(open[j], inverse[at]), -1.0f), 1.0f);  // A NaN becomes -1.
    const float result = __fmul_rn(code_values[append_code<Format::kNF4>(0, scaled, table)], scales[at]);
    const float difference = __fsub_rn(previous == nullptr ? open[j] : previous[at], result);
    rounded[at] = result;
    change[at] = difference;
#pragma unroll
    for (int l = j + 1; l < kMaxColumns; ++l) {
      open[l] = __fadd_rn(open[l], __fmul_rn(shared_coupling[j][l], difference));
    }
  }
}

}  // namespace

void round_columns_nf4(const float* values, const float* scales, const float* inverse, const float* coupling,
                       const float* previous, int num_columns, int64_t rows, float* rounded, float* change,
                       cudaStream_t stream) {
  launch("round_columns_kernel", round_columns_kernel, grid_size(rows, kThreads), kThreads, stream, values, scales,
         inverse, coupling, previous, num_columns, rows, rounded, change);
}

}  // namespace qlora
