// Bulk copies to shared memory that count their bytes at a barrier there (mbarrier_expect: ptx.cuh). From sm_90 on.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace higgs::cuda {

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_init_done() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives at the barrier of CTA `rank` of the cluster.
template <int ClusterSize>
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier, int rank) {
  if constexpr (ClusterSize == 1) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
  } else {
    asm volatile(
        "{\n.reg .b32 to;\nmapa.shared::cluster.u32 to, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [to];\n}" ::"r"(
            shared_address(barrier)),
        "r"(rank)
        : "memory");
  }
}
// Scope of the CTA: that of mbarrier_wait, the cluster, would wait for all loads of the thread.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra WAIT;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  barrier_wait(shared_address(barrier), parity);
}
// `bytes` (a multiple of 16) from global to the shared memory of all CTAs of the cluster, at the same address of each;
// they count at the barrier of each.
template <int ClusterSize>
__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
  if constexpr (ClusterSize == 1) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
  } else {
    constexpr uint16_t kAll = (1 << ClusterSize) - 1;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
        "%4;" ::"r"(shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(barrier)), "h"(kAll)
        : "memory");
  }
}

// For whole warps, of which one lane does it (always the same): a barrier for one arrival, and a copy that arrives.
__device__ __forceinline__ void barrier_init_by_one(uint32_t barrier) {
  asm volatile(
      "{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n@one mbarrier.init.shared::cta.b64 [%0], 1;\n"
      "@one fence.mbarrier_init.release.cluster;\n}" ::"r"(barrier)
      : "memory");
}
__device__ __forceinline__ void copy_by_one(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\n"
      "@one mbarrier.arrive.expect_tx.shared::cta.b64 _, [%3], %2;\n"
      "@one cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n}" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// `bytes` (a multiple of 16) from memory to the L2.
__device__ __forceinline__ void prefetch_bulk(const void* from, int bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

}  // namespace higgs::cuda
