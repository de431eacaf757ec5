// Barriers in shared memory that count arrivals (mbarrier, sm_90 and newer), and the ring of stages that producers and
// consumers hand to each other with two of them a stage: `full` and `empty`.
#pragma once

#include <cstdint>

#include "cuda/device/copy_async.cuh"

namespace qlora {

using Barrier = uint64_t;

__device__ __forceinline__ void init_barrier(Barrier& barrier, int count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count) : "memory");
}

// Makes the initialisation visible to the asynchronous copies of this block; a block barrier must follow.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// An arrival, counted in init_barrier, that happens when all earlier asynchronous copies of this thread have arrived.
__device__ __forceinline__ void arrive_after_copies(Barrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Returns when the phase of this parity has completed.
__device__ __forceinline__ void wait(Barrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra retry;\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// A place in a ring: producers wait for `empty` of its stage with is_free_parity(), consumers for `full` with parity().
template <int kStages>
class RingPlace {
 public:
  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ uint32_t parity() const { return round_; }
  __device__ __forceinline__ uint32_t free_parity() const { return round_ ^ 1; }  // passes at once in the first round
  __device__ __forceinline__ void advance() {
    if (++stage_ == kStages) {
      stage_ = 0;
      round_ ^= 1;
    }
  }

 private:
  int stage_ = 0;
  uint32_t round_ = 0;
};

}  // namespace qlora
