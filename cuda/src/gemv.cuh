// Decode kernel: y[m, n] = rotate(x * d)[m, k] . (scale * table[index])[n, k]^T (+ bias), m <= 16, in one launch.
//
//   x        [m, k] fp16 or bf16; multiplied by d and rotated (rotate_x.cuh) by every CTA for its columns, or before
//            (prepare_x.h)
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
// with the next words as soon as it has been consumed or, where x is held, half a slice of them at once. Partial sums
// are reduced every `batch` row blocks. There are four loops (gemv_config.cuh). All are bound by the load unit, which
// spends about a cycle on each 128 bytes of table, x and (twice that) weights:
//
//   held     x fragments of the slice stay in registers: the fewest loads, but a CTA fills a multiprocessor
//   prepared the same of x that a kernel of its own has rotated, while the table is filled here; for m > 8 by half
//            the warps with twice the registers, or slices of half the length
//   paired   x fragments come from shared memory, each for two row tiles: for m > 8, and for small layers, where half
//            a multiprocessor does: the next kernel's CTAs move in beside these, load table, d and first weights, and
//            wait in griddepcontrol.wait for x
//   general  slices that are not full, or several scale groups in one
//
// Halves or bytes. Where a look-up yields four weights (quads) it yields them as bytes in held and paired loops: 128
// weights from 128 bytes of shared memory, which are the A operand of the integer MMA as they are. A row of x then
// takes two columns, the digits of 16-bit integers, and sums within an iteration are exact. Bytes of a sign-symmetric
// grid lack half a step each (kQuadStep): half the sum of x, which comes with the scales of x, is added to a sum.
// Otherwise look-ups yield fp16 or bf16.
//
// Before griddepcontrol.wait, while the previous kernel still runs: loads of table, d and first weights, table fill.
// After it: rotation.
//
// Shared memory: Table::kTableBytes
//   + 16 + 4 * inbox_floats          sums sent by the other CTAs of the cluster
//   + SharedX                        rotated x, unless prepared
//   + batch * warps * m * 4 * kPartialStride   partial sums of a row block
#pragma once

#include "decode.cuh"
#include "gemv_config.cuh"
#include "gemv_operands.cuh"
#include "gemv_params.h"
#include "gemv_reduce.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "rotate_x.cuh"

namespace higgs::cuda {

// The value, which the compiler cannot compute again: it would, from special registers and in the main loop, rather
// than keep it.
__device__ __forceinline__ int kept(int v) { return __shfl_sync(~0u, v, threadIdx.x % kLanes); }

// Which part of x a warp rotates: pieces of a chunk (or all of it) `piece`, + piece_step, ... of rows `row`,
// + row_step, ... Pieces are counted from the first chunk of the CTA's columns.
template <typename T, int kPairs>
struct RotateRole {
  static constexpr int kColumns = Rotation<T, kPairs>::kColumns;
  Rotation<T, kPairs> rotation;
  int chunk0;
  int pieces;  // that the CTA's columns end with
  int piece, piece_step;
  int row, row_step;

