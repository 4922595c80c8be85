// Decode kernel: y[m, n] = rotate(x * d)[m, k] . (scale * table[index])[n, k]^T (+ bias), m <= 16, in one launch.
//
//   x        [m, k] fp16 or bf16; multiplied by d and rotated (rotate_x.cuh) by every CTA for its columns
//   weights  tiled layout (tiled_format.h); table and scales from the same buffer
//   y        [m, n] in x's type, accumulated in fp32
//
// Partition. A CTA has cta_slices x cta_row_groups warps. A warp owns one slice of k and every
// (clusters * cta_row_groups)-th row block, of kTiles row tiles of 16 rows:
//
//                  slice 0   slice 1   ...              the CTAs of a cluster continue along k
//   row block 0    warp 0    warp 1    ...              partial sums of one row block meet in shared memory, slice by
//   row block 1    warp S    warp S+1  ...              slice and CTA by CTA: a fixed order
//
// The main loop has no barrier: weights go from global memory to registers in 16-byte loads, a register being reloaded
// with the next words as soon as it has been consumed. Partial sums are reduced every `batch` row blocks. There are
// three loops (gemv_config.cuh). All are bound by the load unit, which spends about a cycle on each 128 bytes of table,
// x and (twice that) weights:
//
//   held     x fragments of the slice stay in registers: the fewest loads, but a CTA fills a multiprocessor
//   paired   x fragments come from shared memory, each for two row tiles: for m > 8, and for small layers, as half a
//            multiprocessor does: the next kernel's CTAs move in beside these, load table, d and first weights, and
//            wait in griddepcontrol.wait for x
//   general  slices that are not full, or several scale groups in one
//
// Before griddepcontrol.wait, while the previous kernel still runs: loads of table, d and first weights, table fill.
// After it: rotation.
//
// Shared memory: Decoder::kTableBytes
//   + 16 + 4 * inbox_floats          sums sent by the other CTAs of the cluster
//   + m * xs_stride(chunks) * 2      rotated x
//   + batch * warps * m * 4 * kPartialStride   partial sums of a row block
#pragma once

#include "decode.cuh"
#include "gemv_config.cuh"
#include "gemv_params.h"
#include "gemv_reduce.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "rotate_x.cuh"

