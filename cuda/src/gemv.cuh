// Decode kernel: y[m, n] = rotate(x * d)[m, k] . (scale * table[index])[n, k]^T (+ bias), m <= 16, in one launch.
//
//   x        [m, k] fp16 or bf16; multiplied by d and rotated (rotate_x.cuh) by every CTA for its columns
//   weights  tiled layout (tiled_format.h); table and scales from the same buffer
//   y        [m, n] in x's type, accumulated in fp32
//
// Partition. A CTA has cta_slices x cta_row_groups warps. A warp owns one slice of k, whose x fragments stay in its
// registers, and every (clusters * cta_row_groups)-th row tile of 16 rows:
//
//                 slice 0   slice 1   ...              the CTAs of a cluster continue along k
//   row tile 0    warp 0    warp 1    ...              partial sums of one row tile meet in shared memory, slice by
//   row tile 1    warp S    warp S+1  ...              slice and CTA by CTA: a fixed order
//
// The main loop has no barrier and touches shared memory for table look-ups only: weights go from global memory to
// registers in 16-byte loads, a register being reloaded with the next row tile's words as soon as it has been consumed.
// Partial sums are reduced every `batch` row tiles.
//
// Before griddepcontrol.wait, while the previous kernel still runs: loads of table, d and first weights, table fill.
// After it: rotation.
//
// Shared memory: Decoder::kTableBytes
//   + 16 + 4 * inbox_floats          sums sent by the other CTAs of the cluster
//   + m * xs_stride(chunks) * 2      rotated x
//   + batch * warps * m * 80         partial sums: 16 rows (+ 4 padding) per x row
//
// Template values: Decoder of instances.h; T = __half, __nv_bfloat16; TokenTiles = 1 (m <= 8) or 2 (m <= 16: twice the
// x fragments, so half a slice per warp or half the warps); Regular: every slice is full and inside one scale group.
#pragma once

#include <type_traits>

#include "decode.cuh"
#include "gemv_params.h"
#include "numeric.cuh"
#include "ptx.cuh"
#include "rotate_x.cuh"

namespace higgs::cuda {

inline constexpr int kPartialStride = 20;  // floats per x row of a 16-row partial sum: spreads x rows over banks

template <typename Decoder_, typename T_, int TokenTiles_, bool Regular_>
struct GemvConfig {
  using Decoder = Decoder_;
  using T = T_;
  static constexpr int kTokenTiles = TokenTiles_;
  static constexpr int kTableBytes =  // tables in the tiled buffer: fp16, then bf16, then the scales
      (Decoder::kShape.entries() * Decoder::kShape.entry_bytes() + kTiledAlignment - 1) / kTiledAlignment *
      kTiledAlignment;
  static constexpr int kTableOffset = std::is_same_v<T_, __half> ? 0 : kTableBytes;
  static constexpr int kScalesOffset = 2 * kTableBytes;
  static constexpr bool kRegular = Regular_;
  static constexpr int kUnitWords = Decoder::kShape.unit_words();
  static constexpr bool kHalved =  // half a slice per warp, see LaunchPlan
      TokenTiles_ == 2 && Regular_ && Decoder::kShape.max_units() == 4 && kUnitWords % 2 == 0;
  static constexpr int kUnits = Decoder::kShape.max_units() / (kHalved ? 2 : 1);
  static constexpr int kMaxThreads = TokenTiles_ * kUnits <= 4 ? 512 : 256;
  static constexpr int kLoads = (kUnits * kUnitWords + 3) / 4;
  // Loads in flight per warp. Half a slice where a slice has 8 loads and x takes 64 registers: more would spill.
  static constexpr int kWindow = kUnits == 4 && kLoads == 8 && TokenTiles_ == 1 ? 4 : kLoads;
  static_assert(kLoads % kWindow == 0);
  static_assert(TokenTiles_ == 1 || TokenTiles_ == 2);
  static_assert(sizeof(T_) == 2);
  static_assert(Decoder::kTableBytes == 65536);
};

// a / b for 0 <= a < 2^16 and small b, without the integer division sequence.
__device__ __forceinline__ int small_divide(int a, int b) {
  return __float2int_rd((static_cast<float>(a) + 0.5f) * __frcp_rn(static_cast<float>(b)));
}

// What a warp works on, the same for all its row tiles.
struct WarpRole {
  int lane = 0;
  int slice = 0;
  int units = 0;              // 0: this warp has no columns
  int loads = 0;              // 16-byte loads of the slice
  int first_group = 0;        // scale group of the slice's first column
  int segments = 0;           // scale groups the slice touches
  uint32_t segment_ends = 0;  // bit h: a scale group (or the slice) ends after half unit h
  int weight_offset = 0;
};

template <typename Config>
__device__ __forceinline__ WarpRole make_role(const GemvParams& p, int slice, int lane) {
  WarpRole role;
  role.lane = lane;
  role.slice = slice;
  if (slice >= p.slices) return role;
  role.units = slice == p.slices - 1 ? p.last_units : p.units_per_slice;
  role.loads = (role.units * Config::kUnitWords + 3) / 4;
  role.weight_offset = slice * p.slice_bytes + lane * 16;
  const int first = slice * p.units_per_slice * kUnitColumns;
  role.first_group = small_divide(first / kMinBlock, p.group / kMinBlock);
  if constexpr (!Config::kRegular) {
    for (int h = 0; h < 2 * role.units; ++h) {
      const int end = first + (h + 1) * (kUnitColumns / 2);
      const bool ends = h == 2 * role.units - 1 || (end % p.group == 0 && end < p.k);
      role.segments += ends;
      role.segment_ends |= static_cast<uint32_t>(ends) << h;
    }
  }
  return role;
}

// Scales of a row tile for one slice. Regular: those of rows g and g + 8. Otherwise lane l holds values 4 l .. 4 l + 3
// of [segment][16 rows], to be handed out by shuffles.
template <typename Config>
struct TileScales {
  uint2 raw = {};

