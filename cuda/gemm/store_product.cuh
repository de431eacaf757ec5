// From the registers of a product whose rows are columns of the output (wgmma.cuh) to the output, 16 bytes at a time.
#pragma once

#include <cstdint>

#include "cuda/device/numeric.cuh"
#include "cuda/device/shared.cuh"

namespace qlora {

inline constexpr int kStoreBytes = 512;  // of shared memory a warp needs: 16 tokens of 16 outputs

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// 4 matrices of 8 x 8 values of 16 bits, each transposed: lane 8 j + r gives the address of column r of matrix j.
__device__ __forceinline__ void store_transposed(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// By a warp: output[token][first + n] = product[n][token] + bias of n, for its 16 values of n and kCols tokens from
// `token` on. Rows of the output are `width` values; what lies behind m and width is not written. is_aligned: output
// to 16 bytes, and width a multiple of 8. kIsDealt: row g of each 8 of the product is n = g % 4 * 2 + g / 4.
template <typename T, bool kIsDealt, int kCols>
__device__ __forceinline__ void store_product(const float (&product)[kCols / 2], float bias_low, float bias_high,
                                              T* output, int token, int m, int first, int width, bool is_aligned,
                                              void* shared) {
  static_assert(kCols % 16 == 0);
  const int lane = threadIdx.x % 32;
  const auto place = [&](int t, int piece) { return shared_address(shared) + t * 32 + (piece ^ t / 4 % 2) * 16; };
  const uint32_t to = place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const uint32_t from = place(lane / 2, lane % 2);
  const int n = first + lane % 2 * 8;
#pragma unroll
  for (int c = 0; c < kCols / 16; ++c) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float bias = i % 2 == 0 ? bias_low : bias_high;
      const float pair[2] = {product[8 * c + 2 * i] + bias, product[8 * c + 2 * i + 1] + bias};
      words[i] = Word<T>::pack(pair);
    }
    __syncwarp();
    store_transposed(to, words);
    __syncwarp();
    uint4 v = load_shared_16_bytes(from);
    if constexpr (kIsDealt) {
      v = make_uint4(__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632), __byte_perm(v.y, v.w, 0x5410),
                     __byte_perm(v.y, v.w, 0x7632));
    }
    const int t = token + 16 * c + lane / 2;
    if (t >= m || n >= width) continue;
    T* const target = output + int64_t{t} * width + n;
    if (is_aligned) {
      *reinterpret_cast<uint4*>(target) = v;
    } else {
      const T* const values = reinterpret_cast<const T*>(&v);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (n + i < width) target[i] = values[i];
      }
    }
  }
}

#endif

}  // namespace qlora
