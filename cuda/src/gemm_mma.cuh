// GEMM for m > 16 with mma.sync, for every architecture from sm_80 on: y[m, n] = x'[m, k] . (scale * table[index])[n,
// k]^T
// (+ bias), x' rotated and packed by pack_x. Computed as Y^T = W X^T: the decoded weights are the A operand, in
// registers, x is B.
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
// Scales: RowScales in gemm_weights.cuh. Shared memory: table | stages.
//
// Template values: Decoder of instances.h; T = __half, __nv_bfloat16; N = tokens of a tile: 32 or 64.
#pragma once

#include "async_copy.cuh"
#include "gemm_partials.cuh"
#include "gemm_schedule.cuh"
#include "gemm_weights.cuh"
#include "numeric.cuh"
#include "rotate_x.cuh"

namespace higgs::cuda {

template <typename Decoder_, typename T_, int N_>
struct MmaConfig : GemmWeights<Decoder_, T_> {
  using Weights = GemmWeights<Decoder_, T_>;
  static constexpr int kN = N_;
  static constexpr bool kRegular = false;
  static constexpr int kClusterSize = 1;
  static constexpr int kRowTiles = kMmaRows / kTileRows;
  static constexpr int kWarpTiles = 2;
  static constexpr int kThreads = kRowTiles / kWarpTiles * kLanes;
  static constexpr int kWarpgroups = kThreads / 128;
  static constexpr int kTileRegisters = N_ / 2;  // of the accumulators, per row tile
  static constexpr int kRegisters = kWarpTiles * kTileRegisters;
  static constexpr int kBlockBytes = N_ * kRowBytes;   // of x, 64 columns
  static constexpr int kStageBytes = 2 * kBlockBytes;  // a unit
  static constexpr int kStages = mma_stages(N_);
  static constexpr int kSharedBytes = Decoder_::kTableBytes + kStages * kStageBytes;
  static_assert(kSharedBytes == kMmaSharedBytes && kBlockBytes % (kThreads * 16) == 0);
  // 16-byte loads in flight per row tile: half a slice where that is two units
  static constexpr int kWindow = Weights::kLoads / (Weights::kUnits == 4 && Weights::kLoads % 8 == 0 ? 2 : 1);
};

// x on its way through a ring of stages in shared memory, a unit each, copied by all threads together.
template <typename Config>
class XStream {
 public:
  __device__ __forceinline__ XStream(const GemmParams& p, uint8_t* shared)
      : stages_(shared_address(shared)), schedule_(p, blockIdx.x) {}
  // The first copies.
  __device__ __forceinline__ void begin(const GemmParams& p) {
#pragma unroll 1
    for (int i = 0; i < Config::kStages; ++i) {
      begin_slice(p);
      copy_unit(p);
      advance();
    }
    wait_for_copies<Config::kStages - 1>();
    __syncthreads();
  }
  // Looks the next segment up if need be: within a slice at most one begins, as those between a CTA's first and its
  // last are whole tiles.
  __device__ __forceinline__ void begin_slice(const GemmParams& p) {
    Segment s;
    if (next_blocks_ > 0 || !schedule_.next(p, s)) return;
    const int begin = s.begin * p.units_per_slice * 2;
    next_blocks_ = min(p.k_blocks, s.end * p.units_per_slice * 2) - begin;
    const TilePlace place = place_of<Config>(p, {static_cast<int>(blockIdx.x), 0}, s.tile);
    next_x_ = static_cast<const uint8_t*>(p.x) + threadIdx.x * 16 +
              (static_cast<long long>(begin) * p.padded_m + place.token) * kRowBytes;
  }
  // The stage to be read.
  __device__ __forceinline__ uint32_t address() const { return stages_ + index_ * Config::kStageBytes; }
  // The stage has been read; the next one may be from here on.
  __device__ __forceinline__ void next(const GemmParams& p) {
    wait_for_copies<Config::kStages - 2>();
    __syncthreads();
    copy_unit(p);
    advance();
  }

 private:
  __device__ __forceinline__ void advance() { index_ = index_ + 1 == Config::kStages ? 0 : index_ + 1; }
  // Copies to the stage at index_.
  __device__ __forceinline__ void copy_unit(const GemmParams& p) {
    if (blocks_ == 0) {
      x_ = next_x_;
      blocks_ = next_blocks_;
      next_blocks_ = 0;
    }
    const uint32_t to = address() + threadIdx.x * 16;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      if (blocks_ == 0) break;
#pragma unroll
      for (int i = 0; i < Config::kBlockBytes; i += Config::kThreads * 16) {
        copy_async(to + block * Config::kBlockBytes + i, x_ + i);
      }
      x_ += static_cast<long long>(p.padded_m) * kRowBytes;
      --blocks_;
    }
    commit_copies();
  }

