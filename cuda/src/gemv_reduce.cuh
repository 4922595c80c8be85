// Reduction of the decode kernel's partial sums over slices and CTAs, and the stores of y.
#pragma once

#include "gemv_config.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace higgs::cuda {

__device__ __forceinline__ float4 add(float4 a, float4 b) { return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w}; }

// Sums of `rounds` finished rounds of row blocks, to be reduced over slices and over the CTAs of the cluster.
struct Reduction {
  float4* partials;   // [round][row group][slice][m][kPartialStride / 4]
  float4* inbox;      // [rank][quads this CTA owns]: sums of the CTAs
  uint64_t* barrier;  // counts the bytes that arrived in the inbox
  int first_block;
};

// Four consecutive rows of y.
template <typename T>
__device__ __forceinline__ void store_outputs(const GemvParams& p, const GemvPart& part, float4 sums, int n_row,
                                              int token) {
  float value[4] = {sums.x, sums.y, sums.z, sums.w};
  const int count = min(4, part.n - n_row);  // may be negative
  const long long out = token * static_cast<long long>(part.n) + n_row;
  if (p.add_partial) {
    for (int i = 0; i < count; ++i) value[i] += part.partial[out + i];
  }
  if (p.store_partial) {
    for (int i = 0; i < count; ++i) part.partial[out + i] = value[i];
    return;
  }
  if (part.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) value[i] += to_float(static_cast<const T*>(part.bias)[n_row + i]);
    }
  }
  T y[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) y[i] = from_float<T>(value[i]);
  T* to = static_cast<T*>(part.y) + out;
  if (part.n % 4 == 0) {
    if (count > 0) *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(y);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[i] = y[i];
    }
  }
}

// A thread sums four rows of an x row. In a cluster every CTA sums its own slices, sends each sum to the CTA that owns
// the output (those of 32 threads in turn), and in a second pass the owner adds them up in the order of the ranks.
template <typename Config>
__device__ __forceinline__ void reduce_and_store(const GemvParams& p, const GemvPart& part, const Reduction& r,
                                                 int rounds, uint32_t parity) {
  constexpr int kQuads = Config::kRows / 4;
  constexpr int kStride = Config::kPartialStride / 4;
  const int quads = rounds * p.cta_row_groups * p.m * kQuads;  // [round][row group][x row][4 rows]
  const int turns = (quads + kLanes - 1) / kLanes;
  const int owned = small_divide(turns + p.cluster - 1, p.cluster) * kLanes;  // at most, by one CTA
  const int rank = p.cluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const float4* from = r.partials;
  int terms = p.cta_slices;
  int count = quads;
  bool last = p.cluster == 1;
  __syncthreads();
#pragma unroll 1
  while (true) {
    const bool gathered = last && p.cluster > 1;
#pragma unroll 1
    for (int j = threadIdx.x; j < count; j += blockDim.x) {
      const int i = gathered ? (j / kLanes * p.cluster + rank) * kLanes + j % kLanes : j;
      const int slot = small_divide(i / kQuads, p.m);  // round * row groups + row group
      const int token = i / kQuads - slot * p.m;
      const int at = gathered ? j : (slot * p.cta_slices * p.m + token) * kStride + i % kQuads;
      const int step = gathered ? owned : p.m * kStride;
      float4 sums = {};
#pragma unroll 4
      for (int s = 0; s < terms; ++s) sums = add(sums, from[at + s * step]);
      if (last) {
        const int round = small_divide(slot, p.cta_row_groups);
        const int block = r.first_block + round * part.clusters * p.cta_row_groups + slot - round * p.cta_row_groups;
        store_outputs<typename Config::T>(p, part, sums, block * Config::kRows + i % kQuads * 4, token);
      } else {
        const int turn = small_divide(i / kLanes, p.cluster);
        send(r.inbox + rank * owned + turn * kLanes + i % kLanes, sums, r.barrier, i / kLanes - turn * p.cluster);
      }
    }
    if (last) return;
    last = true;
    from = r.inbox;
    terms = p.cluster;
    count = small_divide(turns - rank + p.cluster - 1, p.cluster) * kLanes;
    if (turns - 1 == rank + (count / kLanes - 1) * p.cluster)
      count -= turns * kLanes - quads;  // the last turn is short
    if (threadIdx.x == 0) mbarrier_expect(r.barrier, count * p.cluster * sizeof(float4));
    mbarrier_wait(r.barrier, parity);
  }
}

// Reduces the rounds from `round` on, and waits until everybody is done with their sums if a batch follows.
template <typename Config>
__device__ __forceinline__ void reduce_batch(const GemvParams& p, const GemvPart& part, Reduction batch, int round,
                                             int rounds, int stride, uint32_t parity) {
  batch.first_block += round * stride;
  reduce_and_store<Config>(p, part, batch, rounds, parity);
  if (round + p.batch >= part.rounds) return;
  if (p.cluster > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
}

}  // namespace higgs::cuda
