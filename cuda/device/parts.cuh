// The sum of parts that blocks of another kernel wrote.
#pragma once

namespace qlora {

// sums += the parts in their order, kLoads of them on their way at once. load(part, values) reads a part's values.
template <int kLoads, int kCount, typename Load>
__device__ __forceinline__ void add_up_parts(int num_parts, float (&sums)[kCount], Load&& load) {
  for (int first = 0; first < num_parts; first += kLoads) {
    float loaded[kLoads][kCount];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) load(min(first + i, num_parts - 1), loaded[i]);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (first + i >= num_parts) break;
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums[j] += loaded[i][j];
    }
  }
}

// kCount consecutive floats: multiples of 4 at an address of 16 bytes, or any.
template <int kCount>
__device__ __forceinline__ void load_floats(const float* source, float (&values)[kCount]) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(source + i);
      values[i] = four.x;
      values[i + 1] = four.y;
      values[i + 2] = four.z;
      values[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = source[i];
  }
}

}  // namespace qlora