  uint32_t stages_;
  int index_ = 0;
  Schedule schedule_;
  const uint8_t* x_ = nullptr;  // of the next unit to copy
  int blocks_ = 0;              // of its segment
  const uint8_t* next_x_ = nullptr;
  int next_blocks_ = 0;
};

// What a consumer warp multiplies with: the A fragments of its row tiles and the B fragments of all tokens, for one
// step.
template <typename Config>
struct StepFragments {
  uint32_t a[Config::kWarpTiles][4];
  uint32_t b[Config::kN / 16][4];

  // Step `step` of the unit whose words begin at `first_word`.
  __device__ __forceinline__ void decode(const WeightStream<Config>& weights, int first_word, int step,
                                         const uint8_t* table, uint32_t offset) {
#pragma unroll
    for (int tile = 0; tile < Config::kWarpTiles; ++tile) {
      uint32_t w[Config::kUnitWords];
#pragma unroll
      for (int i = 0; i < Config::kUnitWords; ++i) w[i] = weights.word(tile, first_word + i);
      typename Config::Decoder(w).fragment(step, table, offset, a[tile]);
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
      for (int i = 0; i < Config::kN / 8; ++i) {
        float* d = acc + tile * Config::kTileRegisters + i * 4;
        mma_m16n8k16<typename Config::T>(reinterpret_cast<float (&)[4]>(*d), a[tile],
                                         {b[i / 2][i % 2 * 2], b[i / 2][i % 2 * 2 + 1]});
      }
    }
  }
};

// One slice: `units` units of 128 columns from k block `block` on.
template <typename Config>
__device__ __forceinline__ void multiply_slice(const GemmParams& p, WeightStream<Config>& weights,
                                               RowScales<Config::kWarpTiles>& scales, XStream<Config>& x,
                                               const uint8_t* table, uint32_t offset, int lane, int block, int units,
                                               float (&acc)[Config::kRegisters]) {
  constexpr int kWords = Config::kUnitWords;
  constexpr int kLast = Config::kUnits * kSteps - 1;
  StepFragments<Config> fragments[2];
  weights.begin_slice(p);
  x.begin_slice(p);
  fragments[0].decode(weights, 0, 0, table, offset);
  fragments[0].load_x(x.address(), 0, lane);
  unrolled<kLast + 1>([&](auto index) {
    constexpr int kStep = decltype(index)::value;
    constexpr int kNext = kStep + 1;
    constexpr int kUnit = kStep / kSteps;
    constexpr int kNextUnit = kNext / kSteps;
    if (kStep % kBlockSteps == 0 && block++ == scales.boundary) scales.next_group(p, acc);
    bool more = kStep < kLast;
    if (kNext % kSteps == 0) {
      more = kNextUnit < units;
    } else if (kNext % kBlockSteps == 0) {
      more = block < p.k_blocks;
    }
    if (kNext % kSteps == 0 || !more) x.next(p);  // this step's fragments, the last ones of the stage, have been loaded
    if (more) {
      fragments[kNext % 2].decode(weights, kNextUnit * kWords, kNext % kSteps, table, offset);
      fragments[kNext % 2].load_x(x.address(), kNext % kSteps, lane);
      if constexpr (kNext % kSteps == kSteps - 1) {
        weights.template advance<kUnit * kWords / 4,
                                 kUnit == Config::kUnits - 1 ? Config::kLoads : (kUnit + 1) * kWords / 4>();
      }
    } else if (kStep < kLast) {
      weights.template advance<(kStep + kBlockSteps) / kSteps * kWords / 4, Config::kLoads>();
    }
    fragments[kStep % 2].multiply(acc);
    return more;
  });
}

// Where a warp's part of a tile goes.
template <typename Config>
struct TileOutput {
  const GemmPart& part;
  int m;
  int row_tile;  // the first one of the warp
  int token;
  int lane;

  __device__ __forceinline__ TileOutput(const GemmParams& p, int tile, int warp, int lane)
      : TileOutput(p, place_of<Config>(p, {static_cast<int>(blockIdx.x), 0}, tile), warp, lane) {}

  // Fragment `i` of the accumulators: rows g and g + 8 of a row tile, tokens 2 t and 2 t + 1 of eight.
  __device__ __forceinline__ void store(int i, float4 v) const {
    using T = typename Config::T;
    const int row = (row_tile + i / (Config::kN / 8)) * kTileRows;
    if (row >= part.n) return;
    float2 bias = {};
    if (part.bias != nullptr) {
      const T* b = static_cast<const T*>(part.bias) + row + lane / 4;
      if (row + lane / 4 < part.n) bias.x = to_float(b[0]);
      if (row + lane / 4 + 8 < part.n) bias.y = to_float(b[8]);
    }
    const uint32_t upper = transposed(pack2<T>(v.x + bias.x, v.y + bias.x));  // token g, rows 2 t and 2 t + 1
    const uint32_t lower = transposed(pack2<T>(v.z + bias.y, v.w + bias.y));
    const int to = token + i % (Config::kN / 8) * 8 + lane / 4;
    if (to >= m) return;
    store_pair(row + lane % 4 * 2, to, upper);
    store_pair(row + lane % 4 * 2 + 8, to, lower);
  }

