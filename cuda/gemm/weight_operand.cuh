// The weight as the 64-row operand of wgmma, from shared memory to the registers of a warp that has 16 of the rows.
//
// The operand's layout gives lane i of a quad every fourth byte of a row's 32 bytes of 64 columns. The lanes read 8
// bytes each and exchange them: that takes half the time of the shared memory that reading all 32 takes.
#pragma once

#include <cstdint>

#include "cuda/device/matrix_load.cuh"
#include "cuda/device/numeric.cuh"
#include "cuda/device/pair_table.cuh"
#include "cuda/device/shared.cuh"
#include "cuda/gemm/product.cuh"

namespace qlora {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Lane i of a quad has bytes 8i..8i+7 of a row's 32, two words; it gets, in byte j of x and y, byte i of lane j's two
// words.
class QuadTranspose {
 public:
  __device__ __forceinline__ QuadTranspose() {
    const bool is_high = threadIdx.x % 4 / 2 != 0;
    const bool is_odd = threadIdx.x % 2 != 0;
    send_half_ = keep(is_high ? 0x5410 : 0x7632);
    low_half_ = keep(is_high ? 0x3254 : 0x5410);
    high_half_ = keep(is_high ? 0x3276 : 0x7610);
    send_byte_ = keep(is_odd ? 0x6420 : 0x7531);
    low_byte_ = keep(is_odd ? 0x3514 : 0x5240);
    high_byte_ = keep(is_odd ? 0x3716 : 0x7260);
  }
  __device__ __forceinline__ uint2 operator()(uint2 words) const {
    const uint32_t half = __shfl_xor_sync(0xFFFFFFFFu, __byte_perm(words.x, words.y, send_half_), 2);
    const uint32_t low = __byte_perm(words.x, half, low_half_);
    const uint32_t high = __byte_perm(words.y, half, high_half_);
    const uint32_t byte = __shfl_xor_sync(0xFFFFFFFFu, __byte_perm(low, high, send_byte_), 1);
    return make_uint2(__byte_perm(low, byte, low_byte_), __byte_perm(high, byte, high_byte_));
  }

 private:
  // Selectors: what goes to the lane two further, and what of each word becomes of that; the same for the next lane.
  uint32_t send_half_;
  uint32_t low_half_;
  uint32_t high_half_;
  uint32_t send_byte_;
  uint32_t low_byte_;
  uint32_t high_byte_;
};

// The operand of a lane for a block of 64 columns: 4 products of 16.
using Fragments = uint32_t[4][4];

// Rows of 256 columns in shared memory, 128 bytes each, the 16-byte piece p of row r at place p ^ r % 8.
template <typename Table>
class WeightOperand {
 public:
  // `first_row` is the warp's.
  __device__ __forceinline__ WeightOperand(const unsigned char* bytes, const unsigned char* table, int first_row)
      : table_(table),
        row_(keep(shared_address(bytes) + (first_row + row()) * kRowBytes + threadIdx.x % 2 * 8)),
        swizzle_(keep((threadIdx.x % 4 / 2 ^ row()) * 16)),
        values_(keep(shared_address(bytes) + (first_row + value_row()) * kRowBytes)),
        value_swizzle_(keep((threadIdx.x % 32 / 16 ^ value_row() % 8) * 16)) {}

  // First of the lane's two rows of the warp's 16; the other is 8 further. The lanes that load at once, half a warp,
  // have every second row: the swizzle then leads them to different banks.
  static __device__ __forceinline__ int row() { return dealt_row(threadIdx.x % 32 / 4); }

  // The table's values; `offset` in bytes leads to a stage other than the first.
  __device__ __forceinline__ void decode(uint32_t offset, int block, Fragments& a) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint2 bytes = load(offset, block, h);
      a[0][h] = table_.template pair<0>(bytes.x);
      a[0][2 + h] = table_.template pair<0>(bytes.y);
      a[1][h] = table_.template pair<1>(bytes.x);
      a[1][2 + h] = table_.template pair<1>(bytes.y);
      a[2][h] = table_.template pair<2>(bytes.x);
      a[2][2 + h] = table_.template pair<2>(bytes.y);
      a[3][h] = table_.template pair<3>(bytes.x);
      a[3][2 + h] = table_.template pair<3>(bytes.y);
    }
  }

  // The table's values times their row's scale in fp32, rounded to T.
  template <typename T>
  __device__ __forceinline__ void decode_scaled(uint32_t offset, int block, const float (&scales)[2],
                                                Fragments& a) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint2 bytes = load(offset, block, h);
      a[0][h] = scaled<T, 0>(bytes.x, scales[h]);
      a[0][2 + h] = scaled<T, 0>(bytes.y, scales[h]);
      a[1][h] = scaled<T, 1>(bytes.x, scales[h]);
      a[1][2 + h] = scaled<T, 1>(bytes.y, scales[h]);
      a[2][h] = scaled<T, 2>(bytes.x, scales[h]);
      a[2][2 + h] = scaled<T, 2>(bytes.y, scales[h]);
      a[3][h] = scaled<T, 3>(bytes.x, scales[h]);
      a[3][2 + h] = scaled<T, 3>(bytes.y, scales[h]);
    }
  }

  // Of a stage that holds values of 64 columns in 16 bits in place of 256 packed ones.
  __device__ __forceinline__ void load_values(uint32_t offset, Fragments& a) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) load_matrices(a[j], values_ + offset + ((j * 32) ^ value_swizzle_));
  }

 private:
  static constexpr int kRowBytes = 128;

  // Whose address the lane gives in load_values, of the warp's 16.
  static __device__ __forceinline__ int value_row() { return dealt_row(threadIdx.x % 8) + threadIdx.x % 16 / 8 * 8; }

  // Of the lane's row `h`.
  __device__ __forceinline__ uint2 load(uint32_t offset, int block, int h) const {
    return transpose_(load_shared_8_bytes(row_ + offset + ((block * 32) ^ swizzle_) + h * 8 * kRowBytes));
  }
  template <typename T, int kByte>
  __device__ __forceinline__ uint32_t scaled(uint32_t word, float scale) const {
    const float2 values = table_.floats(word, table_selector(kByte));
    const float products[2] = {values.x * scale, values.y * scale};
    return Word<T>::pack(products);
  }

  QuadTranspose transpose_;
  Table table_;
  uint32_t row_;  // shared address in the first stage
  uint32_t swizzle_;
  uint32_t values_;
  uint32_t value_swizzle_;
};

#endif

}  // namespace qlora
