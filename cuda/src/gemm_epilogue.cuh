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

// Of the clusters that share a tile, how many add up its sums: the one that begins it, or, where that would read those
// of many, as many as there are fragments, of those whose share ends there (all but the last). At other widths of tiles
// and with fewer clusters that was slower: they wait for each other, and read their own sums as well.
template <typename Config>
__device__ __forceinline__ int adders_of(const Sharing& sharing) {
  constexpr int kMany = 6;
  return Config::kAddsInParts && sharing.others >= kMany ? min(sharing.others, Config::kRegisters / 4) : 1;
}

// Adds the sums of those who go on with a tile, in the order of k.
template <typename Config>
__device__ __forceinline__ void add_partials(const GemmParams& p, const CtaPlace& place, int others, int thread,
                                             float (&acc)[Config::kRegisters]) {
  const auto set = [&](int i) {
    return partial_set<Config>(p, (place.cluster + 1 + i) * Config::kClusterSize + place.rank, false);
  };
  wait_for_sets<Config>(p, set, others, thread);
  add_sets<Config, Config::kRegisters / 4>(p, set, others, thread, 0, Config::kRegisters / 4, acc);
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

// A warpgroup's accumulators, times `scale`, to y by way of `staging`: [token][64 rows], 16-byte pieces swizzled as a
// TensorMap says. From there the copy engine takes them, while the next tile is multiplied, or, where y has no map, all
// threads; they are done with `staging` when it returns.
template <typename Config>
__device__ __forceinline__ void store_tile(const GemmParams& p, const TilePlace& place, int thread, uint8_t* staging,
                                           float2 scale, const float (&acc)[Config::kRegisters]) {
  using T = typename Config::T;
  constexpr int kTokenBytes = 128;
  const GemmPart& part = p.parts[place.part];
  const int lane = thread % kLanes;
  const int warp = thread / kLanes % 4;
  const int warpgroup = thread / 128;
  const int first_row = place.row_tile * kTileRows + warpgroup * 64;
  const float2 bias = row_biases<T>(part, first_row + warp * kTileRows, lane);
  const uint32_t to =
      shared_address(staging) + (lane / 16 * 8 + lane % 8) * kTokenBytes + ((2 * warp + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
  for (int i = 0; i < Config::kN / 16; ++i) {
    const float* v = acc + 8 * i;
    uint32_t packed[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float s = j % 2 == 0 ? scale.x : scale.y;
      const float b = j % 2 == 0 ? bias.x : bias.y;
      packed[j] = pack2<T>(fmaf(v[2 * j], s, b), fmaf(v[2 * j + 1], s, b));
    }
    store_transposed(to + i * 16 * kTokenBytes, packed);
  }
  if (part.mapped) copies_fence();
  named_barrier(1 + warpgroup, 128);
  if (part.mapped) {
    if (thread % 128 == 0 && first_row < part.n) {
      copy_box(&p.y[place.part], shared_address(staging), first_row, place.token);
      copies_commit();
    }
    return;
  }
  const int tokens = min(Config::kN, p.m - place.token);
#pragma unroll 1
  for (int t = thread % 128 / 8; t < tokens; t += 16) {
    store_rows<T>(part, first_row + lane % 8 * 8, place.token + t,
                  *reinterpret_cast<const uint4*>(staging + t * kTokenBytes + (lane % 8 ^ t % 8) * 16));
  }
  named_barrier(1 + warpgroup, 128);
}

}  // namespace higgs::cuda
