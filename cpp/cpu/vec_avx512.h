// Vectors of 16 lanes on AVX-512 F, BW, DQ and VL. vec_plain.h says what each function means.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace qlora::cpu::QLORA_LEVEL {
namespace {

constexpr int kWidth = 16;
constexpr int kTileRows = 12;
constexpr int kTileVectors = 2;
constexpr int kMaxFewSums = 16;
constexpr int kMaxFewRows = 8;
constexpr bool kHasFastLookUp = true;

using Floats = __m512;
using Ints = __m512i;
using Table = __m512;

inline Floats load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* y, Floats x) { _mm512_storeu_ps(y, x); }
inline Floats broadcast(float x) { return _mm512_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

inline Ints broadcast_int(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Ints if_greater(Floats a, Floats b, Ints value) {
  return _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), value);
}
inline Ints add_ints(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints bit_and(Ints a, Ints b) { return _mm512_and_si512(a, b); }
inline Ints bit_or(Ints a, Ints b) { return _mm512_or_si512(a, b); }
inline Ints bit_xor(Ints a, Ints b) { return _mm512_xor_si512(a, b); }
inline Ints max_unsigned(Ints a, Ints b) { return _mm512_max_epu32(a, b); }
template <int kBits>
inline Ints shift_left(Ints a) {
  return _mm512_slli_epi32(a, kBits);
}
template <int kBits>
inline Ints shift_right(Ints a) {
  return _mm512_srli_epi32(a, kBits);
}
inline Ints as_ints(Floats x) { return _mm512_castps_si512(x); }
inline Floats as_floats(Ints x) { return _mm512_castsi512_ps(x); }
inline Ints load_ints(const void* x) { return _mm512_loadu_si512(x); }
inline void store_ints(void* y, Ints x) { _mm512_storeu_si512(y, x); }
inline Ints load_ints_partial(const void* x, int count) {
  return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), x);
}

inline Table load_table(const float* values) { return load(values); }
inline Table scale_table(Table table, float scale) { return multiply(table, broadcast(scale)); }
inline Floats look_up(const Table& table, Ints codes) { return _mm512_permutexvar_ps(codes, table); }

inline Ints load_codes(const uint8_t* packed) {
  const __m512i words = _mm512_castsi128_si512(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
  const __m512i spread =
      _mm512_permutexvar_epi32(_mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0), words);
  return _mm512_srlv_epi32(spread, _mm512_set_epi32(24, 28, 16, 20, 8, 12, 0, 4, 24, 28, 16, 20, 8, 12, 0, 4));
}
inline void store_codes(const Ints (&codes)[2], uint8_t* packed) {
  for (int i = 0; i < 2; ++i) {
    const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(codes[i], 4), _mm512_srli_epi64(codes[i], 32));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + 8 * i), _mm512_cvtepi64_epi8(pairs));
  }
}

__attribute__((always_inline)) inline void transpose(Floats (&rows)[16]) {
  Floats pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  // quads[i + j]: in 128-bit lane l, column 4 l + j of rows i to i + 3.
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      const __m512d upper = _mm512_castps_pd(pairs[i + j]), lower = _mm512_castps_pd(pairs[i + j + 2]);
      quads[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(upper, lower));
      quads[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(upper, lower));
    }
  }
  // A transpose of 4 x 4 lanes of 128 bits.
  for (int j = 0; j < 4; ++j) {
    const Floats low01 = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0x44);
    const Floats high01 = _mm512_shuffle_f32x4(quads[j], quads[4 + j], 0xEE);
    const Floats low23 = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0x44);
    const Floats high23 = _mm512_shuffle_f32x4(quads[8 + j], quads[12 + j], 0xEE);
    rows[j] = _mm512_shuffle_f32x4(low01, low23, 0x88);
    rows[4 + j] = _mm512_shuffle_f32x4(low01, low23, 0xDD);
    rows[8 + j] = _mm512_shuffle_f32x4(high01, high23, 0x88);
    rows[12 + j] = _mm512_shuffle_f32x4(high01, high23, 0xDD);
  }
}

inline uint32_t reduce_max(Ints x) { return _mm512_reduce_max_epu32(x); }

inline Floats load_half(const uint16_t* x) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
inline Floats load_bfloat(const uint16_t* x) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return as_floats(shift_left<16>(words));
}
inline void store_half(uint16_t* y, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Not vcvtneps2bf16, which flushes subnormals.
inline void store_bfloat(uint16_t* y, Floats x) {
  const __m512i bits = as_ints(x), high = shift_right<16>(bits);
  const __m512i even = bit_and(high, broadcast_int(1));
  const __m512i rounded = shift_right<16>(_mm512_add_epi32(bits, _mm512_add_epi32(even, broadcast_int(0x7FFF))));
  const __m512i words =
      _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), high, broadcast_int(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), _mm512_cvtepi32_epi16(words));
}

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
