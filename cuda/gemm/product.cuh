// What becomes of a product whose 16 rows a warp are columns of the output (wgmma.cuh, WeightOperand), tokens its
// columns: the output, 16 bytes at a time, or a part of it in fp32, which add_products adds to the others.
#pragma once

#include <cstdint>

#include "cuda/device/numeric.cuh"
#include "cuda/device/shared.cuh"

namespace qlora {

inline constexpr int kProductRows = 16;                                // of a warp
inline constexpr int kProductTokens = 16;                              // that are stored at once
inline constexpr int kStoreBytes = kProductRows * kProductTokens * 2;  // of shared memory a warp needs

// Where products go: output [m, width], or parts [num_parts][ceil(width / 16)][ceil(m / 16)] of 16 x 16 sums, each as
// its lanes hold them. (Those of wide_grad_sm90 are [num_parts, m, width], for add_dealt_parts.)
struct ProductTarget {
  void* output;
  const void* bias;  // [width] or null
  float* parts;      // null: the output is written
  int m;
  int width;
  bool is_aligned;  // output to 16 bytes, width a multiple of 8
};

inline int64_t num_part_floats(int64_t m, int64_t width) {
  constexpr int64_t kSize = kProductRows * kProductTokens;
  return (width + kProductRows - 1) / kProductRows * ((m + kProductTokens - 1) / kProductTokens) * kSize;
}

#if defined(__CUDACC__)

// Row g of each 8 of a warp's 16 is this one: see WeightOperand.
__device__ __forceinline__ int dealt_row(int group) { return group % 4 * 2 + group / 4; }

// The sums of tokens 16 `token_group`.. of part `part`, for rows `first`..: a lane's 8 as two float4, 32 lanes apart.
__device__ __forceinline__ float4* find_part(const ProductTarget& target, int part, int first, int token_group) {
  const int num_groups = (target.width + kProductRows - 1) / kProductRows;
  const int num_token_groups = (target.m + kProductTokens - 1) / kProductTokens;
  const int64_t place = (int64_t{part} * num_groups + first / kProductRows) * num_token_groups + token_group;
  return reinterpret_cast<float4*>(target.parts) + place * (kProductRows * kProductTokens / 4) + threadIdx.x % 32;
}

// sums += products of a block of columns that share a row's scale, low of the lane's first row, high of its second.
template <int kCount>
__device__ __forceinline__ void add_scaled(float (&sums)[kCount], const float (&products)[kCount], float low,
                                           float high) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] = fmaf(i % 4 < 2 ? low : high, products[i], sums[i]);
}

// 4 matrices of 8 x 8 values of 16 bits, each transposed: lane 8 j + r gives the address of column r of matrix j.
__device__ __forceinline__ void store_transposed(uint32_t address, const uint32_t (&words)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#endif
}

// By a warp: the output of its rows first.. for tokens 16 token_group.. and as many more as `product` has. `shared` is
// kStoreBytes of the warp's own.
template <typename T, int kCols>
__device__ __forceinline__ void store_product(const float* product, const ProductTarget& target, int first,
                                              int token_group, void* shared) {
  static_assert(kCols % kProductTokens == 0);
  const int lane = threadIdx.x % 32;
  float bias[2] = {};
  if (target.bias != nullptr) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first + dealt_row(lane / 4) + 8 * h;
      if (row < target.width) bias[h] = to_float(static_cast<const T*>(target.bias)[row]);
    }
  }
  const auto place = [&](int token, int piece) {
    return shared_address(shared) + token * 32 + (piece ^ token / 4 % 2) * 16;
  };
  const uint32_t to = place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const uint32_t from = place(lane / 2, lane % 2);
  const int n = first + lane % 2 * 8;
#pragma unroll
  for (int c = 0; c < kCols / kProductTokens; ++c) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float pair[2] = {product[8 * c + 2 * i] + bias[i % 2], product[8 * c + 2 * i + 1] + bias[i % 2]};
      words[i] = Word<T>::pack(pair);
    }
    __syncwarp();
    store_transposed(to, words);
    __syncwarp();
    const uint4 v = load_shared_16_bytes(from);
    const uint4 dealt = make_uint4(__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632),
                                   __byte_perm(v.y, v.w, 0x5410), __byte_perm(v.y, v.w, 0x7632));
    const int token = (token_group + c) * kProductTokens + lane / 2;
    if (token >= target.m || n >= target.width) continue;
    T* const output = static_cast<T*>(target.output) + int64_t{token} * target.width + n;
    if (target.is_aligned) {
      *reinterpret_cast<uint4*>(output) = dealt;
    } else {
      const T* const values = reinterpret_cast<const T*>(&dealt);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (n + i < target.width) output[i] = values[i];
      }
    }
  }
}

// By a warp: the same as part `part`.
template <int kCols>
__device__ __forceinline__ void store_part(const float* product, const ProductTarget& target, int part, int first,
                                           int token_group) {
  if (first >= target.width) return;
#pragma unroll
  for (int c = 0; c < kCols / kProductTokens; ++c) {
    if ((token_group + c) * kProductTokens >= target.m) break;
    float4* const place = find_part(target, part, first, token_group + c);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float* const four = product + 8 * c + 4 * h;
      place[h * 32] = make_float4(four[0], four[1], four[2], four[3]);
    }
  }
}

#endif

}  // namespace qlora
