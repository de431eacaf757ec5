// y[i, j] = round(sum_t x[i, t] W[j, t] + bias[j])    forward,        W [n, k]
// dx[i, j] = round(sum_t dy[i, t] W[t, j])            input gradient
//
// W is dequantised and rounded to the dtype, then sums run in fp32 in the order of t. A thread an output, no tiles, no
// shared memory: right for every shape and alignment, fast for none. The oracle for every other kernel on the GPU.
#include <cstdint>

#include "cuda/device/decode.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/scales.cuh"
#include "cuda/dispatch.h"
#include "cuda/gemm/gemm.h"
#include "cuda/launch.h"
#include "cuda/weight_arguments.h"

namespace qlora {
namespace {

constexpr int kThreads = 256;

// W(j, t) has flat index j * output_stride + t * sum_stride.
struct NaiveShape {
  int64_t m;
  int64_t num_outputs;
  int64_t num_terms;
  int64_t output_stride;
  int64_t sum_stride;
};

// input [m, num_terms], bias [num_outputs] or null, output [m, num_outputs]
template <typename T, Format F>
__global__ __launch_bounds__(kThreads) void naive_kernel(const T* __restrict__ input,
                                                         const uint8_t* __restrict__ packed, Scales scales,
                                                         const T* __restrict__ bias, NaiveShape shape,
                                                         T* __restrict__ output) {
  const int64_t size = shape.m * shape.num_outputs;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; index < size; index += stride) {
    const int64_t i = index / shape.num_outputs;
    const int64_t j = index - i * shape.num_outputs;
    float sum = 0.0f;
    for (int64_t t = 0; t < shape.num_terms; ++t) {
      const int64_t weight_index = j * shape.output_stride + t * shape.sum_stride;
      const T w = decode_one<T, F>(packed, weight_index, load_scale(scales, weight_index));
      sum = fmaf(to_float(input[i * shape.num_terms + t]), to_float(w), sum);
    }
    if (bias != nullptr) sum += to_float(bias[j]);
    output[index] = from_float<T>(sum);
  }
}

}  // namespace

bool supports_naive(const Gemm&, const Device&, std::string*) { return true; }

void naive(const Gemm& problem, const Device&, cudaStream_t stream) {
  const int64_t n = problem.weight.rows;
  const int64_t k = problem.weight.cols;
  const NaiveShape shape =
      problem.direction == Direction::kForward ? NaiveShape{problem.m, n, k, k, 1} : NaiveShape{problem.m, k, n, 1, k};
  dispatch_dtype(problem.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    dispatch_format(problem.weight.format, [&](auto format_tag) {
      launch("naive_kernel", naive_kernel<T, decltype(format_tag)::value>,
             grid_size(shape.m * shape.num_outputs, kThreads), kThreads, stream, static_cast<const T*>(problem.input),
             problem.weight.packed, scales_of(problem.weight), static_cast<const T*>(problem.bias), shape,
             static_cast<T*>(problem.output));
    });
  });
}

}  // namespace qlora
