// Activations in registers: fp32 <-> dtype, each with one rounding to nearest even, and 16-byte pieces of memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace qlora {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Values in 16 bytes.
template <typename T>
inline constexpr int kValuesPer16Bytes = 16 / static_cast<int>(sizeof(T));

// One 32-bit word of memory to its values and back; `first` is the value at the lower address.
template <typename T>
struct Word;
template <>
struct Word<float> {
  static constexpr int kValues = 1;
  static __device__ __forceinline__ void unpack(uint32_t word, float* values) { values[0] = __uint_as_float(word); }
  static __device__ __forceinline__ uint32_t pack(const float* values) { return __float_as_uint(values[0]); }
};
template <>
struct Word<__half> {
  static constexpr int kValues = 2;
  static __device__ __forceinline__ void unpack(uint32_t word, float* values) {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(word));
    values[0] = pair.x;
    values[1] = pair.y;
  }
  static __device__ __forceinline__ uint32_t pack(const float* values) {
    const __half2 pair = __floats2half2_rn(values[0], values[1]);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};
template <>
struct Word<__nv_bfloat16> {
  static constexpr int kValues = 2;
  static __device__ __forceinline__ void unpack(uint32_t word, float* values) {
    values[0] = __uint_as_float(word << 16);
    values[1] = __uint_as_float(word & 0xFFFF0000u);
  }
  static __device__ __forceinline__ uint32_t pack(const float* values) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
    return reinterpret_cast<const uint32_t&>(pair);
  }
};

// Memory that is read once: past L1, which holds tables and scales. Volatile, so that the loads go out where they are
// written, ahead of barriers and tables.
__device__ __forceinline__ uint4 load_16_bytes_once(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

__device__ __forceinline__ uint32_t load_4_bytes_once(const void* address) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(address));
  return v;
}

__device__ __forceinline__ uint32_t load_2_bytes_once(const void* address) {
  uint16_t v;
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(address));
  return v;
}

// Rounds 16 bytes of values and stores them at an aligned address; in assembly, since the compiler splits some of
// these.
template <typename T>
__device__ __forceinline__ void store_16_bytes(T* address, const float (&values)[kValuesPer16Bytes<T>]) {
  constexpr int kStep = Word<T>::kValues;
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(Word<T>::pack(values)),
               "r"(Word<T>::pack(values + kStep)), "r"(Word<T>::pack(values + 2 * kStep)),
               "r"(Word<T>::pack(values + 3 * kStep))
               : "memory");
}

// The same without a branch around what makes the values.
template <typename T>
__device__ __forceinline__ void store_16_bytes_if(bool is_stored, T* address,
                                                  const float (&values)[kValuesPer16Bytes<T>]) {
  constexpr int kStep = Word<T>::kValues;
  asm volatile(
      "{\n"
      ".reg .pred is_stored;\n"
      "setp.ne.u32 is_stored, %5, 0;\n"
      "@is_stored st.global.v4.u32 [%0], {%1, %2, %3, %4};\n"
      "}" ::"l"(address),
      "r"(Word<T>::pack(values)), "r"(Word<T>::pack(values + kStep)), "r"(Word<T>::pack(values + 2 * kStep)),
      "r"(Word<T>::pack(values + 3 * kStep)), "r"(static_cast<uint32_t>(is_stored))
      : "memory");
}

// 16 bytes to their values.
template <typename T>
__device__ __forceinline__ void unpack_16_bytes(const uint4& v, float* values) {
  Word<T>::unpack(v.x, values);
  Word<T>::unpack(v.y, values + Word<T>::kValues);
  Word<T>::unpack(v.z, values + 2 * Word<T>::kValues);
  Word<T>::unpack(v.w, values + 3 * Word<T>::kValues);
}

}  // namespace qlora
