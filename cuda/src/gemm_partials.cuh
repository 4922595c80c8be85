// Accumulators of segments that are parts of a tile, on their way to whoever adds them up: sets of sums in the
// workspace, one flag per set and warpgroup.
#pragma once

#include "gemm_params.h"
#include "ptx.cuh"

namespace higgs::cuda {

// Where this thread's part of a set is: kRegisters / 4 float4, 128 apart.
template <typename Config>
__device__ __forceinline__ float4* partial_of(const GemmParams& p, int set, int warpgroup) {
  return reinterpret_cast<float4*>(p.partials) +
         (static_cast<long long>(set) * Config::kWarpgroups + warpgroup) * (Config::kRegisters / 4) * 128 +
         threadIdx.x % 128;
}

template <typename Config>
__device__ __forceinline__ void send_partial(const GemmParams& p, int set, int warpgroup,
                                             const float (&acc)[Config::kRegisters]) {
  float4* to = partial_of<Config>(p, set, warpgroup);
#pragma unroll
  for (int i = 0; i < Config::kRegisters / 4; ++i) {
    __stcg(to + i * 128, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
  }
  named_barrier(1 + warpgroup, 128);  // the release of one thread covers what the others have written before it
  if (threadIdx.x % 128 == 0) store_release(p.flags + set * Config::kWarpgroups + warpgroup, 1);
}

// One thread.
template <typename Config>
__device__ __forceinline__ void wait_for_partial(const GemmParams& p, int set, int warpgroup) {
  while (load_acquire(p.flags + set * Config::kWarpgroups + warpgroup) == 0) __nanosleep(20);
}

}  // namespace higgs::cuda
