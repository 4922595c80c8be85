// Kernel for the experts of a mixture: y[t, n] = x[t, k] . (scale * table[index])[expert of t][n, k]^T, x rotated and
// packed (pack_x.h) and sorted by expert, where each expert has few rows.
//
// Items. Up to `tokens` rows of x that meet one expert are an item; every CTA finds all items from the offsets. An item
// has `rounds` rounds of row_groups row tiles; the CTAs share all rounds out evenly, in contiguous runs, so that a CTA
// fills its table once and copies x for few items.
//
// Partition of a round. Warp (r, s) multiplies row tile r of the round by part s of k, slices_per_warp slices. Weights
// go from global memory to registers in 16-byte loads, a register being reloaded with the words of the next slice,
// round or item as soon as it has been consumed; x fragments come from shared memory. The partial sums of a row tile
// meet in shared memory and are added in the order of k.
//
// Shared memory: Decoder::kTableBytes, then as grouped_params.h says.
#pragma once

#include "gemm_weights.cuh"
#include "grouped_params.h"
#include "numeric.cuh"
#include "ptx.cuh"

namespace higgs::cuda {

template <typename Decoder_, typename T_, int TokenTiles_>
struct GroupedConfig : GemmWeights<Decoder_, T_> {
  static constexpr int kTokenTiles = TokenTiles_;
  static constexpr int kMaxThreads = 512;  // 128 registers each
  static_assert(!Decoder_::kShape.trellis());
};

// Lists the items; returns their number. `counts`: experts + 1 ints behind the items.
__device__ __forceinline__ int list_items(const GroupedParams& p, GroupedItem* items) {
  int* counts = reinterpret_cast<int*>(items + p.max_items);
  const auto begin_of = [&](int e) { return e == 0 ? 0 : p.offsets[e - 1]; };
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
    counts[e] = (p.offsets[e] - begin_of(e) + p.tokens - 1) / p.tokens;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += blockDim.x) {
    int item = 0;
#pragma unroll 8
    for (int before = 0; before < e; ++before) item += counts[before];
    const int end = p.offsets[e];
    for (int first = begin_of(e); first < end; first += p.tokens) {
      items[item++] = {e, first, min(p.tokens, end - first)};
    }
    if (e == p.experts - 1) counts[p.experts] = item;
  }
  __syncthreads();
  return counts[p.experts];
}

// Copies the rows of x of an item to shared memory, in the order of fragments (rotate_x.cuh): 8 bytes are columns 4 t
// ..
// + 3 of a step, which packed x has in two pieces of 16 bytes. A thread copies a step.
template <typename T>
__device__ __forceinline__ void copy_x(const GroupedParams& p, const GroupedItem& item, T* xs) {
  constexpr int kAtOnce = 2;
  const int stride = grouped_x_stride(p.k);
  const int steps = (stride - 32) / 16;
  for (int step = threadIdx.x; step < steps; step += blockDim.x) {
    const uint4* block = static_cast<const uint4*>(p.x) + static_cast<long long>(step / 4) * p.rows * 8;
    T* to = xs + step / 2 * 32 + step % 2 * 4;
    for (int i = 0; i < item.count; i += kAtOnce) {
      uint4 v[kAtOnce][2] = {};
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (i + j >= item.count || step * 16 >= p.k) continue;
        const int row = item.first + i + j;
#pragma unroll
        for (int h = 0; h < 2; ++h) v[j][h] = block[row * 8 + ((step % 4 * 2 + h) ^ (row % 8))];
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (i + j >= item.count) continue;
        const uint32_t low[4] = {v[j][0].x, v[j][0].y, v[j][0].z, v[j][0].w};
        const uint32_t high[4] = {v[j][1].x, v[j][1].y, v[j][1].z, v[j][1].w};
#pragma unroll
        for (int t = 0; t < 4; ++t) *reinterpret_cast<uint2*>(to + (i + j) * stride + t * 8) = {low[t], high[t]};
      }
    }
  }
}

// The words of a slice of a row tile, in registers.
template <typename Config>
struct SliceWords {
  uint4 q[Config::kLoads];
  const uint8_t* next = nullptr;  // the lane's words of the slice to come; null: there is none
  int next_loads = 0;

  // Loads [first, last) of the slice to come.
  __device__ __forceinline__ void load(int first, int last) {
#pragma unroll
    for (int i = 0; i < Config::kLoads; ++i) {
      if (i >= first && i < last && i < next_loads) {
        q[i] = load_streaming(reinterpret_cast<const uint4*>(next) + i * kLanes);
      }
    }
  }
  __device__ __forceinline__ uint32_t word(int i) const {
    const uint4& v = q[i / 4];
    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
  }
};