  __device__ __forceinline__ void load(const GemvParams& p, const GemvPart& part, const WarpRole& role, int tile) {
    const auto* s = reinterpret_cast<const uint16_t*>(part.data + Config::kScalesOffset) +
                    (static_cast<long long>(tile) * p.row_groups_of_scales + role.first_group) * kTileRows;
    if constexpr (Config::kRegular) {
      raw.x = __ldg(s + role.lane / 4);
      raw.y = __ldg(s + role.lane / 4 + 8);
    } else if (role.lane * 4 < role.segments * kTileRows) {
      raw = __ldg(reinterpret_cast<const uint2*>(s) + role.lane);
    }
  }
  __device__ __forceinline__ float2 rows(int segment, int lane) const {
    if constexpr (Config::kRegular) {
      return {half_bits(raw.x), half_bits(raw.y)};
    } else {
      const int g = lane / 4;
      const uint32_t shift = (g & 1) * 16;
      float2 out;
      const int source = segment * 4 + g / 4;
      uint32_t lo = __shfl_sync(~0u, raw.x, source), hi = __shfl_sync(~0u, raw.y, source);
      out.x = half_bits(((g & 2) != 0 ? hi : lo) >> shift);
      lo = __shfl_sync(~0u, raw.x, source + 2), hi = __shfl_sync(~0u, raw.y, source + 2);
      out.y = half_bits(((g & 2) != 0 ? hi : lo) >> shift);
      return out;
    }
  }
  static __device__ __forceinline__ float half_bits(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits & 0xffffu)));
  }
};

// The next kWindow 16-byte loads of a warp, in registers: load i of a slice lives in q[i % kWindow].
template <typename Config>
struct SliceWords {
  uint4 q[Config::kWindow];

  __device__ __forceinline__ void load(int i, const uint8_t* slice, const WarpRole& role) {
    if (Config::kRegular || i < role.loads) {
      q[i % Config::kWindow] = load_streaming(reinterpret_cast<const uint4*>(slice) + i * kLanes);
    }
  }
  __device__ __forceinline__ void load_first(const uint8_t* slice, const WarpRole& role) {
#pragma unroll
    for (int i = 0; i < Config::kWindow; ++i) load(i, slice, role);
  }
  // Load i has been consumed: its registers take load i + kWindow, of this slice or of the next row tile's.
  __device__ __forceinline__ void advance(int i, const uint8_t* slice, const uint8_t* next, const WarpRole& role) {
    const int ahead = i + Config::kWindow;
    if (ahead < Config::kLoads) {
      load(ahead, slice, role);
    } else if (next != nullptr) {
      load(ahead - Config::kLoads, next, role);
    }
  }
  __device__ __forceinline__ uint32_t word(int i) const {
    const uint4& v = q[i / 4 % Config::kWindow];
    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
  }
};

// Which part of x a warp rotates: chunks of 1024 columns `chunk`, + chunk_step, ... of rows `row`, + row_step, ...
template <typename T>
struct RotateRole {
  Rotation<T> rotation;
  int chunk0;  // first chunk of the CTA's columns
  int chunks;
  int chunk, chunk_step;
  int row, row_step;