namespace higgs::cuda {

// What a warp works on, the same for all its row blocks.
struct WarpRole {
  int lane = 0;
  int slice = 0;
  int units = 0;              // 0: this warp has no columns
  int loads = 0;              // 16-byte loads of the slice and row tile
  int first_group = 0;        // scale group of the slice's first column
  int segments = 0;           // scale groups the slice touches
  uint32_t segment_ends = 0;  // bit h: a scale group (or the slice) ends after half unit h
};

template <typename Config>
__device__ __forceinline__ WarpRole make_role(const GemvParams& p, int slice, int lane) {
  WarpRole role;
  role.lane = lane;
  role.slice = slice;
  if (slice >= p.slices) return role;
  role.units = slice == p.slices - 1 ? p.last_units : p.units_per_slice;
  role.loads = (role.units * Config::kUnitWords + 3) / 4;
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

// The row blocks of a warp. Where a row block has no second row tile the first is read twice; those sums are not
// stored.
struct RowBlocks {
  int count;  // 0 if the warp has no columns
  bool odd;   // the last one has no second row tile

  // Distance of the second row tile of row block `i` of the warp.
  __device__ __forceinline__ int second(int i) const { return odd && i == count - 1 ? 0 : 1; }
};

// Scales of a row tile for one slice. Regular: those of rows g and g + 8. Otherwise lane l holds values 4 l .. 4 l + 3
// of [segment][16 rows], to be handed out by shuffles.
template <typename Config>
struct TileScales {
  uint2 raw = {};

  static __device__ __forceinline__ int first(int lane) { return Config::kRegular ? lane / 4 : lane * 4; }
  // s: value first(lane) of the slice's first scale group.
  __device__ __forceinline__ void load(const uint16_t* s, const WarpRole& role) {
    if constexpr (Config::kRegular) {
      raw.x = __ldg(s);
      raw.y = __ldg(s + 8);
    } else if (role.lane * 4 < role.segments * kTileRows) {
      raw = __ldg(reinterpret_cast<const uint2*>(s));
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

// The next kWindow 16-byte loads of each row tile, in registers: load i of an iteration lives in q[i % kWindow], and is
// replaced as soon as it has been consumed.
template <typename Config>
struct WordWindow {
  uint4 q[Config::kTiles][Config::kWindow];
  const uint8_t* at;  // this lane's words of the iteration, first row tile
  int to_second;      // bytes from the first row tile of the next iteration's row block to the second
  int left;           // iterations after this one
  int iteration;      // within the row block

  // Load i of the iteration at `from`.
  __device__ __forceinline__ void load(int r, int i, const uint8_t* from, const WarpRole& role) {
    if (Config::kRegular || i < role.loads) {
      q[r][i % Config::kWindow] =
          load_streaming(reinterpret_cast<const uint4*>(from + (r == 0 ? 0 : to_second)) + i * kLanes);
    }
  }
  // Load i has been consumed.
  __device__ __forceinline__ void replace(int r, int i, const uint8_t* next, const WarpRole& role) {
    const int ahead = i + Config::kWindow;
    if (ahead < Config::kLoads) {
      load(r, ahead, at, role);
    } else if (left > 0) {
      load(r, ahead - Config::kLoads, next, role);
    }
  }
  __device__ __forceinline__ const uint8_t* next(const GemvPart& part, int iterations) const {
    const uint8_t* end = at + Config::kLoads * 16 * kLanes;
    return iteration + 1 == iterations ? end + part.to_next_block : end;
  }
  __device__ __forceinline__ void advance(const uint8_t* next, const RowBlocks& blocks, int iterations) {
    at = next;
    --left;
    if (++iteration == iterations) iteration = 0;
    if (blocks.odd && left == iterations) to_second = 0;
  }
  __device__ __forceinline__ uint32_t word(int r, int i) const {
    const uint4& v = q[r][i / 4 % Config::kWindow];
    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
  }
};

// The B fragments of two steps each: of a whole slice in registers, or from shared memory as they are needed.
template <typename Config>
struct XFragments {
  static constexpr int kCount = Config::kHeld ? Config::kUnits * kSteps / 2 : 1;
  const typename Config::T* from[Config::kTokenTiles];  // the lane's first fragment of the iteration
  uint4 held[kCount];

  __device__ __forceinline__ void hold() {
    if constexpr (Config::kHeld) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) held[i] = *reinterpret_cast<const uint4*>(from[0] + i * 32);
    }
  }
  __device__ __forceinline__ uint4 of(int tile, int unit, int pair) const {
    if constexpr (Config::kHeld) return held[unit * (kSteps / 2) + pair];
    return *reinterpret_cast<const uint4*>(from[tile] + unit * kUnitColumns + pair * 32);
  }
  __device__ __forceinline__ void move(int iterations) {
#pragma unroll
    for (int t = 0; t < Config::kTokenTiles; ++t) from[t] += iterations * Config::kUnits * kUnitColumns;
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
  // Waits for x. One copy of the code: a launch starts with cold instruction caches, every instruction before the main
  // loop counts.
  __device__ __forceinline__ void run(const GemvParams& p, T* xs, int lane) const {
    run(p, lane, [&](const uint2(&raw)[8], const float4(&d)[8], int r, int c) {
      rotation.rotate(raw, d, xs + r * xs_stride(p.chunks) + c * kChunk, lane);
    });
  }
  // finish(raw, d, row, chunk) rotates and stores.
  template <typename Finish>
  __device__ __forceinline__ void run(const GemvParams& p, int lane, const Finish& finish) const {
    int c = chunk;
    int r = row;
#pragma unroll 1
    while (c < chunks) {
      const int column = (chunk0 + c) * kChunk;
      const int count = p.k - column;
      float4 d[8];
      rotation.load_d(p.d + column, count, lane, d);
      wait_for_primary();
      uint2 raw[8];
      rotation.load_x(static_cast<const T*>(p.x) + static_cast<long long>(r) * p.k + column, count, lane, raw);
      finish(raw, d, r, c);
      r += row_step;
      if (r >= p.m) {
        r = row;
        c += chunk_step;
      }
    }
    wait_for_primary();
  }
};

// Sums of a row block, before and after multiplication with the scales.
template <typename Config>
struct BlockSums {
  // Two independent accumulators at least hide the latency of the MMA.
  static constexpr int kChains = Config::kTiles * Config::kTokenTiles == 1 ? 2 : 1;
  float acc[kChains][Config::kTiles][Config::kTokenTiles][4] = {};
  float sum[Config::kTiles][Config::kTokenTiles][4] = {};

  // A scale group ends.
  __device__ __forceinline__ void flush(const TileScales<Config> (&scales)[Config::kTiles], int segment, float norm,
                                        int lane) {
#pragma unroll
    for (int r = 0; r < Config::kTiles; ++r) {
      float2 s = scales[r].rows(segment, lane);
      s.x *= norm;
      s.y *= norm;
#pragma unroll
      for (int t = 0; t < Config::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float value = kChains == 2 ? acc[0][r][t][i] + acc[kChains - 1][r][t][i] : acc[0][r][t][i];
          sum[r][t][i] = fmaf(value, i < 2 ? s.x : s.y, sum[r][t][i]);
#pragma unroll
          for (int c = 0; c < kChains; ++c) acc[c][r][t][i] = 0;
        }
      }
    }
  }
};

// One iteration: kUnits units of a row block.
template <typename Config>
__device__ __forceinline__ void multiply(WordWindow<Config>& words, const uint8_t* next, const WarpRole& role,
                                         const TileScales<Config> (&scales)[Config::kTiles], const uint8_t* table,
                                         uint32_t offset, float norm, const XFragments<Config>& x,
                                         BlockSums<Config>& sums) {
  constexpr int kWords = Config::kUnitWords;
  int segment = 0;
#pragma unroll
  for (int u = 0; u < Config::kUnits; ++u) {
    if (!Config::kRegular && u >= role.units) break;
    uint32_t w[Config::kTiles][kWords];
#pragma unroll
    for (int r = 0; r < Config::kTiles; ++r) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) w[r][i] = words.word(r, u * kWords + i);
    }
    using Decoder = typename Config::Decoder;
    const Decoder decoders[2] = {Decoder(w[0]), Decoder(w[Config::kTiles - 1])};
#pragma unroll
    for (int pair = 0; pair < kSteps / 2; ++pair) {
      uint4 b[Config::kTokenTiles];  // the B fragments of two steps
#pragma unroll
      for (int t = 0; t < Config::kTokenTiles; ++t) {
        b[t] = x.of(t, u, pair);
      }
#pragma unroll
      for (int step = 2 * pair; step < 2 * pair + 2; ++step) {
#pragma unroll
        for (int r = 0; r < Config::kTiles; ++r) {
          uint32_t a[4];
          decoders[r].fragment(step, table, offset, a);
#pragma unroll
          for (int t = 0; t < Config::kTokenTiles; ++t) {
            mma_m16n8k16<typename Config::T>(sums.acc[step % sums.kChains][r][t], a,
                                             step % 2 == 0 ? make_uint2(b[t].x, b[t].y) : make_uint2(b[t].z, b[t].w));
          }
        }
      }
      if constexpr (!Config::kRegular) {
        if (pair % 2 == 1 && (role.segment_ends >> (2 * u + pair / 2) & 1) != 0)
          sums.flush(scales, segment++, norm, role.lane);
      }
    }
    const int consumed = u == Config::kUnits - 1 ? Config::kLoads : (u + 1) * kWords / 4;
#pragma unroll
    for (int i = u * kWords / 4; i < consumed; ++i) {
#pragma unroll
      for (int r = 0; r < Config::kTiles; ++r) words.replace(r, i, next, role);
    }
    __syncwarp();  // keeps the loads here: left alone, the assembler gathers them at the end of the iteration
  }
  if constexpr (!Config::kRegular) {  // a shorter slice: the registers of the units it lacks take the next loads too
#pragma unroll
    for (int i = kWords / 4; i < Config::kLoads; ++i) {
      if (role.units < Config::kUnits && i >= role.units * kWords / 4) words.replace(0, i, next, role);
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kMaxThreads, 512 / Config::kMaxThreads)
    gemv_kernel(const __grid_constant__ GemvParams p) {
  using T = typename Config::T;
  using Decoder = typename Config::Decoder;
  extern __shared__ __align__(1024) uint8_t shared[];
  launch_dependents();
  const int lane = threadIdx.x % 32;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same for all lanes, as the compiler should know
  const uint32_t rank = p.cluster > 1 ? cluster_rank() : 0;
  const int cluster_index = p.cluster > 1 ? small_divide(blockIdx.x, p.cluster) : blockIdx.x;
  int which = 0;
  while (which + 1 < p.part_count && cluster_index >= p.parts[which + 1].first_cluster) ++which;
  const GemvPart& part = p.parts[which];

  const int first_slice = p.first_slice + rank * p.cta_slices;
  const int row_group = small_divide(warp, p.cta_slices);
  const int cta_slice = warp - row_group * p.cta_slices;
  const WarpRole role = make_role<Config>(p, first_slice + cta_slice, lane);
  const int row_tiles = (part.n + kTileRows - 1) / kTileRows;
  const int first_block = (cluster_index - part.first_cluster) * p.cta_row_groups;
  const int all_blocks = (row_tiles + Config::kTiles - 1) / Config::kTiles;
  if (first_block >= all_blocks) {  // a cluster without work keeps its place, so that those of the next kernel spread
    wait_for_primary();
    return;
  }
  const int stride = part.clusters * p.cta_row_groups;
  const int row_block = first_block + row_group;
  RowBlocks blocks;
  blocks.count = role.units > 0 ? max(0, all_blocks - row_block + stride - 1) / stride : 0;
  blocks.odd = row_tiles % 2 != 0 && row_block + (blocks.count - 1) * stride == all_blocks - 1;

  WordWindow<Config> words = {};
  const int iterations = Config::kPaired ? p.iterations : 1;
  words.left = blocks.count * iterations - 1;
  words.to_second = blocks.second(0) * p.tile_bytes;
  const uint8_t* first = part.data + static_cast<long long>(part.weights_offset) * kTiledAlignment +
                         role.slice * p.slice_bytes + static_cast<long long>(row_block) * Config::kTiles * p.tile_bytes;
  words.at = first + lane * 16;
  TileScales<Config> scales[Config::kTiles];
  const auto* scale =
      reinterpret_cast<const uint16_t*>(part.data + Config::kScalesOffset) +
      (static_cast<long long>(row_block) * Config::kTiles * p.row_groups_of_scales + role.first_group) * kTileRows +
      TileScales<Config>::first(lane);
  const auto load_scales = [&](int i) {
#pragma unroll
    for (int r = 0; r < Config::kTiles; ++r) {
      scales[r].load(scale + (r == 0 ? 0 : blocks.second(i) * p.row_groups_of_scales * kTileRows), role);
    }
    scale += part.scales_step;
  };
  if (blocks.count > 0) {
#pragma unroll
    for (int i = 0; i < Config::kWindow; ++i) {
#pragma unroll
      for (int r = 0; r < Config::kTiles; ++r) words.load(r, i, words.at, role);
    }
  }
  if (blocks.odd && words.left <= iterations) words.to_second = 0;
  if (blocks.count > 0) load_scales(0);
  const int warps = p.cta_slices * p.cta_row_groups;
  // While some warps rotate x the others, if there are enough of them, fill the table.
  const int first_fill = 2 * p.rotate_warps <= warps ? p.rotate_warps : 0;
  TableFill<Decoder> table(part.data + Config::kTableOffset, static_cast<int>(threadIdx.x) - first_fill * kLanes,
                           (warps - first_fill) * kLanes);

  auto* barrier = reinterpret_cast<uint64_t*>(shared + Decoder::kTableBytes);
  auto* inbox = reinterpret_cast<float4*>(barrier + 2);
  T* xs = reinterpret_cast<T*>(reinterpret_cast<float*>(inbox) + p.inbox_floats);
  if (p.cluster > 1) {
    if (threadIdx.x == 0) mbarrier_init(barrier);
    __syncthreads();
    cluster_arrive();
  }
  const RotateRole<T> rotate(p, first_slice, warp, lane);
  table.store(shared);
  rotate.run(p, xs, lane);
  __syncthreads();
  if (p.cluster > 1) cluster_wait();  // the other CTAs have started: their inboxes may be written

  XFragments<Config> x;
#pragma unroll
  for (int t = 0; t < Config::kTokenTiles; ++t) {
    // Rows beyond m: the sums of any other row do.
    x.from[t] = xs + min(t * 8 + lane / 4, p.m - 1) * xs_stride(p.chunks) +
                role.slice * p.units_per_slice * kUnitColumns - rotate.chunk0 * kChunk + lane % 4 * 8;
  }
  if (role.units > 0) x.hold();
  auto* partials = reinterpret_cast<float*>(xs + p.m * xs_stride(p.chunks));
  const Reduction reduction{reinterpret_cast<float4*>(partials), inbox, barrier, first_block};
  const uint32_t offset = Decoder::lane_offset(lane);
  uint32_t parity = 0;
  for (int round = 0; round < part.rounds; round += p.batch, parity ^= 1) {
    const int rounds = min(p.batch, part.rounds - round);
    for (int slot = 0; slot < rounds; ++slot) {
      BlockSums<Config> sums;
      if (round + slot < blocks.count) {
        if (round + slot > 0) load_scales(round + slot);  // they are needed last
#pragma unroll 1
        for (int i = 0; i < iterations; ++i) {
          const uint8_t* next = words.next(part, iterations);
          multiply<Config>(words, next, role, scales, shared, offset, p.norm, x, sums);
          words.advance(next, blocks, iterations);
          x.move(1);
        }
        x.move(-iterations);
        if constexpr (Config::kRegular) sums.flush(scales, 0, p.norm, lane);
      }
      float* out = partials + (slot * warps + warp) * p.m * Config::kPartialStride + lane / 4;
#pragma unroll
      for (int t = 0; t < Config::kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = t * 8 + lane % 4 * 2 + i;
          if (token >= p.m) continue;
#pragma unroll
          for (int r = 0; r < Config::kTiles; ++r) {
            out[token * Config::kPartialStride + r * kTileRows] = sums.sum[r][t][i];
            out[token * Config::kPartialStride + r * kTileRows + 8] = sums.sum[r][t][2 + i];
          }
        }
      }
    }
    reduce_batch<Config>(p, part, reduction, round, rounds, stride, parity);
  }
}

}  // namespace higgs::cuda
