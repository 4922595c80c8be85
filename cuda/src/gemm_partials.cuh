// Accumulators of segments that are parts of a tile, on their way to whoever adds them up: sets of sums in the
// workspace, one flag per set and warpgroup.
#pragma once

#include <algorithm>

#include "gemm_output.cuh"
#include "gemm_params.h"
#include "gemm_schedule.cuh"
#include "ptx.cuh"

namespace higgs::cuda {

// The set of a CTA for a tile. It has at most one for a tile that others begin, and one for a tile that it begins: the
// second half of all sets, if sums are added up in parts.
template <typename Config>
__device__ __forceinline__ int partial_set(const GemmParams& p, int cta, bool begins) {
  return cta + (begins ? p.clusters * Config::kClusterSize : 0);
}
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

// `sets` sets, of which set(i) is the number of the i-th: waits until all have been announced.
template <typename Config, typename SetOf>
__device__ __forceinline__ void wait_for_sets(const GemmParams& p, const SetOf& set, int sets, int thread) {
  for (int i = thread % 128; i < sets; i += 128) wait_for_partial<Config>(p, set(i), thread / 128);
  named_barrier(1 + thread / 128, 128);
}

// Adds a thread's fragments [first, end) of these sets, in their order, to `sums`. Up to 16 loads are under way.
template <typename Config, int Fragments, typename SetOf>
__device__ __forceinline__ void add_sets(const GemmParams& p, const SetOf& set, int sets, int thread, int first,
                                         int end, float (&sums)[4 * Fragments]) {
  constexpr int kAtOnce = std::clamp(16 / Fragments, 1, 4);
#pragma unroll 1
  for (int i = 0; i < sets; i += kAtOnce) {
    float4 v[kAtOnce][Fragments] = {};
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const float4* from = partial_of<Config>(p, set(i + j), thread) + first * kPartialStride<Config>;
#pragma unroll
      for (int f = 0; f < Fragments; ++f) {
        if (i + j < sets && first + f < end) v[j][f] = __ldcg(from + f * kPartialStride<Config>);
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
      for (int f = 0; f < Fragments; ++f) {
        sums[4 * f] += v[j][f].x;
        sums[4 * f + 1] += v[j][f].y;
        sums[4 * f + 2] += v[j][f].z;
        sums[4 * f + 3] += v[j][f].w;
      }
    }
  }
}

// Adds up the part `part` of `parts` of a shared tile's fragments, in the order of k, and stores them. All sums are in
// sets, or about to be.
template <typename Config>
__device__ __forceinline__ void add_part(const GemmParams& p, const Sharing& sharing, int rank, int part, int parts,
                                         int thread, const TileOutput<Config>& output) {
  constexpr int kFragments = Config::kRegisters / 4;
  constexpr int kAtOnce = std::clamp(kFragments / 4, 1, 4);
  const auto set = [&](int i) {
    return partial_set<Config>(p, (sharing.first + i) * Config::kClusterSize + rank, i == 0);
  };
  wait_for_sets<Config>(p, set, sharing.others + 1, thread);
  const int end = (part + 1) * kFragments / parts;
#pragma unroll 1
  for (int first = part * kFragments / parts; first < end; first += kAtOnce) {
    float sums[4 * kAtOnce] = {};
    add_sets<Config, kAtOnce>(p, set, sharing.others + 1, thread, first, end, sums);
#pragma unroll
    for (int f = 0; f < kAtOnce; ++f) {
      if (first + f < end) {
        output.store(first + f, {sums[4 * f], sums[4 * f + 1], sums[4 * f + 2], sums[4 * f + 3]},
                     output.bias((first + f) / Config::kTileFragments));
      }
    }
  }
}

}  // namespace higgs::cuda
