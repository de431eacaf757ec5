// Vectors of 4 lanes in plain C++, left to the compiler's vectoriser. vec_avx2.h and vec_avx512.h offer the same names.
//
// Every function here and in the headers built on it lives in an unnamed namespace inside the namespace of its level,
// so that code compiled for one instruction set is never linked in place of another's. For the same reason these
// headers call no inline function of other headers, the standard library's included, unless it is evaluated at compile
// time.
#pragma once

#include <cstdint>
#include <cstring>

namespace qlora::cpu::QLORA_LEVEL {
namespace {

constexpr int kWidth = 4;
constexpr int kTileRows = 4;            // Rows of the matrix multiplication's register tile,
constexpr int kTileVectors = 2;         // and its columns, in vectors.
constexpr int kMaxFewSums = 8;          // Register sums of a product of few rows (few_rows.h),
constexpr int kMaxFewRows = 2;          // and the most rows that are few.
constexpr bool kHasFastLookUp = false;  // look_up() is an instruction or a few.

struct Floats {
  float lane[kWidth];
};
struct Ints {
  uint32_t lane[kWidth];
};
struct Table {
  float value[16];
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

#define QLORA_LANES(expression)                                \
  for (int i = 0; i < kWidth; ++i) out.lane[i] = (expression); \
  return out

inline Floats load(const float* x) {
  Floats out;
  QLORA_LANES(x[i]);
}
inline void store(float* y, Floats x) {
  for (int i = 0; i < kWidth; ++i) y[i] = x.lane[i];
}
inline Floats broadcast(float x) {
  Floats out;
  QLORA_LANES(x);
}
inline Floats add(Floats a, Floats b) {
  Floats out;
  QLORA_LANES(a.lane[i] + b.lane[i]);
}
inline Floats multiply(Floats a, Floats b) {
  Floats out;
  QLORA_LANES(a.lane[i] * b.lane[i]);
}
// a * b + c; fused where the level has it, so only for sums that need not agree between levels.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  Floats out;
  QLORA_LANES(a.lane[i] * b.lane[i] + c.lane[i]);
}

inline Ints broadcast_int(uint32_t x) {
  Ints out;
  QLORA_LANES(x);
}
// Bit-wise `value` where a > b, else 0.
inline Ints if_greater(Floats a, Floats b, Ints value) {
  Ints out;
  QLORA_LANES(a.lane[i] > b.lane[i] ? value.lane[i] : 0);
}
inline Ints add_ints(Ints a, Ints b) {
  Ints out;
  QLORA_LANES(a.lane[i] + b.lane[i]);
}
inline Ints bit_and(Ints a, Ints b) {
  Ints out;
  QLORA_LANES(a.lane[i] & b.lane[i]);
}
inline Ints bit_or(Ints a, Ints b) {
  Ints out;
  QLORA_LANES(a.lane[i] | b.lane[i]);
}
inline Ints bit_xor(Ints a, Ints b) {
  Ints out;
  QLORA_LANES(a.lane[i] ^ b.lane[i]);
}
inline Ints max_unsigned(Ints a, Ints b) {
  Ints out;
  QLORA_LANES(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]);
}
template <int kBits>
inline Ints shift_left(Ints a) {
  Ints out;
  QLORA_LANES(a.lane[i] << kBits);
}
template <int kBits>
inline Ints shift_right(Ints a) {
  Ints out;
  QLORA_LANES(a.lane[i] >> kBits);
}
inline Ints as_ints(Floats x) {
  Ints out;
  QLORA_LANES(bits_of(x.lane[i]));
}
inline Floats as_floats(Ints x) {
  Floats out;
  QLORA_LANES(float_of(x.lane[i]));
}
inline Ints load_ints(const void* x) {
  Ints out;
  std::memcpy(out.lane, x, sizeof(out.lane));
  return out;
}
inline void store_ints(void* y, Ints x) { std::memcpy(y, x.lane, sizeof(x.lane)); }
// The first `count` of kWidth words; nothing is read past them.
inline Ints load_ints_partial(const void* x, int count) {
  Ints out = {};
  std::memcpy(out.lane, x, sizeof(uint32_t) * static_cast<size_t>(count));
  return out;
}
#undef QLORA_LANES

inline Table load_table(const float* values) {
  Table table;
  std::memcpy(table.value, values, sizeof(table.value));
  return table;
}
inline Table scale_table(Table table, float scale) {
  for (float& value : table.value) value *= scale;
  return table;
}
// table[low 4 bits of each lane].
inline Floats look_up(const Table& table, Ints codes) {
  Floats out;
  for (int i = 0; i < kWidth; ++i) out.lane[i] = table.value[codes.lane[i] & 0xF];
  return out;
}

// kWidth codes in order from kWidth / 2 bytes; the bits above each lane's low 4 are rubbish.
inline Ints load_codes(const uint8_t* packed) {
  Ints out;
  for (int i = 0; i < kWidth; i += 2) {
    out.lane[i] = packed[i / 2] >> 4;
    out.lane[i + 1] = packed[i / 2];
  }
  return out;
}
// Packs 32 codes, one a lane, into 16 bytes.
inline void store_codes(const Ints (&codes)[32 / kWidth], uint8_t* packed) {
  for (int i = 0; i < 16; ++i) {
    const Ints& pair = codes[2 * i / kWidth];
    packed[i] = static_cast<uint8_t>(pair.lane[2 * i % kWidth] << 4 | pair.lane[2 * i % kWidth + 1]);
  }
}

__attribute__((always_inline)) inline void transpose(Floats (&rows)[kWidth]) {
  Floats columns[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < kWidth; ++j) columns[j].lane[i] = rows[i].lane[j];
  }
  for (int i = 0; i < kWidth; ++i) rows[i] = columns[i];
}

