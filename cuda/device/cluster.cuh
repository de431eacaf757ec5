// Shared memory of the other blocks of a cluster (sm_90 and newer): written by one, read by its owner behind a barrier.
#pragma once

#include <cstdint>

namespace qlora {

// The same shared address in block `rank` of the cluster.
__device__ __forceinline__ uint32_t address_in_block(uint32_t shared, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// At such an address, of 8 bytes.
__device__ __forceinline__ void store_two_floats_in_block(uint32_t address, float first, float second) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second) : "memory");
}

// A barrier of all threads of the cluster, by whole warps: what was written before the arrival may be read behind the
// wait. Until the first has passed a block may not have started, and has no shared memory to write to.
__device__ __forceinline__ void hand_over_to_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void take_over_from_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

}  // namespace qlora
