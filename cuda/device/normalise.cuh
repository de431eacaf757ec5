// Scaled values q = x / absmax, computed as bitsandbytes' CUDA kernels do so that codes agree with them to the bit:
// q = x * rcp.approx(absmax), subnormals flushed to zero. What this formula cannot serve is defined here:
//
//   absmax                          q
//   0, NaN                          0
//   Inf                             +-1 for x = +-Inf, else 0
//   below 2^-102, or above 2^126    x and absmax are first scaled by 2^64 or 2^-64 (below, a subnormal x still counts)
//
// The CPU scales by the same rules (core/format.h) with an exact reciprocal and without flushing.
#pragma once

#include <cstdint>

namespace qlora {

// The hardware's reciprocal (1 ulp), which is what a division becomes under --use_fast_math.
__device__ __forceinline__ float reciprocal_approx_ftz(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Product rounded to nearest with subnormal inputs and results flushed, as --use_fast_math compiles it.
__device__ __forceinline__ float multiply_ftz(float x, float y) {
  float z;
  asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

inline constexpr uint32_t kInfBits = 0x7F800000u;
inline constexpr uint32_t kNaNBits = 0x7FC00000u;

// Bits of |x|. As unsigned integers they order like the magnitudes, with every NaN above Inf: an integer maximum finds
// absmax and lets NaN through, which fmaxf drops.
__device__ __forceinline__ uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7FFFFFFFu; }

// The absmax that is stored: one NaN for all.
__device__ __forceinline__ float absmax_of_bits(uint32_t bits) {
  return __uint_as_float(bits > kInfBits ? kNaNBits : bits);
}

// Whether absmax lies in [2^-102, 2^126]: its reciprocal is a normal number, and an x that flushes to zero is less than
// 2^-24 of it, far below the first threshold.
inline constexpr uint32_t kSmallestRegularBits = 0x0C800000u, kLargestRegularBits = 0x7E800000u;
__device__ __forceinline__ bool has_reciprocal(uint32_t absmax_bits) {
  return absmax_bits - kSmallestRegularBits <= kLargestRegularBits - kSmallestRegularBits;
}

// q for the remaining absmax, by the table above.
class IrregularScaling {
 public:
  __device__ __forceinline__ explicit IrregularScaling(uint32_t absmax_bits) {
    const float absmax = __uint_as_float(absmax_bits);
    const bool is_scalable = absmax_bits != 0 && absmax_bits < kInfBits;
    power_ = !is_scalable ? 0.0f : absmax_bits < kSmallestRegularBits ? 0x1p64f : 0x1p-64f;
    reciprocal_ = is_scalable ? reciprocal_approx_ftz(absmax * power_) : 0.0f;
    infinite_ = absmax_bits == kInfBits ? 1.0f : 0.0f;
  }
  // Where nothing is scalable the product is 0 for finite x and NaN for the rest.
  __device__ __forceinline__ float normalise(float x) const {
    const float q = multiply_ftz(x * power_, reciprocal_);
    return q == q ? q : copysignf(infinite_, x);
  }

 private:
  float power_;
  float reciprocal_;
  float infinite_;  // |q| of +-Inf
};

__device__ __forceinline__ float normalise(float x, uint32_t absmax_bits) {
  return has_reciprocal(absmax_bits) ? multiply_ftz(x, reciprocal_approx_ftz(__uint_as_float(absmax_bits)))
                                     : IrregularScaling(absmax_bits).normalise(x);
}

}  // namespace qlora