inline uint32_t reduce_max(Ints x) {
  uint32_t largest = 0;
  for (uint32_t lane : x.lane) largest = lane > largest ? lane : largest;
  return largest;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7FFF;
  if (magnitude >= 0x7C00) {  // Inf; NaN, made quiet
    return float_of(sign | 0x7F800000 | (magnitude & 0x3FF) << 13 | (magnitude > 0x7C00 ? 0x00400000 : 0));
  }
  if (magnitude >= 0x0400) return float_of(sign | ((magnitude << 13) + (112u << 23)));
  return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
}
inline uint16_t half_of(float x) {
  const uint32_t sign = (bits_of(x) >> 16) & 0x8000;
  const uint32_t magnitude = bits_of(x) & 0x7FFFFFFF;
  uint32_t half;
  if (magnitude > 0x7F800000) {
    half = 0x7E00 | ((magnitude >> 13) & 0x3FF);
  } else if (magnitude >= 0x477FF000) {  // 65520: half-way past the largest half, and the tie goes to Inf
    half = 0x7C00;
  } else if (magnitude >= 0x38800000) {  // 2^-14: normal; the carry of the rounding may raise the exponent
    half = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
  } else {  // Adding 0.5 aligns the last place of fp32 with that of the subnormal halves.
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3F000000;
  }
  return static_cast<uint16_t>(sign | half);
}
inline uint16_t bfloat_of(float x) {
  const uint32_t bits = bits_of(x);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline Floats load_half(const uint16_t* x) {
  Floats out;
  for (int i = 0; i < kWidth; ++i) out.lane[i] = half_to_float(x[i]);
  return out;
}
inline Floats load_bfloat(const uint16_t* x) {
  Floats out;
  for (int i = 0; i < kWidth; ++i) out.lane[i] = float_of(static_cast<uint32_t>(x[i]) << 16);
  return out;
}
inline void store_half(uint16_t* y, Floats x) {
  for (int i = 0; i < kWidth; ++i) y[i] = half_of(x.lane[i]);
}
inline void store_bfloat(uint16_t* y, Floats x) {
  for (int i = 0; i < kWidth; ++i) y[i] = bfloat_of(x.lane[i]);
}

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
