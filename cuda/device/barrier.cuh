// Barriers in shared memory that count arrivals (mbarrier, sm_90 and newer), and the ring of stages that producers and
// consumers hand to each other with two of them a stage: `full` and `empty`.
#pragma once

#include <cstdint>

#include "cuda/device/shared.cuh"

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

// At the barrier at the same place in block `rank` of the cluster. Orders nothing that this thread wrote for the other
// block (a release for the cluster would wait for all its memory operations): it says that something was read.
__device__ __forceinline__ void arrive_remote(Barrier& barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}

// An arrival that also adds to the bytes of bulk copies that the phase waits for.
__device__ __forceinline__ void arrive_expecting(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
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

// A named barrier of the block, 0 to 15, for kCount threads: waits for the others, or does not.
template <int kCount>
__device__ __forceinline__ void synchronize(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kCount) : "memory");
}
template <int kCount>
__device__ __forceinline__ void arrive_at(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kCount) : "memory");
}

// A barrier of all threads of the cluster, which orders no memory operations: arrival, and the wait for the others.
__device__ __forceinline__ void arrive_at_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// Registers a thread of the warpgroup that calls this: fewer than at launch, or more out of those that others gave up.
template <int kCount, bool kIsMore>
__device__ __forceinline__ void limit_registers() {
  if constexpr (kIsMore) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
  }
}

// A place in a ring: producers wait for `empty` of its stage with free_parity(), consumers for `full` with parity().
template <int kStages>
class RingPlace {
 public:
  __device__ __forceinline__ int stage() const { return stage_; }
  __device__ __forceinline__ uint32_t parity() const { return round_; }
  __device__ __forceinline__ uint32_t free_parity() const { return round_ ^ 1; }  // passes at once in the first round
  __device__ __forceinline__ void advance(int count = 1) {                        // count up to 2 kStages - 1
    stage_ += count;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (stage_ >= kStages) {
        stage_ -= kStages;
        round_ ^= 1;
      }
    }
  }
  __device__ __forceinline__ RingPlace plus(int count) const {
    RingPlace place = *this;
    place.advance(count);
    return place;
  }

 private:
  int stage_ = 0;
  uint32_t round_ = 0;
};

}  // namespace qlora