  __device__ __forceinline__ RotateRole(const GemvParams& p, int first_slice, int warp, int lane)
      : rotation(p.block, lane) {
    const int begin = first_slice * p.units_per_slice * kUnitColumns;
    const int end = min(p.k, begin + p.cta_slices * p.units_per_slice * kUnitColumns);
    chunk0 = begin / kChunk;
    const int first = (begin - chunk0 * kChunk) / kColumns;
    pieces = max(first, (end - chunk0 * kChunk + kColumns - 1) / kColumns);
    piece_step = max(1, min(pieces - first, static_cast<int>(p.rotate_warps)));
    row = small_divide(warp, piece_step);
    piece = first + warp - row * piece_step;
    row_step = small_divide(p.rotate_warps, piece_step);
    if (row >= row_step || row >= p.m) piece = pieces;  // nothing to do
  }
  // Waits for x. finish(b, row, piece) rotates and stores. One copy of the code: a launch starts with cold instruction
  // caches, every instruction before the main loop counts. kRows (1 or 2) rows at a time: their loads overlap.
  template <int kRows, typename Finish>
  __device__ __forceinline__ void run(const GemvParams& p, int lane, const Finish& finish) const {
#pragma unroll 1
    for (int c = piece; c < pieces; c += piece_step) {
      const int column = chunk0 * kChunk + c * kColumns;
      const bool upper = c % 2 != 0;
      const T* x = static_cast<const T*>(p.x) + column;
#pragma unroll 1
      for (int r = row; r < p.m; r += kRows * row_step) {
        float4 d[8];
        rotation.load_d(p.d + column, p.k - column, upper, lane, d);
        wait_for_primary();
        uint2 raw[kRows][8];
        const bool two = kRows == 2 && r + row_step < p.m;
        rotation.load_x(x + static_cast<long long>(r) * p.k, p.k - column, upper, lane, raw[0]);
        if (two)
          rotation.load_x(x + static_cast<long long>(r + row_step) * p.k, p.k - column, upper, lane, raw[kRows - 1]);
        uint2 b[kRows][2 * kPairs];
        rotation.multiply(raw[0], d, upper, b[0]);
        if (two) rotation.multiply(raw[kRows - 1], d, upper, b[kRows - 1]);
#pragma unroll 1
        for (int i = 0;; ++i) {
          finish(b[0], r + i * row_step, c);
          if (i == kRows - 1 || !two) break;
#pragma unroll
          for (int j = 0; j < 2 * kPairs; ++j) b[0][j] = b[kRows - 1][j];
        }
      }
    }
    wait_for_primary();
  }
};

// One iteration: kUnits units of a row block.
template <typename Config>
__device__ __forceinline__ void multiply(WordWindow<Config>& words, const uint8_t* next, const WarpRole& role,
                                         const TileScales<Config> (&scales)[Config::kTiles],
                                         typename Config::TablePlace table, uint32_t offset, float norm,
                                         const XFragments<Config>& x, BlockSums<Config>& sums) {
  constexpr int kWords = Config::kUnitWords;
  int segment = 0;
  constexpr int kTaken = 4 * Config::kTaken;  // words
  uint32_t taken[Config::kTiles][std::max(1, kTaken)];
#pragma unroll
  for (int u = 0; u < Config::kUnits; ++u) {
    if (!Config::kRegular && u >= role.units) break;
    if constexpr (kTaken > 0) {
      if (u * kWords % kTaken == 0) {
#pragma unroll
        for (int r = 0; r < Config::kTiles; ++r) {
#pragma unroll
          for (int i = 0; i < kTaken; ++i) taken[r][i] = words.word(r, u * kWords + i);
#pragma unroll
          for (int i = 0; i < Config::kTaken; ++i) words.replace(r, u * kWords / 4 + i, next, role);
        }
        __syncwarp();
      }
    }
    uint32_t w[Config::kTiles][kWords];
#pragma unroll
    for (int r = 0; r < Config::kTiles; ++r) {
#pragma unroll
      for (int i = 0; i < kWords; ++i)
        w[r][i] = kTaken > 0 ? taken[r][(u * kWords + i) % kTaken] : words.word(r, u * kWords + i);
    }
    using Decoder = typename Config::Decoder;
    const Decoder decoders[2] = {Decoder(w[0]), Decoder(w[Config::kTiles - 1])};
#pragma unroll
    for (int piece = 0; piece < Config::kPieces; ++piece) {
      uint4 b[Config::kTokenTiles];  // the B fragments of two MMAs
#pragma unroll
      for (int t = 0; t < Config::kTokenTiles; ++t) b[t] = x.of(t, u, piece);
#pragma unroll
      for (int i = 2 * piece; i < 2 * piece + 2; ++i) {
#pragma unroll
        for (int r = 0; r < Config::kTiles; ++r) {
          uint32_t a[4];
          if constexpr (Config::kBytes) {
            decoders[r].byte_fragment(i, table, offset, a);
          } else {
            decoders[r].fragment(i, table, offset, a);
          }
          sums.multiply(i, r, a, b);
        }
      }
      if constexpr (!Config::kRegular) {
        if (piece % 2 == 1 && (role.segment_ends >> (2 * u + piece / 2) & 1) != 0)
          sums.flush(scales, segment++, norm, {}, role.lane);
      }
    }
    if constexpr (kTaken == 0) {
      const int consumed = u == Config::kUnits - 1 ? Config::kLoads : (u + 1) * kWords / 4;
#pragma unroll
      for (int i = u * kWords / 4; i < consumed; ++i) {
#pragma unroll
        for (int r = 0; r < Config::kTiles; ++r) words.replace(r, i, next, role);
      }
    }
    // Keeps loads and look-ups here: left alone, the assembler gathers the loads at the end of the iteration.
    if constexpr (kTaken == 0 || Config::kWide) __syncwarp();
  }
  if constexpr (!Config::kRegular) {  // a shorter slice: the registers of the units it lacks take the next loads too
#pragma unroll
    for (int i = kWords / 4; i < Config::kLoads; ++i) {
      if (role.units < Config::kUnits && i >= role.units * kWords / 4) words.replace(0, i, next, role);
    }
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kMaxThreads, Config::kCtas)
    gemv_kernel(const __grid_constant__ GemvParams p) {
#if __CUDA_ARCH__ != 900
  if constexpr (Config::kPrepared) return;  // not planned for
#endif
  using T = typename Config::T;
  using Table = typename Config::Table;
  extern __shared__ __align__(1024) uint8_t shared[];
  launch_dependents();
  if (Config::kPrepared && (shared_address(shared) & 0xffffff) != kSharedBase) __trap();
  const int lane = Config::kPrepared ? kept(threadIdx.x % 32) : threadIdx.x % 32;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same for all lanes, as the compiler should know
  const uint32_t rank = p.cluster > 1 ? cluster_rank() : 0;
  const int cluster_index = p.cluster > 1 ? small_divide(blockIdx.x, p.cluster) : blockIdx.x;
  int which = 0;
  if (p.part_count > 1) {  // most launches need not wait for the constants of the other parts
    while (which + 1 < p.part_count && cluster_index >= p.parts[which + 1].first_cluster) ++which;
  }
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
  blocks.count = role.units > 0 ? part.rounds - (row_block + (part.rounds - 1) * stride >= all_blocks ? 1 : 0) : 0;
  blocks.odd = row_tiles % 2 != 0 && row_block + (blocks.count - 1) * stride == all_blocks - 1;

  const uint8_t* first = part.data + static_cast<long long>(part.weights_offset) * kTiledAlignment +
                         role.slice * p.slice_bytes + static_cast<long long>(row_block) * Config::kTiles * p.tile_bytes;
  const int iterations = Config::kPaired ? p.iterations : 1;
  WordWindow<Config> words = {};
  words.left = blocks.count * iterations - 1;
  words.to_second = blocks.second(0) * p.tile_bytes;
  if constexpr (Config::kHeld) words.step = kept(static_cast<int>(part.to_next_block / (16 * kLanes)) + Config::kLoads);
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
  TableFill<Table> table(part.data + Config::kTableOffset, static_cast<int>(threadIdx.x) - first_fill * kLanes,
                         (warps - first_fill) * kLanes);

  auto* barrier = reinterpret_cast<uint64_t*>(shared + Table::kTableBytes);
  auto* inbox = reinterpret_cast<float4*>(barrier + 2);
  float* partials = reinterpret_cast<float*>(inbox) + p.inbox_floats;
  const SharedX<Config> xs(partials, p.m, p.chunks);
  if (p.cluster > 1) {
    if (threadIdx.x == 0) mbarrier_init(barrier);
    __syncthreads();
    cluster_arrive();
  }
  const auto meet = [&] {
    __syncthreads();
    if (p.cluster > 1) cluster_wait();  // the other CTAs have started: their inboxes may be written
  };
  XFragments<Config> x;
  XScales<Config> x_scales = {};
  // Of the warp, in the CTA's x. Set in the branches: set here, other registers cost held loops of 3 bits up to 10 %.
  int first_column;
  if constexpr (Config::kPrepared) {
    table.store(shared);
    // Of one or two rounds most is on its way already, and the prefetch only delays others.
    if constexpr (Config::kPrefetchesRest) {
      if (part.rounds > 2 && words.left > 0) words.prefetch_ahead(lane);
    }
    first_column = role.slice * p.units_per_slice * kUnitColumns;
  } else {
    const RotateRole<T, 2> rotate(p, first_slice, warp, lane);
    table.store(shared);
    // The second of two iterations, which no register has room for: memory idles until x is there. Where more follow,
    // their loads are under way as soon, and the prefetch only delays others.
    if constexpr (Config::kPaired && Config::kTokens * Config::kTokenTiles <= 8) {
      if (words.left == 1) words.prefetch_next(part, iterations, lane);
    }
    if constexpr (Config::kPrefetchesRest) {
      if (words.left >= 0) words.prefetch_rest(lane);
    }
    rotate.template run<Config::kRotatedRows>(
        p, lane, [&](const uint2(&b)[4], int r, int c) { xs.store(rotate.rotation, b, r, c, lane); });
    meet();
    first_column = role.slice * p.units_per_slice * kUnitColumns - rotate.chunk0 * kChunk;
#pragma unroll
    for (int t = 0; t < Config::kTokenTiles; ++t) {
      // Rows beyond m: the sums of any other row do.
      const int last = p.m * Config::kDigits - 1;
      x.needed[t] = t * 8 + lane / 4 <= last;
      const uint8_t* row = xs.row(min(t * 8 + lane / 4, last));
      x.from[t] = row + first_column * (2 / Config::kDigits) + lane % 4 * 16;
    }
    if (role.units > 0) {
      x.hold();
      if constexpr (Config::kHoldsScales) x_scales = xs.scales_of(first_column, p.m, lane);
    }
    partials = reinterpret_cast<float*>(xs.end(p.m));
  }
  const auto take_prepared_x = [&] {
    wait_for_primary();
    const PreparedX<Config> prepared(p);
    if (role.units > 0) {
      x.hold(prepared, role.slice, lane);
      x_scales = prepared.scales_of(first_column, lane);
    }
    meet();
  };
  const Reduction reduction{reinterpret_cast<float4*>(partials), inbox, barrier, first_block};
  uint32_t offset = Config::kBytes ? lane * 4 : Config::Decoder::lane_offset(lane);
  if constexpr (Config::kPrepared) offset = kept(shared_address(shared) - kSharedBase + offset);
  const uint32_t step = p.m * Config::kPartialStride * sizeof(float);  // from a warp's sums to the next one's
  uint32_t first_sum = 0;
  if constexpr (Config::kPrepared)
    first_sum = kept(shared_address(partials + BlockSums<Config>::place(0, 0, lane)) + warp * step);
  // Prepared: before x is there the first reduction is rehearsed, on anything, which brings its instructions into the
  // caches.
  uint32_t parity = Config::kPrepared ? 1 : 0;
  for (int round = Config::kPrepared ? -p.batch : 0; round < part.rounds; round += p.batch, parity ^= 1) {
    const bool rehearsal = Config::kPrepared && round < 0;
    const int rounds = min(p.batch, part.rounds - (rehearsal ? 0 : round));
    for (int slot = rehearsal ? rounds : 0; slot < rounds; ++slot) {
      BlockSums<Config> sums;
      if (round + slot < blocks.count) {
        TileScales<Config> current[Config::kTiles];
        if constexpr (Config::kEarlyScales) {
          current[0] = scales[0];
          if (round + slot + 1 < blocks.count) load_scales(round + slot + 1);
        } else if (round + slot > 0) {
          load_scales(round + slot);  // they are needed last
        }
#pragma unroll 1
        for (int i = 0; i < iterations; ++i) {
          const uint8_t* next = words.next(part, iterations);
          multiply<Config>(words, next, role, scales, typename Config::TablePlace(shared), offset, p.norm, x, sums);
          words.advance(next, blocks, iterations);
          x.move(1);
          if constexpr (Config::kBytes) {
            const int column = first_column + i * Config::kUnits * kUnitColumns;
            if constexpr (!Config::kHoldsScales) x_scales = xs.scales_of(column, p.m, lane);
            sums.flush(Config::kEarlyScales ? current : scales, 0, p.norm, x_scales, lane);
          }
        }
        x.move(-iterations);
        if constexpr (Config::kRegular && !Config::kBytes)
          sums.flush(Config::kEarlyScales ? current : scales, 0, p.norm, {}, lane);
      }
      if constexpr (Config::kPrepared) {
        const uint32_t to = first_sum + slot * warps * step;
        sums.write(p.m, lane, [&](int t, int i, int offset, float v) {
          store_shared(to + ((t * Config::kTokens + i) * Config::kPartialStride + offset) * sizeof(float), v);
        });
      } else {
        float* to = partials + (slot * warps + warp) * p.m * Config::kPartialStride;
        sums.write(p.m, lane,
                   [&](int t, int i, int offset, float v) { to[BlockSums<Config>::place(t, i, lane) + offset] = v; });
      }
    }
    reduce_batch<Config>(p, part, reduction, round, rounds, stride, parity);
    if constexpr (Config::kPrepared) {
      if (rehearsal) take_prepared_x();
    }
  }
}

}  // namespace higgs::cuda
