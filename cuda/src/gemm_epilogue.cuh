// What happens to the accumulators of a segment: sent to the CTA that owns the tile, or summed, and stored with the
// bias.
#pragma once

#include "gemm_output.cuh"
#include "gemm_partials.cuh"
#include "gemm_schedule.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "rotate_x.cuh"
#include "wgmma.cuh"

namespace higgs::cuda {

template <typename Config>
__device__ __forceinline__ void add_partials(const GemmParams& p, const CtaPlace& place, int warpgroup, int tile,
                                             float (&acc)[Config::kRegisters]) {
  using Order = Schedule<Config::kWholeFirst>;
  const int end = (tile - Order::first_split(p) + 1) * p.slices;
  const auto helps = [&](int cluster) {
    return cluster < p.clusters && Order::first_slice(p, cluster) < min(end, Order::first_slice(p, cluster + 1));
  };
  for (int cluster = place.cluster + 1 + threadIdx.x % 128; helps(cluster); cluster += 128) {
    const int cta = cluster * Config::kClusterSize + place.rank;
    wait_for_partial<Config>(p, cta, warpgroup);
  }
  named_barrier(1 + warpgroup, 128);
  for (int cluster = place.cluster + 1; helps(cluster); ++cluster) {
    const int cta = cluster * Config::kClusterSize + place.rank;
    const float4* from = partial_of<Config>(p, cta, warpgroup);
#pragma unroll
    for (int i = 0; i < Config::kRegisters / 4; ++i) {
      const float4 v = __ldcg(from + i * 128);
      acc[4 * i] += v.x;
      acc[4 * i + 1] += v.y;
      acc[4 * i + 2] += v.z;
      acc[4 * i + 3] += v.w;
    }
  }
}

// 8 consecutive rows of one token.
template <typename T>
__device__ __forceinline__ void store_rows(const GemmPart& part, int row, long long token, uint4 v) {
  T* to = static_cast<T*>(part.y) + token * part.n + row;
  if (part.n % 8 == 0 && row + 8 <= part.n) {  // y is 16-byte aligned
    *reinterpret_cast<uint4*>(to) = v;
  } else {
    const T* values = reinterpret_cast<const T*>(&v);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (row + i < part.n) to[i] = values[i];
    }
  }
}

// All of a warp's accumulators to y: 16-byte stores, by way of `staging`, which only this kernel on sm_90 has the
// shared memory and the instruction for; TileOutput does without.
template <typename Config>
__device__ __forceinline__ void store_tile(const GemmParams& p, const GemmPart& part, int row_tile, int token,
                                           uint8_t* staging, int lane, const float (&acc)[Config::kRegisters]) {
  using T = typename Config::T;
  const int row = row_tile * kTileRows;
  if (row >= part.n) return;
  const float2 bias = row_biases<T>(part, row, lane);
  constexpr int kTokens = Config::kStagingTokens;
#pragma unroll
  for (int first = 0; first < Config::kN; first += kTokens) {
    if (token + first >= p.m) break;
    uint8_t* to = staging + (lane / 16 * 8 + lane % 8) * Config::kStagingStride + lane / 8 % 2 * 16;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kTokens / 16; ++i) {
      const float* v = acc + (first + 16 * i) / 2;
      uint32_t packed[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float b = j % 2 == 0 ? bias.x : bias.y;
        packed[j] = pack2<T>(v[2 * j] + b, v[2 * j + 1] + b);
      }
      store_transposed(to + i * 16 * Config::kStagingStride, packed);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kTokens / 16; ++i) {
      const int t = lane / 2 + 16 * i;
      if (token + first + t < p.m) {
        store_rows<T>(part, row + lane % 2 * 8, token + first + t,
                      *reinterpret_cast<const uint4*>(staging + t * Config::kStagingStride + lane % 2 * 16));
      }
    }
  }
}

}  // namespace higgs::cuda