// The sums of a row tile over a warp's part of k, and the scales on the way. A lane has rows g and g + 8.
template <typename Config>
struct TileSums {
  static constexpr int kChains = 2;
  float acc[kChains][Config::kTokenTiles][4] = {};
  float sum[Config::kTokenTiles][4] = {};
  const uint16_t* scale;  // of the scale group
  uint16_t now[2];
  int left;         // half units of the group that are still to come
  int groups_left;  // after this one

  __device__ __forceinline__ TileSums(const GroupedParams& p, const uint16_t* scales, int tile, int first_half,
                                      int lane) {
    const int group = first_half / p.group_halves;
    left = (group + 1) * p.group_halves - first_half;
    groups_left = p.scale_groups - 1 - group;
    scale = scales + (static_cast<long long>(tile) * p.scale_groups + group) * kTileRows + lane / 4;
    load();
  }
  __device__ __forceinline__ void load() {
    now[0] = __ldg(scale);
    now[1] = __ldg(scale + 8);
  }
  __device__ __forceinline__ void flush() {
    const float by[2] = {__half2float(__ushort_as_half(now[0])), __half2float(__ushort_as_half(now[1]))};
#pragma unroll
    for (int t = 0; t < Config::kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sum[t][i] = fmaf(acc[0][t][i] + acc[1][t][i], by[i / 2], sum[t][i]);
        acc[0][t][i] = acc[1][t][i] = 0;
      }
    }
  }
  // A half unit has been added.
  __device__ __forceinline__ void half_done(const GroupedParams& p) {
    if (--left > 0) return;
    flush();
    left = p.group_halves;
    if (groups_left-- > 0) {
      scale += kTileRows;
      load();
    }
  }
};

// Adds a slice of `units` units, and loads the one to come. x: the lane's first fragment of the slice, per token tile.
template <typename Config>
__device__ __forceinline__ void multiply_slice(const GroupedParams& p, SliceWords<Config>& words, int units,
                                               const typename Config::T* const (&x)[Config::kTokenTiles],
                                               const uint8_t* table, uint32_t offset, TileSums<Config>& sums) {
  constexpr int kWords = Config::kUnitWords;
#pragma unroll
  for (int u = 0; u < Config::kUnits; ++u) {
    if (u < units) {
      uint32_t w[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) w[i] = words.word(u * kWords + i);
      const typename Config::Decoder decoder(w);
#pragma unroll
      for (int pair = 0; pair < kSteps / 2; ++pair) {
        uint4 b[Config::kTokenTiles];  // the B fragments of two steps
#pragma unroll
        for (int t = 0; t < Config::kTokenTiles; ++t) {
          b[t] = *reinterpret_cast<const uint4*>(x[t] + u * kUnitColumns + pair * 32);
        }
#pragma unroll
        for (int step = 2 * pair; step < 2 * pair + 2; ++step) {
          uint32_t a[4];
          decoder.fragment(step, table, offset, a);
#pragma unroll
          for (int t = 0; t < Config::kTokenTiles; ++t) {
            mma_m16n8k16<typename Config::T>(sums.acc[step % 2][t], a,
                                             step % 2 == 0 ? make_uint2(b[t].x, b[t].y) : make_uint2(b[t].z, b[t].w));
          }
        }
        if (pair % 2 == 1) sums.half_done(p);
      }
    }
    words.load(u * kWords / 4, u == Config::kUnits - 1 ? Config::kLoads : (u + 1) * kWords / 4);
    __syncwarp();  // keeps the loads here
  }
}

