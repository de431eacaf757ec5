// Copies of contiguous memory by the engine that also copies boxes (tensor_copy.cuh), sm_90 and newer: addresses and
// sizes in multiples of 16 bytes, each called by one thread.
#pragma once

#include <cstdint>

#include "cuda/device/barrier.cuh"
#include "cuda/device/shared.cuh"

namespace qlora {

// Global to shared memory; the bytes are counted at the barrier.
__device__ __forceinline__ void copy_bulk(uint32_t shared, const void* global, int bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

// Shared to global memory, once commit_bulk_stores was called.
__device__ __forceinline__ void store_bulk(void* global, uint32_t shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_bulk_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Returns when all but the newest kPending commits of this thread have read their shared memory.
template <int kPending>
__device__ __forceinline__ void wait_for_bulk_reads() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Makes what this thread wrote to shared memory visible to copies that are asked for behind a barrier.
__device__ __forceinline__ void publish_to_bulk_stores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace qlora
