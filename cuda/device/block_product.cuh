// The product of 16 rows of a block of 64 columns of W with up to kTokens rows of x, on the tensor cores.
//
// A sum of products has no order, so the k slots of the operands are dealt such that memory needs no rearrangement:
// lane i of a quad owns columns 16i..16i+15, which are 8 consecutive bytes of W and 32 of x, and slots 2i, 2i+1, 2i+8,
// 2i+9 of product j are its columns 16i+4j..16i+4j+3.
#pragma once

#include <cstdint>

#include "cuda/device/mma.cuh"

namespace qlora {

// sums [tile of 8 tokens] += scale (W x^T), as multiply_add deals them. low, high: the lane's bytes of rows lane / 4
// and lane / 4 + 8; x [tile]: its 16 columns of token lane / 4 of the tile.
template <typename T, int kTokens, typename Table>
__device__ __forceinline__ void add_block_product(uint2 low, uint2 high, float scale_low, float scale_high,
                                                  const Table& table, const uint32_t (&x)[kTokens / 8][8],
                                                  float (&sums)[kTokens / 8][4]) {
  const uint32_t a[4][4] = {{table.template pair<0>(low.x), table.template pair<0>(high.x),
                             table.template pair<1>(low.x), table.template pair<1>(high.x)},
                            {table.template pair<2>(low.x), table.template pair<2>(high.x),
                             table.template pair<3>(low.x), table.template pair<3>(high.x)},
                            {table.template pair<0>(low.y), table.template pair<0>(high.y),
                             table.template pair<1>(low.y), table.template pair<1>(high.y)},
                            {table.template pair<2>(low.y), table.template pair<2>(high.y),
                             table.template pair<3>(low.y), table.template pair<3>(high.y)}};
#pragma unroll
  for (int q = 0; q < kTokens / 8; ++q) {
    float products[4] = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) multiply_add<T>(products, a[j], x[q][2 * j], x[q][2 * j + 1]);
    sums[q][0] = fmaf(scale_low, products[0], sums[q][0]);
    sums[q][1] = fmaf(scale_low, products[1], sums[q][1]);
    sums[q][2] = fmaf(scale_high, products[2], sums[q][2]);
    sums[q][3] = fmaf(scale_high, products[3], sums[q][3]);
  }
}

}  // namespace qlora