// Adds the parts of k of the row tiles of a round and stores the outputs, four rows a thread.
template <typename T>
__device__ __forceinline__ void store_round(const GroupedParams& p, const GroupedItem& item, int round,
                                            const float* partials) {
  constexpr int kQuads = kTileRows / 4;
  for (int i = threadIdx.x; i < p.row_groups * item.count * kQuads; i += blockDim.x) {
    const int slot = i / kQuads / item.count;
    const int token = i / kQuads - slot * item.count;
    const int tile = round * p.row_groups + slot;
    if (tile >= p.row_tiles) break;
    const int warp_floats = p.tokens * kGroupedPartialStride;
    const float* from = partials + slot * p.k_warps * warp_floats + token * kGroupedPartialStride + i % kQuads * 4;
    float4 sum = *reinterpret_cast<const float4*>(from);
    for (int s = 1; s < p.k_warps; ++s) {
      const float4 v = *reinterpret_cast<const float4*>(from + s * warp_floats);
      sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    }
    T out[4] = {from_float<T>(sum.x), from_float<T>(sum.y), from_float<T>(sum.z), from_float<T>(sum.w)};
    T* to = static_cast<T*>(p.y) + static_cast<long long>(item.first + token) * p.n + tile * kTileRows + i % kQuads * 4;
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(out);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kMaxThreads, 1) grouped_kernel(const __grid_constant__ GroupedParams p) {
  using T = typename Config::T;
  using Decoder = typename Config::Decoder;
  extern __shared__ __align__(1024) uint8_t shared[];
  launch_dependents();
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  const int warps = blockDim.x / 32;
  auto* items = reinterpret_cast<GroupedItem*>(shared + Decoder::kTableBytes);
  auto* partials = reinterpret_cast<float*>(shared + Decoder::kTableBytes + grouped_item_bytes(p.max_items, p.experts));
  const int round_floats = grouped_partial_bytes(warps, p.tokens) / 4;
  T* xs = reinterpret_cast<T*>(partials + 2 * round_floats);
  TableFill<Decoder>(p.data + Config::kTableOffset, threadIdx.x, blockDim.x).store(shared);
  wait_for_primary();
  const int all_rounds = list_items(p, items) * p.rounds;  // a barrier, which the table needs too

  const int row_group = warp / p.k_warps;
  const int first_slice = (warp - row_group * p.k_warps) * p.slices_per_warp;
  const int end_slice = min(p.slices, first_slice + p.slices_per_warp);
  const uint8_t* weights = p.data + static_cast<long long>(p.weights_offset) * kTiledAlignment +
                           static_cast<long long>(first_slice) * p.slice_bytes + lane * 16;
  const auto* scales = reinterpret_cast<const uint16_t*>(p.data + Config::kScalesOffset);
  const auto units_of = [&](int slice) { return slice == p.slices - 1 ? p.last_units : p.units_per_slice; };
  const int end = static_cast<int>(static_cast<long long>(all_rounds) * (blockIdx.x + 1) / gridDim.x);
  // This warp's row tile among those of all experts in round `at`; -1 if it has none.
  const auto tile_of = [&](int at) {
    if (at >= end) return -1;
    const int item = at / p.rounds;
    const int tile = (at - item * p.rounds) * p.row_groups + row_group;
    return tile < p.row_tiles ? items[item].expert * p.row_tiles + tile : -1;
  };
  SliceWords<Config> words = {};
  const auto go_to = [&](int tile, int slice) {
    words.next = weights + static_cast<long long>(tile) * p.tile_bytes + (slice - first_slice) * p.slice_bytes;
    words.next_loads = tile < 0 ? 0 : (units_of(slice) * Config::kUnitWords + 3) / 4;
  };

  int at = static_cast<int>(static_cast<long long>(all_rounds) * blockIdx.x / gridDim.x);
  int tile = tile_of(at);
  go_to(tile, first_slice);
  words.load(0, Config::kLoads);
  const uint32_t offset = Decoder::lane_offset(lane);
  const int x_stride = grouped_x_stride(p.k);
  int copied = -1;
  for (; at < end; ++at) {
    const int number = at / p.rounds;
    const GroupedItem item = items[number];
    if (number != copied) {  // all warps are done with the x before: they have passed the barrier of the last round
      copy_x<T>(p, item, xs);
      __syncthreads();
      copied = number;
    }
    const int next_tile = tile_of(at + 1);
    float* round_partials = partials + at % 2 * round_floats;
    if (tile >= 0) {
      TileSums<Config> sums(p, scales, tile, first_slice * p.units_per_slice * 2, lane);
      const T* x[Config::kTokenTiles];
#pragma unroll
      for (int t = 0; t < Config::kTokenTiles; ++t) {  // rows that are not there: the sums of any other do
        x[t] = xs + min(t * 8 + lane / 4, item.count - 1) * x_stride + lane % 4 * 8 +
               first_slice * p.units_per_slice * kUnitColumns;
      }
#pragma unroll 1
      for (int slice = first_slice; slice < end_slice; ++slice) {
        slice + 1 < end_slice ? go_to(tile, slice + 1) : go_to(next_tile, first_slice);
        multiply_slice<Config>(p, words, units_of(slice), x, shared, offset, sums);
#pragma unroll
        for (int t = 0; t < Config::kTokenTiles; ++t) x[t] += p.units_per_slice * kUnitColumns;
      }
      sums.flush();
      float* out = round_partials + warp * p.tokens * kGroupedPartialStride + lane / 4;
#pragma unroll
      for (int t = 0; t < Config::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = t * 8 + lane % 4 * 2 + i;
          if (token >= item.count) continue;
          out[token * kGroupedPartialStride] = sums.sum[t][i];
          out[token * kGroupedPartialStride + 8] = sums.sum[t][2 + i];
        }
      }
    } else {
      go_to(next_tile, first_slice);
      words.load(0, Config::kLoads);
    }
    __syncthreads();
    store_round<T>(p, item, at - number * p.rounds, round_partials);
    tile = next_tile;
  }
}

}  // namespace higgs::cuda
