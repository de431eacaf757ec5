// The 4-bit format, once, for host and device: code books, decision thresholds, nibble order, block arithmetic.
//
// NF4 code values are quantiles of the normal distribution, FP4 is sign + 3-bit "0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1".
// Values and thresholds are bitsandbytes' literals: some thresholds are rounded decimals, not exact midpoints, and
// bytes agree with its CUDA kernels only with exactly these.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define QLORA_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined, since translation units compiled for different instruction sets share this header.
#define QLORA_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace qlora {

// Enumerators equal qlora_format of qlora.h.
enum class Format : int { kNF4 = 0, kFP4 = 1 };

inline constexpr int kNumCodes = 16;
inline constexpr int kNestedBlockSize = 256;
inline constexpr int kMinBlockSize = 32;
inline constexpr int kMaxBlockSize = 4096;

#define QLORA_NF4_CODES                                                                               \
  -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,    \
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, \
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f
#define QLORA_FP4_CODES                                                                                     \
  0.0f, 0.005208333333f, 0.66666667f, 1.0f, 0.33333333f, 0.5f, 0.16666667f, 0.25f, -0.0f, -0.005208333333f, \
      -0.66666667f, -1.0f, -0.33333333f, -0.5f, -0.16666667f, -0.25f

inline constexpr float kNF4Codes[kNumCodes] = {QLORA_NF4_CODES};
inline constexpr float kFP4Codes[kNumCodes] = {QLORA_FP4_CODES};

// NF4: code c is chosen for thresholds[c - 1] < x <= thresholds[c]; a tie goes to the lower code.
inline constexpr float kNF4Thresholds[kNumCodes - 1] = {
    -0.8480964004993439f,  -0.6106329262256622f,   -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f,
    -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f,   0.2035212516784668f,
    0.2920137718319893f,   0.3893125355243683f,    0.5016634166240692f,  0.6427869200706482f,   0.8614784181118011f};

// FP4: the i-th smallest magnitude is chosen for thresholds[i - 1] < |x| <= thresholds[i]; a tie goes to the smaller.
inline constexpr float kFP4Thresholds[7] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f,
                                            0.4166667f,  0.583333f,  0.8333333f};
inline constexpr std::uint8_t kFP4MagnitudeOrder[8] = {0, 1, 6, 7, 4, 5, 2, 3};

constexpr bool is_valid_block_size(std::int64_t block_size) {
  return block_size >= kMinBlockSize && block_size <= kMaxBlockSize && (block_size & (block_size - 1)) == 0;
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t multiple) { return ceil_div(a, multiple) * multiple; }

// Bytes of n codes, scales of n values, second-level scales of n values.
constexpr std::int64_t num_packed_bytes(std::int64_t n) { return (n + 1) / 2; }
constexpr std::int64_t num_blocks(std::int64_t n, std::int64_t block_size) { return ceil_div(n, block_size); }
constexpr std::int64_t num_nested_blocks(std::int64_t blocks) { return ceil_div(blocks, kNestedBlockSize); }

// Even flat index: high nibble; odd: low.
QLORA_HOST_DEVICE constexpr std::uint8_t pack_codes(std::uint8_t even, std::uint8_t odd) {
  return static_cast<std::uint8_t>(even << 4 | odd);
}
QLORA_HOST_DEVICE constexpr std::uint8_t unpack_code(std::uint8_t byte, bool is_odd) {
  return is_odd ? byte & 0xF : byte >> 4;
}

// How x is scaled to [-1, 1] before its code is looked up: scaled = (x * power) * reciprocal, every step rounded to
// fp32 (IEEE division; subnormals kept; nothing fused; cuda/device/normalise.cuh says how the GPU differs). The power
// of two is 1 but where absmax or its reciprocal is no normal number. Only for finite absmax > 0: elsewhere scaled is
// 0, but +-1 for an Inf. The same holds one level up, for the scales minus their offset, except that there every scale
// of a group with absmax 0, Inf or NaN counts as 0.
struct BlockScaling {
  float power;
  float reciprocal;
};
QLORA_HOST_DEVICE constexpr BlockScaling block_scaling(float absmax) {
  const float power = absmax < 0x1p-126f ? 0x1p64f : absmax > 0x1p126f ? 0x1p-64f : 1.0f;
  return {power, 1.0f / (absmax * power)};
}

// The code of a double-quantised scale is the nearest entry of nested_code, an ascending table. Between entries i and
// i + 1 the decision falls at (nested_code[i] + nested_code[i + 1]) * 0.5f; a value on it takes the even index.

// The code of +0, also stored for the padding nibble of an odd count and for zero or NaN blocks.
template <Format F>
inline constexpr std::uint8_t kZeroCode = F == Format::kNF4 ? 7 : 0;

}  // namespace qlora
