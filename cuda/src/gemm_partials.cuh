// Accumulators of segments that are parts of a tile, on their way to whoever adds them up: sets of sums in the
// workspace, one flag per set and warpgroup.
#pragma once

#include "gemm_params.h"
#include "ptx.cuh"

namespace higgs::cuda {

// A set: [kRegisters / 4][warpgroup][thread] float4.
template <typename Config>
inline constexpr int kPartialStride = Config::kWarpgroups * 128;
template <typename Config>
__device__ __forceinline__ float4* partials_of(const GemmParams& p, int set) {
  return reinterpret_cast<float4*>(p.partials) +
         static_cast<long long>(set) * (Config::kRegisters / 4) * kPartialStride<Config>;
}
// A thread's part: every kPartialStride.
template <typename Config>
__device__ __forceinline__ float4* partial_of(const GemmParams& p, int set, int thread) {
  return partials_of<Config>(p, set) + thread;
}

// To be announced later: a release waits until all is written.
template <typename Config>
__device__ __forceinline__ void store_partial(const GemmParams& p, int set, int thread,
                                              const float (&acc)[Config::kRegisters]) {
  float4* to = partial_of<Config>(p, set, thread);
#pragma unroll
  for (int i = 0; i < Config::kRegisters / 4; ++i) {
    __stcg(to + i * kPartialStride<Config>, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
  }
  named_barrier(1 + thread / 128, 128);  // the release of one thread covers what the others have written before it
}
template <typename Config>
__device__ __forceinline__ void announce_partial(const GemmParams& p, int set, int thread) {
  if (thread % 128 == 0) store_release(p.flags + set * Config::kWarpgroups + thread / 128, 1);
}

// One thread.
template <typename Config>
__device__ __forceinline__ void wait_for_partial(const GemmParams& p, int set, int warpgroup) {
  while (load_acquire(p.flags + set * Config::kWarpgroups + warpgroup) == 0) __nanosleep(20);
}

}  // namespace higgs::cuda
