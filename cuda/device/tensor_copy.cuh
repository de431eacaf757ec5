// Copies of a box of a matrix from global to shared memory by the tensor memory accelerator (sm_90 and newer).
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/device/barrier.cuh"

namespace qlora {

// Copies the box of `map` at column col and row `row`, and counts its bytes at the barrier. Called by one thread.
__device__ __forceinline__ void copy_box(void* shared, const CUtensorMap& map, int col, int row, Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(col), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

// Brings the box into L2.
__device__ __forceinline__ void prefetch_box_to_l2(const CUtensorMap& map, int col, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(&map), "r"(col), "r"(row)
               : "memory");
}

// Copies the box of `map` at column col and row `row` to the same place in every block of `mask` of the cluster, and
// counts its bytes at their barriers. Called by one thread.
__device__ __forceinline__ void copy_box(void* shared, const CUtensorMap& map, int col, int row, Barrier& barrier,
                                         uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(col), "r"(row), "r"(shared_address(&barrier)), "h"(mask)
      : "memory");
}

}  // namespace qlora