  __device__ __forceinline__ RotateRole(const GemvParams& p, int first_slice, int warp, int lane)
      : rotation(p.block, lane) {
    const int begin = first_slice * p.units_per_slice * kUnitColumns;
    const int end = min(p.k, begin + p.cta_slices * p.units_per_slice * kUnitColumns);
    chunk0 = begin / kChunk;
    chunks = max(0, (end + kChunk - 1) / kChunk - chunk0);
    chunk_step = max(1, min(chunks, static_cast<int>(p.rotate_warps)));
    row = small_divide(warp, chunk_step);
    chunk = warp - row * chunk_step;
    row_step = small_divide(p.rotate_warps, chunk_step);
    if (row >= row_step || row >= p.m) chunk = chunks;  // nothing to do
  }
  // One copy of the code: a launch starts with cold instruction caches, every instruction before the main loop counts.
  __device__ __forceinline__ void run(const GemvParams& p, T* xs, int lane) const {
    float d[32];
    int c = chunk;
    int r = row;
#pragma unroll 1
    while (c < chunks) {
      const int column = (chunk0 + c) * kChunk;
      const int count = p.k - column;
      if (r == row) rotation.load_d(p.d + column, count, lane, d);
      uint2 raw[8];
      rotation.load_x(static_cast<const T*>(p.x) + static_cast<long long>(r) * p.k + column, count, lane, raw);
      rotation.rotate(raw, d, xs + r * xs_stride(chunks) + c * kChunk, lane);
      r += row_step;
      if (r >= p.m) {
        r = row;
        c += chunk_step;
      }
    }
  }
};

// One row tile times one slice. The words of the row tile at `next` (null: none) replace those consumed.
template <typename Config>
__device__ __forceinline__ void multiply_tile(SliceWords<Config>& words, const uint8_t* slice, const uint8_t* next,
                                              const WarpRole& role, const TileScales<Config>& scales,
                                              const uint8_t* table, uint32_t offset, float norm,
                                              const uint2 (&x)[Config::kTokenTiles][Config::kUnits * kSteps],
                                              float (&sum)[Config::kTokenTiles][4]) {
  constexpr int kChains = Config::kTokenTiles == 1 ? 2 : 1;  // independent accumulators hide the MMA latency
  float acc[kChains][Config::kTokenTiles][4] = {};
  int segment = 0;
  const auto flush = [&] {
    float2 s = scales.rows(segment++, role.lane);
    s.x *= norm;
    s.y *= norm;
#pragma unroll
    for (int t = 0; t < Config::kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float value = kChains == 2 ? acc[0][t][i] + acc[kChains - 1][t][i] : acc[0][t][i];
        sum[t][i] = fmaf(value, i < 2 ? s.x : s.y, sum[t][i]);
#pragma unroll
        for (int c = 0; c < kChains; ++c) acc[c][t][i] = 0;
      }
    }
  };
#pragma unroll
  for (int u = 0; u < Config::kUnits; ++u) {
    if (!Config::kRegular && u >= role.units) break;
    constexpr int kWords = Config::kUnitWords;
    uint32_t w[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) w[i] = words.word(u * kWords + i);
    const typename Config::Decoder decoder(w);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      decoder.fragment(step, table, offset, a);
#pragma unroll
      for (int t = 0; t < Config::kTokenTiles; ++t) {
        mma_m16n8k16<typename Config::T>(acc[step % kChains][t], a, x[t][u * kSteps + step]);
      }
      if constexpr (!Config::kRegular) {
        if (step % (kSteps / 2) == kSteps / 2 - 1 && (role.segment_ends >> (2 * u + step / (kSteps / 2)) & 1) != 0)
          flush();
      }
    }
    const int consumed = u == Config::kUnits - 1 ? Config::kLoads : (u + 1) * kWords / 4;
#pragma unroll
    for (int i = u * kWords / 4; i < consumed; ++i) words.advance(i, slice, next, role);
    __syncwarp();  // keeps the loads here: left alone, the assembler gathers them at the end of the row tile
  }
  if constexpr (Config::kRegular) {
    flush();
  } else {  // a shorter slice: the registers of the units it lacks take the next row tile's loads too
#pragma unroll
    for (int i = Config::kUnitWords / 4; i < Config::kLoads; ++i) {
      if (role.units < Config::kUnits && i >= role.units * Config::kUnitWords / 4) words.advance(i, slice, next, role);
    }
  }
}

