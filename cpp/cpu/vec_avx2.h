// Vectors of 8 lanes on AVX2, FMA and F16C. vec_plain.h says what each function means.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace qlora::cpu::QLORA_LEVEL {
namespace {

constexpr int kWidth = 8;
constexpr int kTileRows = 6;
constexpr int kTileVectors = 2;
constexpr int kMaxFewSums = 8;
constexpr int kMaxFewRows = 3;
constexpr bool kHasFastLookUp = true;

using Floats = __m256;
using Ints = __m256i;
struct Table {
  __m256 low, high;
};

inline Floats load(const float* x) { return _mm256_loadu_ps(x); }
inline void store(float* y, Floats x) { _mm256_storeu_ps(y, x); }
inline Floats broadcast(float x) { return _mm256_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

inline Ints broadcast_int(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Ints if_greater(Floats a, Floats b, Ints value) {
  return _mm256_and_si256(_mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ)), value);
}
inline Ints add_ints(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints bit_and(Ints a, Ints b) { return _mm256_and_si256(a, b); }
inline Ints bit_or(Ints a, Ints b) { return _mm256_or_si256(a, b); }
inline Ints bit_xor(Ints a, Ints b) { return _mm256_xor_si256(a, b); }
inline Ints max_unsigned(Ints a, Ints b) { return _mm256_max_epu32(a, b); }
template <int kBits>
inline Ints shift_left(Ints a) {
  return _mm256_slli_epi32(a, kBits);
}
template <int kBits>
inline Ints shift_right(Ints a) {
  return _mm256_srli_epi32(a, kBits);
}
inline Ints as_ints(Floats x) { return _mm256_castps_si256(x); }
inline Floats as_floats(Ints x) { return _mm256_castsi256_ps(x); }
inline Ints load_ints(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
inline void store_ints(void* y, Ints x) { _mm256_storeu_si256(static_cast<__m256i*>(y), x); }
inline Ints load_ints_partial(const void* x, int count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_maskload_epi32(static_cast<const int*>(x), _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes));
}

inline Table load_table(const float* values) { return {load(values), load(values + 8)}; }
inline Table scale_table(Table table, float scale) {
  return {multiply(table.low, broadcast(scale)), multiply(table.high, broadcast(scale))};
}
// vpermps looks at 3 bits, and the blend at the sign, where the shift takes bit 3.
inline Floats look_up(const Table& table, Ints codes) {
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, codes), _mm256_permutevar8x32_ps(table.high, codes),
                          as_floats(shift_left<28>(codes)));
}

inline Ints load_codes(const uint8_t* packed) {
  int word;
  __builtin_memcpy(&word, packed, sizeof(word));
  return _mm256_srlv_epi32(_mm256_set1_epi32(word), _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24));
}
inline void store_codes(const Ints (&codes)[4], uint8_t* packed) {
  const __m256i words01 = _mm256_packus_epi32(codes[0], codes[1]);  // 128-bit halves: 0a 1a 0b 1b
  const __m256i words23 = _mm256_packus_epi32(codes[2], codes[3]);
  const __m256i mixed = _mm256_packus_epi16(words01, words23);  // bytes in groups of four: 0a 1a 2a 3a | 0b 1b 2b 3b
  const __m256i bytes = _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const __m256i pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x0110));  // 16 * even + odd
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm256_castsi256_si128(halves));
}

__attribute__((always_inline)) inline void transpose(Floats (&rows)[8]) {
  Floats pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  // quads[i + j]: in 128-bit lane l, column 4 l + j of rows i to i + 3.
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m256d upper = _mm256_castps_pd(pairs[i + j]), lower = _mm256_castps_pd(pairs[i + j + 2]);
      quads[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(upper, lower));
      quads[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(upper, lower));
    }
  }
  for (int j = 0; j < 4; ++j) {
    rows[j] = _mm256_permute2f128_ps(quads[j], quads[4 + j], 0x20);
    rows[4 + j] = _mm256_permute2f128_ps(quads[j], quads[4 + j], 0x31);
  }
}

inline uint32_t reduce_max(Ints x) {
  __m128i y = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_max_epu32(y, _mm_shuffle_epi32(y, 0x4E));
  y = _mm_max_epu32(y, _mm_shuffle_epi32(y, 0xB1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(y));
}

inline Floats load_half(const uint16_t* x) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline Floats load_bfloat(const uint16_t* x) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return as_floats(shift_left<16>(words));
}
inline void store_half(uint16_t* y, Floats x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_bfloat(uint16_t* y, Floats x) {
  const __m256i bits = as_ints(x), high = shift_right<16>(bits);
  const __m256i even = bit_and(high, broadcast_int(1));
  const __m256i rounded = shift_right<16>(_mm256_add_epi32(bits, _mm256_add_epi32(even, broadcast_int(0x7FFF))));
  const __m256i quiet = bit_or(high, broadcast_int(0x40));
  const __m256i words =
      as_ints(_mm256_blendv_ps(as_floats(rounded), as_floats(quiet), _mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(y), _mm256_castsi256_si128(halves));
}

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
