// GEMM for m > 16 with mma.sync, from sm_80 on: y[m, n] = x'[m, k] . (scale * table[index])[n, k]^T (+ bias), x'
// rotated and packed by pack_x. Computed as Y^T = W X^T: the decoded weights are the A operand, in registers, x is B.
//
//   x'       [k / 64][padded m][64 columns] fp16 or bf16: rows of 128 bytes, their 16-byte pieces swizzled, columns in
//            the k order of decode.cuh: what ldmatrix reads without bank conflicts
//   weights  tiled layout (tiled_format.h), straight from global memory to the registers of the warp that decodes them
//   y        [m, n] in x's type, accumulated in fp32
//
// A CTA of 8 warps computes tiles of 256 rows by N tokens. Each warp has two row tiles, so that a fragment of x serves
// twice, and all N tokens. x is copied asynchronously, a unit of 128 columns a stage; what step i + 1 (16 columns)
// takes from shared memory, decoded weights and x, is under way while the MMAs of step i run:
//
//   step i + 1   LDS, LDSM -> a, b [(i + 1) % 2]  |  step i   2 x N / 8 MMAs on a, b [i % 2]
//
// Tiles shared by several CTAs (gemm_schedule.cuh): each writes its sums to the workspace and, at its end, adds up a
// share of the fragments of all of them, in the order of k: the result does not depend on timing.
//
// Scales: RowScales in gemm_weights.cuh. Shared memory: table | stages; on sm_90 stages | ... | table at kTableAddress.
//
// Sizes, and how x and the words of W come: gemm_mma_streams.cuh. Template values: Decoder of instances.h; T = __half,
// __nv_bfloat16; N = tokens of a tile: 32 or 64.
#pragma once

#include "gemm_mma_streams.cuh"
#include "gemm_output.cuh"
#include "gemm_partials.cuh"
#include "gemm_schedule.cuh"
#include "gemm_weights.cuh"

namespace higgs::cuda {

// What a warp multiplies with: the A fragments of its row tiles and the B fragments of all tokens, for one
// step.
template <typename Config>
struct StepFragments {
  uint32_t a[Config::kWarpTiles][4];
  uint32_t b[Config::kN / 16][4];

  // Step `step` of the unit whose words begin at `first_word`.
  __device__ __forceinline__ void decode(const WordStream<Config>& weights, int first_word, int step,
                                         const uint8_t* table, uint32_t offset) {
#pragma unroll
    for (int tile = 0; tile < Config::kWarpTiles; ++tile) {
      uint32_t w[Config::kUnitWords];
#pragma unroll
      for (int i = 0; i < Config::kUnitWords; ++i) w[i] = weights.word(tile, first_word + i);
#if __CUDA_ARCH__ == 900
      typename Config::Decoder(w).fragment(step, SharedWindow<typename Config::T>{}, shared_address(table) + offset,
                                           a[tile]);
#else
      typename Config::Decoder(w).fragment(step, table, offset, a[tile]);
#endif
    }
  }
  // Step `step` of a unit. Lanes 0-15 address the two halves of k of 8 tokens, lanes 16-31 those of the next 8.
  __device__ __forceinline__ void load_x(uint32_t stage, int step, int lane) {
    const uint32_t row = lane / 16 * 8 + lane % 8;
    const uint32_t piece = (2 * (step % kBlockSteps) + lane / 8 % 2) ^ lane % 8;
    stage += step / kBlockSteps * Config::kBlockBytes + row * kRowBytes + piece * 16;
#pragma unroll
    for (int i = 0; i < Config::kN / 16; ++i) load_matrices(stage + i * 16 * kRowBytes, b[i]);
  }
  __device__ __forceinline__ void multiply(float (&acc)[Config::kRegisters]) const {
#pragma unroll
    for (int tile = 0; tile < Config::kWarpTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < Config::kTileFragments; ++i) {
        float* d = acc + tile * Config::kTileRegisters + i * 4;
        mma_m16n8k16<typename Config::T>(reinterpret_cast<float (&)[4]>(*d), a[tile],
                                         {b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]});
      }
    }
  }
};