// Sums of `rounds` finished rounds of row tiles, to be reduced over slices and over the CTAs of the cluster.
struct Reduction {
  float* partials;    // [round][row group][slice][m][kPartialStride]
  float* inbox;       // [rank][outputs of this CTA]: sums of the other CTAs
  uint64_t* barrier;  // counts the bytes that arrived in the inbox
  uint32_t rank;
  int first_tile;
  int tile_stride;
};

template <typename T>
__device__ __forceinline__ void store_output(const GemvParams& p, const GemvPart& part, float value, long long n_row,
                                             int token) {
  if (n_row >= part.n) return;
  const long long out = token * static_cast<long long>(part.n) + n_row;
  if (p.add_partial) value = part.partial[out] + value;
  if (p.store_partial) {
    part.partial[out] = value;
    return;
  }
  if (part.bias != nullptr) value += to_float(static_cast<const T*>(part.bias)[n_row]);
  static_cast<T*>(part.y)[out] = from_float<T>(value);
}

// In a cluster every CTA sums its own slices, sends each sum to the CTA that owns the output (32 outputs in turn), and
// the owner adds them up in the order of the ranks.
template <typename T>
__device__ __forceinline__ void reduce_and_store(const GemvParams& p, const GemvPart& part, const Reduction& r,
                                                 int rounds, uint32_t parity) {
  const int warp_floats = p.m * kPartialStride;
  const int outputs = rounds * p.cta_row_groups * p.m * kTileRows;
  const auto slot_of = [&](int i) { return small_divide(i / kTileRows, p.m); };  // round * row groups + row group
  const auto token_of = [&](int i, int slot) { return i / kTileRows - slot * p.m; };
  const auto global_row = [&](int i, int slot) {
    const int round = small_divide(slot, p.cta_row_groups);
    const int tile = r.first_tile + round * r.tile_stride + slot - round * p.cta_row_groups;
    return static_cast<long long>(tile) * kTileRows + i % kTileRows;
  };
  const int blocks = (outputs + kLanes - 1) / kLanes;
  const int owned = (blocks + p.cluster - 1) / p.cluster * kLanes;  // at most, by one CTA
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < outputs; i += blockDim.x) {
    const int slot = slot_of(i);
    const int token = token_of(i, slot);
    const float* at = r.partials + slot * p.cta_slices * warp_floats + token * kPartialStride + i % kTileRows;
    float value = 0;
#pragma unroll 4
    for (int s = 0; s < p.cta_slices; ++s) value += at[s * warp_floats];
    if (p.cluster == 1) {
      store_output<T>(p, part, value, global_row(i, slot), token);
    } else {
      const int block = i / kLanes;
      const int turn = small_divide(block, p.cluster);
      send(r.inbox + r.rank * owned + turn * kLanes + i % kLanes, value, r.barrier, block - turn * p.cluster);
    }
  }
  if (p.cluster > 1) {
    const int rank = static_cast<int>(r.rank);
    int mine = (blocks - rank + p.cluster - 1) / p.cluster * kLanes;
    if ((blocks - 1) % p.cluster == rank) mine -= blocks * kLanes - outputs;  // the last block may be short
    if (threadIdx.x == 0) mbarrier_expect(r.barrier, mine * p.cluster * sizeof(float));
    mbarrier_wait(r.barrier, parity);
#pragma unroll 1
    for (int j = threadIdx.x; j < mine; j += blockDim.x) {
      const int i = (j / kLanes * p.cluster + rank) * kLanes + j % kLanes;
      float value = 0;
      for (int c = 0; c < p.cluster; ++c) value += r.inbox[c * owned + j];
      const int slot = slot_of(i);
      store_output<T>(p, part, value, global_row(i, slot), token_of(i, slot));
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kMaxThreads, 1) gemv_kernel(const __grid_constant__ GemvParams p) {
  using T = typename Config::T;
  using Decoder = typename Config::Decoder;
  extern __shared__ __align__(1024) uint8_t shared[];
  launch_dependents();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const uint32_t rank = p.cluster > 1 ? cluster_rank() : 0;
  const int cluster_index = p.cluster > 1 ? blockIdx.x / p.cluster : blockIdx.x;
  int which = 0;
  while (which + 1 < p.part_count && cluster_index >= p.parts[which + 1].first_cluster) ++which;
  const GemvPart& part = p.parts[which];

  const int first_slice = p.first_slice + rank * p.cta_slices;
  const int row_group = small_divide(warp, p.cta_slices);
  const WarpRole role = make_role<Config>(p, first_slice + warp - row_group * p.cta_slices, lane);
  const int tile_stride = part.clusters * p.cta_row_groups;
  const int cta_tile = (cluster_index - part.first_cluster) * p.cta_row_groups;
  int tile = cta_tile + row_group;
  const uint8_t* weights = part.data + static_cast<long long>(part.weights_offset) * kTiledAlignment +
                           role.weight_offset + static_cast<long long>(tile) * p.tile_bytes;
  const long long weights_stride = static_cast<long long>(tile_stride) * p.tile_bytes;
  const int tiles = role.units > 0 ? (part.n + kTileRows - 1) / kTileRows : 0;
  SliceWords<Config> words = {};
  TileScales<Config> scales;
  if (tile < tiles) {
    words.load_first(weights, role);
    scales.load(p, part, role, tile);
  }
  // While some warps rotate x the others, if there are enough of them, fill the table.
  const int warps = p.cta_slices * p.cta_row_groups;
  const int first_fill = 2 * p.rotate_warps <= warps ? p.rotate_warps : 0;
  TableFill<Decoder> table(part.data + Config::kTableOffset, static_cast<int>(threadIdx.x) - first_fill * kLanes,
                           (warps - first_fill) * kLanes);

  auto* barrier = reinterpret_cast<uint64_t*>(shared + Decoder::kTableBytes);
  auto* inbox = reinterpret_cast<float*>(barrier + 2);
  T* xs = reinterpret_cast<T*>(inbox + p.inbox_floats);
  if (p.cluster > 1) {
    if (threadIdx.x == 0) mbarrier_init(barrier);
    __syncthreads();
    cluster_arrive();
  }
  const RotateRole<T> rotate(p, first_slice, warp, lane);
  table.store(shared);
  wait_for_primary();
  rotate.run(p, xs, lane);
  __syncthreads();
  uint2 x[Config::kTokenTiles][Config::kUnits * kSteps] = {};
#pragma unroll
  for (int t = 0; t < Config::kTokenTiles; ++t) {
    const int row = t * 8 + lane / 4;
    const T* from = xs + row * xs_stride(rotate.chunks) + role.slice * p.units_per_slice * kUnitColumns -
                    rotate.chunk0 * kChunk + lane % 4 * 4;
#pragma unroll
    for (int s = 0; s < Config::kUnits * kSteps; ++s) {
      if (row < p.m && (Config::kRegular ? role.units > 0 : s < role.units * kSteps)) {
        x[t][s] = *reinterpret_cast<const uint2*>(from + s * 16);
      }
    }
  }
  if (p.cluster > 1) cluster_wait();  // the other CTAs have started: their inboxes may be written

  auto* partials = reinterpret_cast<float*>(xs + p.m * xs_stride(rotate.chunks));
  const Reduction reduction{partials, inbox, barrier, rank, cta_tile, tile_stride};
  const uint32_t offset = Decoder::lane_offset(lane);
  const float norm = remaining_norm(p.block);
  uint32_t parity = 0;
  for (int round = 0; round < part.rounds; round += p.batch, parity ^= 1) {
    const int rounds = min(p.batch, part.rounds - round);
    for (int slot = 0; slot < rounds; ++slot, tile += tile_stride, weights += weights_stride) {
      float sum[Config::kTokenTiles][4] = {};
      if (tile < tiles) {
        const bool more = tile + tile_stride < tiles;
        TileScales<Config> next_scales;
        if (more) next_scales.load(p, part, role, tile + tile_stride);
        multiply_tile<Config>(words, weights, more ? weights + weights_stride : nullptr, role, scales, shared, offset,
                              norm, x, sum);
        scales = next_scales;
      }
      float* out = reduction.partials + (slot * warps + warp) * p.m * kPartialStride + lane / 4;
#pragma unroll
      for (int t = 0; t < Config::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = t * 8 + lane % 4 * 2 + i;
          if (token < p.m) {
            out[token * kPartialStride] = sum[t][i];
            out[token * kPartialStride + 8] = sum[t][2 + i];
          }
        }
      }
    }
    Reduction batch = reduction;
    batch.first_tile += round * tile_stride;
    reduce_and_store<T>(p, part, batch, rounds, parity);
    if (round + p.batch < part.rounds) {  // everybody is done with the sums of this batch
      if (p.cluster > 1) {
        cluster_arrive();
        cluster_wait();
      } else {
        __syncthreads();
      }
    }
  }
}

}  // namespace higgs::cuda
