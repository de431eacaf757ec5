// Values of any dtype as fp32 vectors, and the scalars that the kernels share.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/format.h"
#include "qlora/qlora.h"

namespace qlora::cpu::QLORA_LEVEL {
namespace {

constexpr int kGroup = 32;  // The smallest block: every block is a whole number of groups, but for the last one's end.
static_assert(kGroup == kMinBlockSize && kGroup % kWidth == 0);

template <qlora_dtype kType>
constexpr int kBytes = kType == QLORA_FLOAT32 ? 4 : 2;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <qlora_dtype kType>
inline const void* at(const void* x, int64_t i) {
  return static_cast<const char*>(x) + i * kBytes<kType>;
}
template <qlora_dtype kType>
inline void* at(void* x, int64_t i) {
  return static_cast<char*>(x) + i * kBytes<kType>;
}

// kWidth values from element i on.
template <qlora_dtype kType>
inline Floats load_as(const void* x, int64_t i) {
  const void* from = at<kType>(x, i);
  if constexpr (kType == QLORA_FLOAT32) return load(static_cast<const float*>(from));
  if constexpr (kType == QLORA_FLOAT16) return load_half(static_cast<const uint16_t*>(from));
  if constexpr (kType == QLORA_BFLOAT16) return load_bfloat(static_cast<const uint16_t*>(from));
}
template <qlora_dtype kType>
inline void store_as(void* y, int64_t i, Floats values) {
  void* to = at<kType>(y, i);
  if constexpr (kType == QLORA_FLOAT32) store(static_cast<float*>(to), values);
  if constexpr (kType == QLORA_FLOAT16) store_half(static_cast<uint16_t*>(to), values);
  if constexpr (kType == QLORA_BFLOAT16) store_bfloat(static_cast<uint16_t*>(to), values);
}

struct PartialVector {
  alignas(64) unsigned char bytes[sizeof(float) * kWidth];  // Bytes, since they alias every type.
};
// The first `count` < kWidth values, the rest zero; nothing is read or written past them.
template <qlora_dtype kType>
inline Floats load_partial_as(const void* x, int64_t i, int64_t count) {
  PartialVector lanes = {};
  __builtin_memcpy(lanes.bytes, at<kType>(x, i), static_cast<size_t>(count * kBytes<kType>));
  return load_as<kType>(lanes.bytes, 0);
}
template <qlora_dtype kType>
inline void store_partial_as(void* y, int64_t i, Floats values, int64_t count) {
  PartialVector lanes;
  store_as<kType>(lanes.bytes, 0, values);
  __builtin_memcpy(at<kType>(y, i), lanes.bytes, static_cast<size_t>(count * kBytes<kType>));
}

// Rounded to kType.
template <qlora_dtype kType>
inline Floats round_to(Floats x) {
  if constexpr (kType == QLORA_FLOAT32) return x;
  PartialVector rounded;
  store_as<kType>(rounded.bytes, 0, x);
  return load_as<kType>(rounded.bytes, 0);
}

template <qlora_dtype kType>
inline float load_one(const void* x, int64_t i) {
  float lanes[kWidth];
  store(lanes, load_partial_as<kType>(x, i, 1));
  return lanes[0];
}
// to[0, kWidth) = `count` values from element i on, then zeros up to kWidth.
template <qlora_dtype kType>
inline void load_to(const void* x, int64_t i, int64_t count, float* to) {
  store(to, count == kWidth ? load_as<kType>(x, i) : load_partial_as<kType>(x, i, count));
}

template <qlora_dtype kType>
struct DType {
  static constexpr qlora_dtype value = kType;
};
// body(DType<...>()) for the run-time dtype, which api.cpp has checked.
template <class Body>
inline void with_dtype(qlora_dtype dtype, Body body) {
  switch (dtype) {
    case QLORA_FLOAT32:
      return body(DType<QLORA_FLOAT32>());
    case QLORA_FLOAT16:
      return body(DType<QLORA_FLOAT16>());
    case QLORA_BFLOAT16:
      return body(DType<QLORA_BFLOAT16>());
  }
}

inline const float* code_book(qlora_format format) { return format == QLORA_NF4 ? kNF4Codes : kFP4Codes; }

}  // namespace
}  // namespace qlora::cpu::QLORA_LEVEL
