// 4-bit codes of scaled values q, bit for bit those of the decision thresholds in core/format.h, without a tree of
// comparisons: the range of q is cut into 32 bins so narrow that each holds one threshold at most, and one comparison
// with that threshold decides.
//
//   bin  = floor(q * slope + origin)            one FFMA: the bin lands in the low mantissa bits of a large float
//   code = q > threshold[bin] ? upper : lower   two conflict-free shared loads (32 words, one a bank), one comparison
//
// FP4 bins |q| and adds the sign bit; a negative value that scales to -0 has none, as in bitsandbytes.
#pragma once

#include <cstdint>

#include "core/format.h"

namespace qlora {

inline constexpr int kNumBins = 32;

struct EncodeTable {
  float threshold[kNumBins];
  uint32_t codes[kNumBins];  // NF4: lower (upper is one more); FP4: lower | upper << 8
};

// v = q * kSlope + kOrigin counts quarters of a bin, so that v's integer bits 2..6 are the bin's byte offset in a
// table.
template <Format F>
inline constexpr float kSlope = F == Format::kNF4 ? 62.0f : 124.0f;  // q in [-1, 1] or |q| in [0, 1]: bins 0..31
template <Format F>
inline constexpr float kOrigin = F == Format::kNF4 ? 64.0f : 0.0f;
inline constexpr float kShifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
inline constexpr uint32_t kBinOffsetMask = (kNumBins - 1) << 2;

template <Format F>
constexpr int num_thresholds() {
  return F == Format::kNF4 ? kNumCodes - 1 : kNumCodes / 2 - 1;
}
template <Format F>
constexpr float threshold_at(int i) {
  return F == Format::kNF4 ? kNF4Thresholds[i] : kFP4Thresholds[i];
}
// The code of the i-th interval between thresholds.
template <Format F>
constexpr uint32_t code_at(int i) {
  return F == Format::kNF4 ? static_cast<uint32_t>(i) : kFP4MagnitudeOrder[i & 7];
}
// Where q falls, in bins; the half undoes the rounding of the shifter.
template <Format F>
constexpr double bin_position(double q) {
  return (q * kSlope<F> + kOrigin<F> + 0.5) / 4;
}

// No bin holds two thresholds and none lies within a thousandth of a bin's edge: roundings of q and v cannot move a
// value past a threshold of the neighbouring bin.
template <Format F>
constexpr bool bins_are_sound() {
  int former = -1;
  for (int i = 0; i < num_thresholds<F>(); ++i) {
    const double position = bin_position<F>(threshold_at<F>(i));
    const int bin = static_cast<int>(position);
    if (bin <= former || bin >= kNumBins || position - bin < 1e-3 || bin + 1 - position < 1e-3) return false;
    former = bin;
  }
  return bin_position<F>(F == Format::kNF4 ? -1.0001 : 0.0) > 0 && bin_position<F>(1.0001) < kNumBins;
}

template <Format F>
constexpr EncodeTable make_encode_table() {
  static_assert(bins_are_sound<F>());
  EncodeTable table = {};
  int interval = 0;  // thresholds below the bin
  for (int bin = 0; bin < kNumBins; ++bin) {
    const bool is_split =
        interval < num_thresholds<F>() && static_cast<int>(bin_position<F>(threshold_at<F>(interval))) == bin;
    table.threshold[bin] = is_split ? threshold_at<F>(interval) : 2.0f;  // 2: above every q
    const uint32_t lower = code_at<F>(interval);
    table.codes[bin] = F == Format::kNF4 ? lower : lower | code_at<F>(is_split ? interval + 1 : interval) << 8;
    if (is_split) ++interval;
  }
  return table;
}

template <Format F>
static __device__ const EncodeTable kEncodeTable = make_encode_table<F>();

// The block's first warp copies the table to shared memory; synchronise before its use.
template <Format F>
__device__ __forceinline__ void load_encode_table(EncodeTable& table) {
  if (threadIdx.x >= kNumBins) return;
  table.threshold[threadIdx.x] = kEncodeTable<F>.threshold[threadIdx.x];
  table.codes[threadIdx.x] = kEncodeTable<F>.codes[threadIdx.x];
}

// Appends the code of q to `word` as its low nibble.
template <Format F>
__device__ __forceinline__ uint32_t append_code(uint32_t word, float q, const EncodeTable& table) {
  const float position = F == Format::kNF4 ? q : fabsf(q);
  const uint32_t offset = __float_as_uint(fmaf(position, kSlope<F>, kOrigin<F> + kShifter)) & kBinOffsetMask;
  const char* const base = reinterpret_cast<const char*>(&table) + offset;
  const float threshold = *reinterpret_cast<const float*>(base);
  const uint32_t codes = *reinterpret_cast<const uint32_t*>(base + sizeof(table.threshold));
  if constexpr (F == Format::kNF4) {
    word = (word << 4) + codes;
    if (position > threshold) ++word;
    return word;
  }
  return word << 4 | (position > threshold ? codes >> 8 : codes & 0xFF) | (q < 0.0f ? 8 : 0);
}

// Codes of 8 consecutive values as 4 bytes of memory: byte i holds value 2i in its high nibble, 2i + 1 in its low one.
template <Format F>
__device__ __forceinline__ uint32_t encode_8(const float (&q)[8], const EncodeTable& table) {
  uint32_t word = 0;
#pragma unroll
  for (int byte = 3; byte >= 0; --byte) {
    word = append_code<F>(word, q[2 * byte], table);
    word = append_code<F>(word, q[2 * byte + 1], table);
  }
  return word;
}

}  // namespace qlora
