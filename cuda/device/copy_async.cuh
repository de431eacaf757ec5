// Copies from global to shared memory that a thread does not wait for (cp.async, sm_80 and newer), in the order of
// commit_copies: wait_for_copies<n> returns when all but the newest n commits of this thread have arrived.
#pragma once

#include <cstdint>

#include "cuda/device/shared.cuh"

namespace qlora {

// Both addresses aligned to 16 bytes. Past L1; the rest of the 128-byte line is fetched into L2.
__device__ __forceinline__ void copy_16_bytes_async(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_16_bytes_async(void* shared, const void* global) {
  copy_16_bytes_async(shared_address(shared), global);
}

// The same, or 16 bytes of zeros: then nothing is read of `global`, which must be a valid address all the same.
__device__ __forceinline__ void copy_16_bytes_or_zeros_async(uint32_t shared, const void* global, bool is_copy) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(is_copy ? 16 : 0)
               : "memory");
}

// Both addresses aligned to 4 bytes.
__device__ __forceinline__ void copy_4_bytes_async(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}

// Brings memory into L2 (sm_90 and newer); nothing is read by the thread. Address and size in multiples of 16 bytes.
__device__ __forceinline__ void prefetch_to_l2(const void* global, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace qlora