// One iteration, from k block `block` of a segment that ends before `end`. fragments[0] holds the first step, and
// afterwards that of the next iteration. Returns whether there is one.
template <typename Config>
__device__ __forceinline__ bool multiply_units(const GemmParams& p, WordStream<Config>& weights,
                                               RowScales<Config::kWarpTiles>& scales, XStream<Config>& x,
                                               const uint8_t* table, uint32_t offset, int lane, int& block, int end,
                                               StepFragments<Config> (&fragments)[2],
                                               float (&acc)[Config::kRegisters]) {
  bool more = true;
  unrolled<Config::kIterationUnits * kSteps>([&](auto index) {
    constexpr int kStep = decltype(index)::value;
    constexpr int kUnit = kStep / kSteps;
    constexpr int kNext = kStep % kSteps + 1;
    constexpr bool kLast = kUnit == Config::kIterationUnits - 1;
    constexpr bool kEnds = kLast && kNext == kSteps;
    StepFragments<Config>& next = fragments[kNext % 2];
    if (kStep % kBlockSteps == 0 && block++ == scales.boundary) [[unlikely]]
      scales.next_group(p, acc);
    if (kNext % kBlockSteps == 0) more = block < end;
    const bool ends = kEnds || !more || (kNext == kSteps && kUnit + 1 >= weights.units);
    if (kNext == kSteps && more) x.next(p);  // the fragments of the unit's last step have been loaded
    if (ends) {
      if constexpr (kNext % kBlockSteps == 0 && !kEnds) weights.template consumed<kUnit + kNext / kSteps, true>();
      if (more) {
        weights.next(p);
        next.decode(weights, 0, 0, table, offset);
      }
    } else if constexpr (!kEnds) {
      next.decode(weights, (kStep + 1) / kSteps * Config::kUnitWords, kNext % kSteps, table, offset);
      if constexpr (kNext == kSteps - 1) weights.template consumed<kUnit, kLast>();
    }
    if (more) next.load_x(x.address(), kNext % kSteps, lane);
    fragments[kStep % 2].multiply(acc);
    return !ends;
  });
  return more;
}

template <typename Config>
__device__ __forceinline__ void multiply_tiles(const GemmParams& p, XStream<Config>& x, uint8_t* table, int warp,
                                               int lane) {
  const CtaPlace cta = this_cta();
  WordStream<Config> weights(p, warp, lane);
  const uint32_t offset = Config::Decoder::lane_offset(lane);
  int table_of = -1;
  bool first = true;
  Segment s;
  for (Schedule<Config::kWholeFirst> schedule(p, cta); schedule.next(p, s);) {
    const TilePlace place = place_of<Config>(p, cta, s.tile);
    const GemmPart& part = p.parts[place.part];
    if (place.part != table_of) change_table<Config, Config::kThreads>(part, table, 1 + Config::kWarpgroups);
    table_of = place.part;
    RowScales<Config::kWarpTiles> scales(p, part.data + Config::kScalesOffset,
                                         place.row_tile + warp * Config::kWarpTiles, part.row_tiles, first_block(p, s),
                                         lane);
    scales.begin();
    if (first) {
      wait_for_primary();
      x.begin(p);
    }
    first = false;
    float acc[Config::kRegisters] = {};
    StepFragments<Config> fragments[2];
    weights.look_ahead(p);
    x.look_ahead(p);
    weights.next(p);
    fragments[0].decode(weights, 0, 0, table, offset);
    fragments[0].load_x(x.address(), 0, lane);
    int block = first_block(p, s);
    const int end = last_block(p, s);
#pragma unroll 1
    while (multiply_units<Config>(p, weights, scales, x, table, offset, lane, block, end, fragments, acc)) {
    }
    x.next(p);
    scales.finish(acc);
    if (s.begin > 0 || s.end < p.slices) {
      const int set = partial_set<Config>(p, cta.cluster, s.begin == 0);
      store_partial<Config>(p, set, static_cast<int>(threadIdx.x), acc);
      announce_partial<Config>(p, set, static_cast<int>(threadIdx.x));
      continue;
    }
    const TileOutput<Config> output(p, place, warp, lane);
    float2 bias;
#pragma unroll
    for (int i = 0; i < Config::kRegisters / 4; ++i) {
      if (i % Config::kTileFragments == 0) bias = output.bias(i / Config::kTileFragments);
      output.store(i, {acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]}, bias);
    }
  }
  for (Schedule<Config::kWholeFirst> schedule(p, cta); schedule.next(p, s);) {
    if (s.begin == 0 && s.end == p.slices) continue;
    const Sharing sharing = sharing_of<Config>(p, s.tile);
    add_part<Config>(p, sharing, 0, cta.cluster - sharing.first, sharing.others + 1, static_cast<int>(threadIdx.x),
                     TileOutput<Config>(p, place_of<Config>(p, cta, s.tile), warp, lane));
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) gemm_mma_kernel(const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  launch_dependents();
  if (p.tiles == 0) return;
#if __CUDA_ARCH__ == 900
  if ((shared_address(shared) & 0xffffff) != kSharedBase) __trap();
  uint8_t* table = shared + Config::kTableStart90;
  XStream<Config> x(p, shared);
#else
  uint8_t* table = shared;
  XStream<Config> x(p, shared + Config::Decoder::kTableBytes);
#endif
  // The shuffle gives a value the assembler knows to be uniform.
  multiply_tiles<Config>(p, x, table, __shfl_sync(~0u, threadIdx.x / kLanes, 0), threadIdx.x % kLanes);
}

}  // namespace higgs::cuda
