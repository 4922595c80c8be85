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
  bool rehearsal = false;  // stores nothing
};

// Four consecutive rows of y, of which `count` (or, if negative, none) are there.
template <typename T>
__device__ __forceinline__ void store_outputs(const GemvParams& p, const GemvPart& part, float4 sums, int n_row,
                                              int count, int token) {
  float value[4] = {sums.x, sums.y, sums.z, sums.w};
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

// The sum of `terms` quads, `step` apart, in their order.
__device__ __forceinline__ float4 sum_of(const float4* at, int terms, int step) {
  float4 sums = {};
#pragma unroll 1
  for (; terms >= 4; terms -= 4, at += 4 * step) {
    float4 v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = at[i * step];
#pragma unroll
    for (int i = 0; i < 4; ++i) sums = add(sums, v[i]);
  }
#pragma unroll 1
  for (; terms > 0; --terms, at += step) sums = add(sums, *at);
  return sums;
}

// The quads of a batch, four rows of an x row each: [round][row group][x row][4 rows].
template <typename Config>
struct Quads {
  static constexpr int kOfRow = Config::kRows / 4;
  static constexpr int kStride = Config::kPartialStride / 4;
  const GemvParams& p;
  const Reduction& r;

  __device__ __forceinline__ int slot(int i) const {  // round * row groups + row group
    return quotient(static_cast<uint32_t>(i) / kOfRow, p.inverse_m);
  }
  // Over the slices of the CTA.
  __device__ __forceinline__ float4 sum(int i) const {
    const int row = i / kOfRow + slot(i) * (p.cta_slices - 1) * p.m;
    return sum_of(r.partials + row * kStride + i % kOfRow, p.cta_slices, p.m * kStride);
  }
  __device__ __forceinline__ void store(const GemvPart& part, int i, float4 sums) const {
    const int s = slot(i);
    const int round = quotient(s, p.inverse_row_groups);
    const int block = r.first_block + s + round * (part.clusters - 1) * p.cta_row_groups;
    const int n_row = block * Config::kRows + i % kOfRow * 4;
    store_outputs<typename Config::T>(p, part, sums, n_row, min(4, (r.rehearsal ? 0 : part.n) - n_row),
                                      i / kOfRow - s * p.m);
  }
};

// Every CTA sums its own slices, sends each sum to the CTA that owns the output (those of 32 threads in turn), and the
// owner adds them up in the order of the ranks.
template <typename Config>
__device__ __forceinline__ void reduce_in_cluster(const GemvParams& p, const GemvPart& part, const Reduction& r,
                                                  int count, uint32_t parity) {
  const Quads<Config> quads{p, r};
  const int turns = (count + kLanes - 1) / kLanes;
  const int owned = small_divide(turns + p.cluster - 1, p.cluster) * kLanes;  // at most, by one CTA
  const int rank = static_cast<int>(cluster_rank());
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int turn = small_divide(i / kLanes, p.cluster);
    send(r.inbox + rank * owned + turn * kLanes + i % kLanes, quads.sum(i), r.barrier, i / kLanes - turn * p.cluster);
  }
  int mine = small_divide(turns - rank + p.cluster - 1, p.cluster) * kLanes;
  if (turns - 1 == rank + (mine / kLanes - 1) * p.cluster) mine -= turns * kLanes - count;  // the last turn is short
  if (threadIdx.x == 0) mbarrier_expect(r.barrier, mine * p.cluster * sizeof(float4));
  mbarrier_wait(r.barrier, parity);
#pragma unroll 1
  for (int j = threadIdx.x; j < mine; j += blockDim.x) {
    quads.store(part, (j / kLanes * p.cluster + rank) * kLanes + j % kLanes, sum_of(r.inbox + j, p.cluster, owned));
  }
}

// A thread sums a quad. A CTA that is no cluster's takes a path of its own: few instructions, which a launch executes
// once, from cold caches.
template <typename Config>
__device__ __forceinline__ void reduce_and_store(const GemvParams& p, const GemvPart& part, const Reduction& r,
                                                 int rounds, uint32_t parity) {
  const Quads<Config> quads{p, r};
  const int count = rounds * p.cta_row_groups * p.m * quads.kOfRow;
  __syncthreads();
  if (p.cluster > 1) {
    if (!r.rehearsal) reduce_in_cluster<Config>(p, part, r, count, parity);
    return;
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) quads.store(part, i, quads.sum(i));
}

// Reduces the rounds from `round` on, and waits until everybody is done with their sums if a batch follows. Rounds
// before the first one are a rehearsal.
template <typename Config>
__device__ __forceinline__ void reduce_batch(const GemvParams& p, const GemvPart& part, Reduction batch, int round,
                                             int rounds, int stride, uint32_t parity) {
  batch.rehearsal = Config::kPrepared && round < 0;
  if (!batch.rehearsal) batch.first_block += round * stride;
  reduce_and_store<Config>(p, part, batch, rounds, parity);
  if (batch.rehearsal || round + p.batch >= part.rounds) return;
  if (p.cluster > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
}

}  // namespace higgs::cuda