 private:
  __device__ __forceinline__ TileOutput(const GemmParams& p, const TilePlace& place, int warp, int lane)
      : part(p.parts[place.part]),
        m(p.m),
        row_tile(place.row_tile + warp * Config::kWarpTiles),
        token(place.token),
        lane(lane) {}

  __device__ __forceinline__ void store_pair(int row, long long to, uint32_t v) const {
    uint16_t* y = static_cast<uint16_t*>(part.y) + to * part.n + row;
    if (part.n % 2 == 0 && row + 1 < part.n) {
      *reinterpret_cast<uint32_t*>(y) = v;
    } else {
      if (row < part.n) y[0] = static_cast<uint16_t>(v);
      if (row + 1 < part.n) y[1] = static_cast<uint16_t>(v >> 16);
    }
  }
};

// The set of sums of a CTA for a tile: it has at most one that began before it and one that ends after it.
__device__ __forceinline__ int partial_set(const GemmParams& p, int cta, int tile) {
  return 2 * cta + (Schedule::first_slice(p, cta) > tile * p.slices ? 0 : 1);
}

// Adds up this CTA's share of the fragments of a tile that others work on too.
template <typename Config>
__device__ __forceinline__ void add_share(const GemmParams& p, int tile, int warp, int lane) {
  const int warpgroup = warp / 4;
  const int first = Schedule::cluster_of(p, tile * p.slices);
  const int last = Schedule::cluster_of(p, (tile + 1) * p.slices - 1);
  for (int cta = first + static_cast<int>(threadIdx.x % 128); cta <= last; cta += 128) {
    wait_for_partial<Config>(p, partial_set(p, cta, tile), warpgroup);
  }
  named_barrier(1 + warpgroup, 128);
  const TileOutput<Config> output(p, tile, warp, lane);
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.x) - first; i < Config::kRegisters / 4; i += last - first + 1) {
    float4 sum = {};
#pragma unroll 4
    for (int cta = first; cta <= last; ++cta) {
      const float4 v = __ldcg(partial_of<Config>(p, partial_set(p, cta, tile), warpgroup) + i * 128);
      sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
    }
    output.store(i, sum);
  }
}

template <typename Config>
__device__ __forceinline__ void multiply_tiles(const GemmParams& p, XStream<Config>& x, uint8_t* table, int warp,
                                               int lane) {
  const CtaPlace cta{static_cast<int>(blockIdx.x), 0};
  WeightStream<Config> weights(p, cta, warp, lane);
  const uint32_t offset = Config::Decoder::lane_offset(lane);
  int table_of = -1;
  bool first = true;
  Segment s;
  for (Schedule schedule(p, cta.cluster); schedule.next(p, s);) {
    const TilePlace place = place_of<Config>(p, cta, s.tile);
    const GemmPart& part = p.parts[place.part];
    if (place.part != table_of) change_table<Config, Config::kThreads>(part, table, 1 + Config::kWarpgroups);
    table_of = place.part;
    RowScales<Config::kWarpTiles> scales(p, part.data + Config::kScalesOffset,
                                         place.row_tile + warp * Config::kWarpTiles, part.row_tiles,
                                         s.begin * p.units_per_slice * 2, lane);
    if (first) {
      wait_for_primary();
      x.begin(p);
    }
    first = false;
    float acc[Config::kRegisters] = {};
#pragma unroll 1
    for (int slice = s.begin; slice < s.end; ++slice) {
      multiply_slice<Config>(p, weights, scales, x, table, offset, lane, slice * p.units_per_slice * 2,
                             slice == p.slices - 1 ? p.last_units : p.units_per_slice, acc);
    }
    scales.finish(acc);
    if (s.begin > 0 || s.end < p.slices) {
      send_partial<Config>(p, partial_set(p, cta.cluster, s.tile), warp / 4, acc);
      continue;
    }
    const TileOutput<Config> output(p, s.tile, warp, lane);
#pragma unroll
    for (int i = 0; i < Config::kRegisters / 4; ++i) {
      output.store(i, {acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]});
    }
  }
  for (Schedule schedule(p, cta.cluster); schedule.next(p, s);) {
    if (s.begin > 0 || s.end < p.slices) add_share<Config>(p, s.tile, warp, lane);
  }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1) gemm_mma_kernel(const __grid_constant__ GemmParams p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  launch_dependents();
  XStream<Config> x(p, shared + Config::Decoder::kTableBytes);
  // The shuffle gives a value the assembler knows to be uniform.
  multiply_tiles<Config>(p, x, shared, __shfl_sync(~0u, threadIdx.x / kLanes, 0), threadIdx.x % kLanes);
}

}  // namespace higgs::cuda
