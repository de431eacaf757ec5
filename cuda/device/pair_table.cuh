// A packed byte to its two values at once: a table in shared memory of 256 pairs (low half: the even value, from the
// high nibble), each 32 times, so that lane i reads its own copy in bank i and no byte's value causes a conflict.
//
// An entry takes 256 bytes of which 128 are used, and the table lies at a shared address that is a multiple of its 64
// KiB: then one byte permutation makes the address, of the table's high bytes, the packed byte and the lane's low byte.
// A pair costs PRMT + LDS.32; at 31 lanes a clock (H100, measured) an SM decodes 62 values a clock, and HBM needs 25.
//
// The values are the code book times `scale`, rounded to T; dividing the block's scale by it afterwards leaves the
// rounding alone. NF4 in bf16 at 1.436725, in fp16 at 1.36619 have less than half the rms error of NF4 at 1 (0.08 and
// 0.008 %), FP4 at 12 is exact.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/format.h"
#include "cuda/device/numeric.cuh"
#include "cuda/device/shared.cuh"

namespace qlora {

// Bytes of an address in a table: the lane's but for the second, which is byte `byte` of a packed word.
__device__ __forceinline__ constexpr uint32_t table_selector(int byte) { return 0x7604 | byte << 4; }

// The value of each code times a factor; kernels take it as a parameter, so that filling a table waits for no load.
struct CodeValues {
  float of_code[kNumCodes];

  static CodeValues of(Format format, float factor) {
    CodeValues values;
    for (int code = 0; code < kNumCodes; ++code) {
      values.of_code[code] = (format == Format::kNF4 ? kNF4Codes[code] : kFP4Codes[code]) * factor;
    }
    return values;
  }
};

// Fills a table of 256 entries of kEntryBytes, by kThreads threads, of whole warps: pack(even, odd) at each lane's
// place in an entry. A barrier among those that read the table must follow.
template <int kThreads, int kEntryBytes, int kUnroll, typename Thread, typename Pack>
__device__ __forceinline__ void fill_table(unsigned char* table, const CodeValues& values, Thread thread, Pack&& pack) {
  const int lane = thread % 32;
  const float value = values.of_code[lane % kNumCodes];
#pragma unroll kUnroll
  for (int entry = thread / 32; entry < 256; entry += kThreads / 32) {
    const float even = __shfl_sync(0xFFFFFFFFu, value, entry / kNumCodes);
    const float odd = __shfl_sync(0xFFFFFFFFu, value, entry % kNumCodes);
    const auto packed = pack(even, odd);
    reinterpret_cast<std::remove_const_t<decltype(packed)>*>(table + entry * kEntryBytes)[lane] = packed;
  }
}

template <typename T>
class PairTable {
 public:
  static constexpr int kBytes = 256 * 256;

  // The factor of the table's values.
  static __host__ __device__ constexpr float scale(Format format) {
    if (format == Format::kFP4) return 12.0f;
    return std::is_same_v<T, __nv_bfloat16> ? 1.436725f : 1.36619f;
  }
  static CodeValues values(Format format) { return CodeValues::of(format, scale(format)); }

  static __device__ __forceinline__ uint32_t pack(float even, float odd) {
    const float pair[2] = {even, odd};
    return Word<T>::pack(pair);
  }
  template <int kThreads>
  static __device__ __forceinline__ void fill(unsigned char* table, const CodeValues& values,
                                              int thread = threadIdx.x) {
    fill_table<kThreads, 256, 16>(table, values, thread, pack);
  }

  __device__ __forceinline__ explicit PairTable(const unsigned char* table)
      : lane_address_(keep(shared_address(table) + threadIdx.x % 32 * 4)) {}

  // The pair of byte kByte of `word`.
  template <int kByte>
  __device__ __forceinline__ uint32_t pair(uint32_t word) const {
    return pair(word, table_selector(kByte));
  }
  __device__ __forceinline__ uint32_t pair(uint32_t word, uint32_t selector) const {
    uint32_t pair;
    asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(__byte_perm(word, lane_address_, selector)));
    return pair;
  }
  __device__ __forceinline__ float2 floats(uint32_t word, uint32_t selector) const {
    float values[2];
    Word<T>::unpack(pair(word, selector), values);
    return make_float2(values[0], values[1]);
  }

 private:
  uint32_t lane_address_;
};

// The same table at kAddress of the block's shared memory, which need not be a multiple of 64 KiB: the load adds it.
template <typename T, int kAddress>
class FixedPairTable {
 public:
  // With the block's place in its cluster, which addresses begin with.
  __device__ __forceinline__ explicit FixedPairTable(const unsigned char* table)
      : lane_offset_(keep(shared_address(table) - kAddress + threadIdx.x % 32 * 4)) {}

  // The pair of byte kByte of `word`.
  template <int kByte>
  __device__ __forceinline__ uint32_t pair(uint32_t word) const {
    uint32_t pair;
    asm("ld.shared.u32 %0, [%1 + %2];"
        : "=r"(pair)
        : "r"(__byte_perm(word, lane_offset_, table_selector(kByte))), "n"(kAddress));
    return pair;
  }

 private:
  uint32_t lane_offset_;
};

// The same in half the shared memory, for GPUs with little of it: entries of 128 bytes at any 128-byte aligned address.
// A pair costs SHF + LOP3 + LDS.32.
template <typename T>
class CompactPairTable {
 public:
  static constexpr int kBytes = 256 * 128;

  template <int kThreads>
  static __device__ __forceinline__ void fill(unsigned char* table, const CodeValues& values) {
    fill_table<kThreads, 128, 8>(table, values, threadIdx.x, PairTable<T>::pack);
  }

  __device__ __forceinline__ explicit CompactPairTable(const unsigned char* table)
      : table_(table), lane_offset_(keep(threadIdx.x % 32 * 4)) {}

  // The pair of byte kByte of `word`.
  template <int kByte>
  __device__ __forceinline__ uint32_t pair(uint32_t word) const {
    const uint32_t shifted = kByte == 0 ? word << 7 : word >> (kByte * 8 - 7);
    return *reinterpret_cast<const uint32_t*>(table_ + ((shifted & 0x7F80) | lane_offset_));
  }

 private:
  const unsigned char* table_;
  uint32_t lane_offset_;
};

// The same with exact fp32 values, for weights that are scaled before they are rounded: LDS.64 reads two banks a lane,
// so a pair costs twice the time. Entries of 256 bytes, all used: the pair 32 times.
class FloatPairTable {
 public:
  static constexpr int kBytes = 256 * 256;

  static CodeValues values(Format format) { return CodeValues::of(format, 1.0f); }

  template <int kThreads>
  static __device__ __forceinline__ void fill(unsigned char* table, const CodeValues& values,
                                              int thread = threadIdx.x) {
    fill_table<kThreads, 256, 4>(table, values, thread, [](float even, float odd) { return make_float2(even, odd); });
  }

  __device__ __forceinline__ explicit FloatPairTable(const unsigned char* table)
      : lane_address_(keep(shared_address(table) + threadIdx.x % 32 * 8)) {}

  // The factor of the table's values.
  static __host__ __device__ constexpr float scale(Format) { return 1.0f; }

  __device__ __forceinline__ float2 floats(uint32_t word, uint32_t selector) const {
    float2 pair;
    asm("ld.shared.v2.f32 {%0, %1}, [%2];"
        : "=f"(pair.x), "=f"(pair.y)
        : "r"(__byte_perm(word, lane_address_, selector)));
    return pair;
  }

 private:
  uint32_t lane_address_;
};

}  // namespace qlora
