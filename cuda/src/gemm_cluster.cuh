// Sums of a tile whose k is split within a cluster: every CTA sends each fragment of its accumulators to the CTA that
// owns it, through distributed shared memory, and adds up those it owns in the order of k: no round trip through the
// L2, and the result does not depend on timing.
//
//   inbox    [k part][own fragment][thread] float4, complete after a barrier of the cluster
//
// Of C CTAs, number r owns fragments [r F / C, (r + 1) F / C) of the F = N / 8 of every warp. Where C > F, fragment f
// belongs to C / F of them, which take the warpgroups in turn.
#pragma once

#include "gemm_output.cuh"
#include "ptx.cuh"

namespace higgs::cuda {

template <typename Config>
class ClusterSums {
 public:
  __device__ __forceinline__ ClusterSums(const GemmParams& p, uint8_t* shared, int k_rank)
      : inbox_(reinterpret_cast<float4*>(shared + Config::kScratchStart)),
        log_(p.k_split_log),
        rank_(k_rank),
        takers_log_(max(0, p.k_split_log - kFragmentsLog)),
        own_log_(max(0, kFragmentsLog - p.k_split_log)) {}

  __device__ __forceinline__ void send_all(const float (&acc)[Config::kRegisters], int warpgroup) const {
    float4* to = inbox_ + (rank_ << own_log_) * Config::kConsumers + threadIdx.x;
#pragma unroll
    for (int f = 0; f < Config::kTileFragments; ++f) {
      const int cta = (f << log_ >> kFragmentsLog) + turn(warpgroup);
      const int own = f & ((1 << own_log_) - 1);
      store_remote(to + own * Config::kConsumers,
                   make_float4(acc[4 * f], acc[4 * f + 1], acc[4 * f + 2], acc[4 * f + 3]), cta);
    }
  }
  __device__ __forceinline__ void add_and_store(const TileOutput<Config>& output, int warpgroup) const {
    if (turn(warpgroup - rank_) != 0) return;
    const float2 bias = output.bias(0);
#pragma unroll 1
    for (int i = 0; i < 1 << own_log_; ++i) {
      const float4* from = inbox_ + i * Config::kConsumers + threadIdx.x;
      float4 sum = {};
#pragma unroll 2
      for (int part = 0; part < 1 << log_; ++part, from += Config::kConsumers << own_log_) {
        const float4 v = *from;
        sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
      }
      output.store((rank_ >> takers_log_ << own_log_) + i, sum, bias);
    }
  }

 private:
  static constexpr int kFragmentsLog = Config::kTileFragments == 4 ? 2 : Config::kTileFragments == 8 ? 3 : 4;
  static_assert(Config::kTileFragments == 1 << kFragmentsLog);

  // Of the warpgroups, among the CTAs that share a fragment.
  __device__ __forceinline__ int turn(int warpgroup) const { return warpgroup & ((1 << takers_log_) - 1); }

  float4* inbox_;
  int log_;  // of the parts of k
  int rank_;
  int takers_log_;  // of the CTAs that share a fragment
  int own_log_;     // of the fragments of a warp that a CTA owns
};

}  // namespace higgs::cuda
