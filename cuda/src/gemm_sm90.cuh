// GEMM for m > 16 on sm_90a: y[m, n] = x'[m, k] . (scale * table[index])[n, k]^T (+ bias), x' rotated and packed by
// pack_x. Computed as Y^T = W X^T: the decoded weights are the register operand A of wgmma, x is B in shared memory.
//
//   x'       [k / 64][padded m][64 columns] fp16 or bf16: B tiles as the tensor core wants them (rows of 128 bytes,
//            swizzled; columns in the k order of decode.cuh), so that a tile is one contiguous bulk copy
//   weights  tiled layout (tiled_format.h), piece by piece through slots of shared memory: a bulk copy a row tile
//   y        [m, n] in x's type, accumulated in fp32
//
// Roles. A CTA computes tiles of 64 * kWarpgroups rows (a cluster: as many times that) by N tokens. One warp copies x,
// the other three of its warpgroup the weights. Each warp of a consumer warpgroup decodes its 16 rows x 64 columns (one
// k block) into A fragments while the wgmmas of the block before run:
//
//   decode block i + 1   LDS -> registers  |  wgmma block i (asynchronous)
//
// Scales. A change of scale group rescales the accumulators by the ratio of the scales: the tensor core adds up plain
// grid points, and no second set of accumulators is needed. A scale of 0 counts as kLeastScale in between.
//
// Clusters. The CTAs of a cluster take the row blocks of a tile that follow each other, and share the copies of x
// (multicast): x comes from the L2 once per cluster. Or, where tiles are few, they take parts of the k of one tile each
// (GemmPlan::k_split_log), and add up their sums as gemm_cluster.cuh says.
//
// Integers. For few rows of x, looked-up bytes may be the A operand as they are (GemmPlan::bytes): four weights of a
// quad, or sums of the entries of two windows of a trellis (trellis.cuh). A row of x is two
// of B, the digits of 16-bit integers; their sums over the columns that share a scale are exact.
//
// Epilogue. y goes to shared memory, and from there by the copy engine while the next tile is multiplied; sums of
// others come through the stages of x. The next segment's scales are on their way by then.
//
// Schedule: gemm_schedule.cuh. Shared memory and registers: GemmConfig in gemm_config.cuh.
//
// Template values: Decoder of instances.h; T = __half, __nv_bfloat16; N = tokens of a tile: 16, 32, 64, 128 or 256.
#pragma once

#include <type_traits>

#include "gemm_cluster.cuh"
#include "gemm_config.cuh"
#include "gemm_epilogue.cuh"
#include "gemm_schedule.cuh"
#include "gemm_weights.cuh"
#include "gemm_words.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace higgs::cuda {

// The stages of x in shared memory.
template <typename Config>
struct Stages {
  uint8_t* shared;
  uint64_t* full;
  uint64_t* empty;
  int index = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ explicit Stages(uint8_t* shared)
      : shared(shared),
        full(reinterpret_cast<uint64_t*>(shared + Config::kBarriersStart)),
        empty(full + Config::kStages) {}
  __device__ __forceinline__ uint8_t* stage() const {
    return shared + index * Config::kStageBytes + (index < Config::kStagesBefore ? 0 : Config::kStagesGap);
  }
  // Where a warpgroup's part of y goes.
  __device__ __forceinline__ uint8_t* output(int warpgroup) const {
    if constexpr (Config::kOutputInStages) {
      const int stage = output_stage(warpgroup);
      return shared + stage * Config::kStageBytes + (stage < Config::kStagesBefore ? 0 : Config::kStagesGap);
    } else {
      return shared + Config::kStagingStart + warpgroup * Config::kOutputBytes;
    }
  }
  __device__ __forceinline__ void advance() {
    if (++index == Config::kStages) index = 0, phase ^= 1;
  }
  __device__ __forceinline__ int previous() const { return (index == 0 ? Config::kStages : index) - 1; }
  // Called by every lane of a warp. All CTAs of the cluster write to this one's stages.
  __device__ __forceinline__ void release_previous(int lane) const { release(previous(), lane); }
  __device__ __forceinline__ void release(int stage, int lane) const {
    if (lane < Config::kClusterSize) {
      barrier_arrive<Config::kClusterSize, Config::kWarpArrivals>(empty + stage, lane);
    }
  }
  // The same, behind loads of the lanes from there: `zero` is 0, computed from what they loaded (see
  // WordReader::release_unit).
  __device__ __forceinline__ void release_previous_read(uint32_t zero) const {
    static_assert(Config::kLanesRead);
    barrier_arrive<1>(empty + previous() + zero, 0);
  }

  // Where the output is in stages, the last two of a tile are given back later: the one that this warpgroup does not
  // write to when both have read them, its own when y has been copied from there.
  static __device__ __forceinline__ int output_stage(int warpgroup) {
    return Config::kStages - Config::kWarpgroups + warpgroup;
  }
  __device__ __forceinline__ void release_output(int warpgroup, int lane) const {
    if (threadIdx.x / kLanes % 4 != 0) return;
    copies_wait_read();
    __syncwarp();
    if (lane < Config::kClusterSize) barrier_arrive<Config::kClusterSize, 4>(empty + output_stage(warpgroup), lane);
  }
};

// The sums of those who share a tile, after its x.
template <typename Config>
__device__ __forceinline__ void produce_sums(const GemmParams& p, const CtaPlace& cta, int others,
                                             Stages<Config>& stages) {
#pragma unroll 1
  for (int cluster = cta.cluster + 1; cluster <= cta.cluster + others; ++cluster) {
    const int set = partial_set<Config>(p, cluster * Config::kClusterSize + cta.rank, false);
    for (int i = 0; i < Config::kWarpgroups; ++i) wait_for_partial<Config>(p, set, i);
    copies_fence_global();
    const auto* from = reinterpret_cast<const uint8_t*>(partials_of<Config>(p, set));
    constexpr int kBytes = Config::kStageSums * Config::kConsumers * 16;
#pragma unroll 1
    for (int i = 0; i < Config::kRegisters / 4; i += Config::kStageSums, from += kBytes) {
      uint64_t* full = stages.full + stages.index;
      barrier_wait(stages.empty + stages.index, stages.phase ^ 1);
      mbarrier_expect(full, kBytes);
      copy_bulk<1>(stages.stage(), from, kBytes, full);
      stages.advance();
    }
  }
}
template <typename Config>
__device__ __forceinline__ void add_sums(const GemmParams& p, int others, Stages<Config>& stages,
                                         float (&acc)[Config::kRegisters]) {
  constexpr int kPieces = Config::kRegisters / 4 / Config::kStageSums;
  const int lane = threadIdx.x % kLanes;
#pragma unroll 1
  for (int left = others; left > 0; --left) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      barrier_wait(stages.full + stages.index, stages.phase);
      const auto* from = reinterpret_cast<const float4*>(stages.stage()) + threadIdx.x;
      uint32_t read = 0;
#pragma unroll
      for (int j = 0; j < Config::kStageSums; ++j) {
        const float4 v = from[j * kPartialStride<Config>];
        float* to = acc + 4 * (i * Config::kStageSums + j);
        to[0] += v.x;
        to[1] += v.y;
        to[2] += v.z;
        to[3] += v.w;
        read ^= __float_as_uint(v.x);
      }
      stages.advance();
      if constexpr (Config::kLanesRead) {
        stages.release_previous_read(read & p.zero);
      } else {
        named_barrier(1 + threadIdx.x / 128 + (read & p.zero), 128);
        // The output takes the place of the last ones.
        if (!Config::kOutputInStages || left > 1 || i < kPieces - Config::kWarpgroups) stages.release_previous(lane);
      }
    }
  }
}

// One thread. Every CTA of a cluster copies an equal part of the tokens, to all of them.
template <typename Config>
__device__ __forceinline__ void produce(const GemmParams& p, const CtaPlace& cta, Stages<Config> stages) {
  constexpr int kShare = Config::kStageBytes / Config::kClusterSize;
  Schedule<Config::kWholeFirst> schedule(p, cta);
  Segment s;
  constexpr int kTokenBytes = Config::kRowsOfToken * kRowBytes;
  const long long block_stride = static_cast<long long>(p.padded_m) * kTokenBytes;
  constexpr int kScales = Config::kScalesBytes;
  const auto fill = [&](uint8_t* to, const uint8_t* from, int bytes) {
    uint64_t* full = stages.full + stages.index;
    barrier_wait(stages.empty + stages.index, stages.phase ^ 1);
    mbarrier_expect(full, bytes * Config::kClusterSize);
    copy_bulk<Config::kClusterSize>(to, from, bytes, full);
    stages.advance();
  };
  wait_for_primary();
  while (schedule.next(p, s)) {
    if constexpr (Config::kIntegers) {
      const auto* x = static_cast<const uint8_t*>(p.x) + s.begin * (Config::kStages * Config::kStageBytes + kScales);
      for (int k = s.begin * Config::kStages; k < s.end * Config::kStages; ++k) {
        const int bytes = Config::kStageBytes + (stages.index == Config::kStages - 1 ? kScales : 0);
        fill(stages.stage(), x, bytes);
        x += bytes;
      }
      continue;
    }
    const int first = s.begin * p.units_per_slice * 2;
    const int last = min(p.k_blocks, s.end * p.units_per_slice * 2);
    const uint8_t* x = static_cast<const uint8_t*>(p.x) + cta.rank * kShare + first * block_stride +
                       static_cast<long long>(place_of<Config>(p, cta, s.tile).token) * kTokenBytes;
#pragma unroll 1
    for (int k = first; k < last; ++k, x += block_stride) fill(stages.stage() + cta.rank * kShare, x, kShare);
    if (Config::kStreamsSums && p.k_split_log == 0 && s.begin == 0 && s.end < p.slices) {
      produce_sums(p, cta, sharing_of<Config>(p, s.tile).others, stages);
    }
  }
}

// Sums of digits, 16 bits of B's row pairs hi, lo: what a lane holds of N tokens (rows of B: digit_row) goes to where
// the sums of N columns would be.
template <typename Config>
struct DigitSums {
  static constexpr int kPairs = Config::kN / 8;  // of tokens, of a lane
  int sums[4 * kPairs * 2] = {};

  // At the end of the columns that share a scale, of a scale group or of the last slice. Gives back the stage that the
  // scales follow, which is the last one.
  __device__ __forceinline__ void move_to(const GemmParams& p, float (&acc)[4 * kPairs], const Stages<Config>& stages) {
    float2 x_scales[kPairs];
    float2 halves[kPairs] = {};  // half sums of x
    const auto* from =
        reinterpret_cast<const float2*>(stages.shared + Config::kStages * Config::kStageBytes) + threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      x_scales[i] = from[4 * i];
      if (Config::kHalves) halves[i] = from[Config::kN / 2 + 4 * i];
    }
    wgmma_wait_all(sums);
#pragma unroll
    for (int i = 0; i < 4 * kPairs; ++i) {
      const int at = i / 4 * 8 + i % 2 * 4 + i / 2 % 2 * 2;
      const float2 scale = x_scales[i / 4];
      const float2 half = halves[i / 4];
      acc[i] = fmaf(value(sums[at], sums[at + 1]), i % 2 == 0 ? scale.x : scale.y, acc[i]);
      if constexpr (Config::kHalves) {
        acc[i] = fmaf(i % 2 == 0 ? half.x : half.y, Config::Decoder::kHalfUnit, acc[i]);
      }
      sums[at] = sums[at + 1] = 0;
    }
    uint32_t read = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) read ^= __float_as_uint(acc[4 * i]);
    stages.release_previous_read(read & p.zero);
  }

 private:
  static __device__ __forceinline__ float value(int hi, int lo) {
    constexpr long long kMost = (Config::kUnsigned ? 255 : 128) * 127 * 256LL * Config::kScaleBlocks * kBlockColumns;
    if constexpr (kMost <= 0x7fffffff) return static_cast<float>(256 * hi + lo);
    return fmaf(256.0f, static_cast<float>(hi), static_cast<float>(lo));
  }
};
struct NoDigits {
  template <int Registers, typename X>
  __device__ __forceinline__ void move_to(const GemmParams& /*p*/, float (& /*acc*/)[Registers], const X& /*stages*/) {}
};
template <typename Config>
using Digits = std::conditional_t<Config::kIntegers, DigitSums<Config>, NoDigits>;

// A slice of a segment. The words of its first unit have been loaded, at the end those of the next slice's have.
template <typename Config>
__device__ __forceinline__ void multiply_slice(const GemmParams& p, const Segment& segment, int slice,
                                               WordReader<Config>& words, RowScales<1>& scales, Stages<Config>& stages,
                                               uint32_t offset, bool& holding, bool& output, bool keeps,
                                               Digits<Config>& digits, float (&acc)[Config::kRegisters]) {
  constexpr int kGroup = Config::kGroupSteps;
  const int units = units_of_slice(p, slice) / Config::kJoined;
  int block = slice * p.units_per_slice * 2;
  uint32_t a[2][kGroup][4];  // of a group of steps and the one before
  const auto new_group = [&] {
    wgmma_wait_all(acc);
    scales.next_group(p, acc);
  };
  words.begin_slice();
  if (Config::kRegular && block == scales.boundary) new_group();
  unrolled<Config::kUnits>([&](auto unit) {
    constexpr int u = decltype(unit)::value;
    if (!Config::kRegular && u >= units) return false;
    typename Config::Decoder decoder = words.template unit<u>();
    unrolled<Config::kUnitStages>([&](auto stage_of_unit) {
      constexpr int s_of_u = decltype(stage_of_unit)::value;
      if (!Config::kRegular && s_of_u > 0 && block >= p.k_blocks) return false;
#pragma unroll
      for (int first = 0; first < kBlockSteps; first += kGroup) {
        const int h = (s_of_u * kBlockSteps + first) / kGroup % 2;
#pragma unroll
        for (int s = 0; s < kGroup; ++s) {
          decoder.fragment(s_of_u * kBlockSteps + first + s, SharedWindow<typename Config::T>{}, offset, a[h][s]);
        }
        if (s_of_u == 0 && first == 0) words.template release_unit<u>();
        if (first == 0) barrier_wait(stages.full + stages.index, stages.phase);
        if (!Config::kRegular && block == scales.boundary) new_group();
        const uint64_t b = tile_descriptor(shared_address(stages.stage())) + first * kDescriptorStep;
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < kGroup; ++s) {
          if constexpr (Config::kIntegers) {
            wgmma_bytes<Config::kUnsigned>(digits.sums, a[h][s], b + s * kDescriptorStep);
          } else {
            const bool begins = u == 0 && s_of_u == 0 && first == 0 && s == 0;
            wgmma<typename Config::T>(acc, a[h][s], b + s * kDescriptorStep, begins ? slice != segment.begin : 1);
          }
        }
        wgmma_commit();
        if (s_of_u == Config::kUnitStages - 1 && first == kBlockSteps - kGroup) {
          if (u + 1 == (Config::kRegular ? Config::kUnits : units)) {
            if (slice + 1 < segment.end) words.template load_unit<0>(loads_of_slice<Config>(p, slice + 1));
          } else {
            words.template load_unit<(u + 1) % Config::kUnits>(loads_of_slice<Config>(p, slice));
          }
        }
        // The group before: a[1 - h] is free, and the stage of the block before.
        wgmma_wait<Config::kRegular ? 1 : 0>();
        if (first == 0 && holding) {
          const bool last = u == Config::kUnits - 1 && s_of_u == Config::kUnitStages - 1;
          if (!Config::kOutputInStages || !last || !keeps) {
            stages.release_previous(threadIdx.x % kLanes);
          }
        }
        if (Config::kOutputInStages && u == 0 && s_of_u == 0 && first == 0 && output) {
          stages.release_output(threadIdx.x / 128, threadIdx.x % kLanes);
          output = false;
        }
      }
      holding = true;
      stages.advance();
      block += Config::kStageBlocks;
      return true;
    });
    return true;
  });
  if (block % Config::kScaleBlocks == 0 || block == scales.boundary || slice + 1 == segment.end) {
    digits.move_to(p, acc, stages);
    if (Config::kIntegers) holding = false;
  }
}

template <typename Config>
__device__ __forceinline__ void consume(const GemmParams& p, const CtaPlace& cta, Stages<Config> stages,
                                        uint8_t* shared) {
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  WordReader<Config> words(p, shared, warp, lane);
  Schedule<Config::kWholeFirst> schedule(p, cta);
  // The upper byte of a shared address is the CTA's rank in its cluster.
  const uint32_t offset = shared_address(shared) + Config::kTableStart + Config::Decoder::lane_offset(lane);
  bool first = true;
  bool new_table = true;
  bool output = false;     // the stages of it have not been given back
  bool announces = false;  // a partial sum that has been stored
  Segment s;
  TilePlace place;
  RowScales<1> scales;
  const auto next = [&] {
    if (!schedule.next(p, s)) return false;
    place = place_of<Config>(p, cta, s.tile);
    const GemmPart& part = p.parts[place.part];
    scales = RowScales<1>(p, part.data + Config::kScalesOffset, place.row_tile + warp, part.row_tiles,
                          s.begin * p.units_per_slice * 2, lane);
    return true;
  };
  bool more = next();
  while (more) {
    if (new_table) {
      change_table<Config, Config::kConsumers>(p.parts[place.part], shared + Config::kTableStart,
                                               1 + Config::kWarpgroups);
    }
    if (first) wait_for_primary();
    first = false;
    scales.begin();
    float acc[Config::kRegisters];  // the first products overwrite it
    if constexpr (Config::kIntegers) {
      for (float& sum : acc) sum = 0;
    }
    Digits<Config> digits;
    bool holding = false;  // a stage whose wgmmas may still run
    // An instruction of all lanes: the assembler then knows them to be together, and every __syncwarp() from here on is
    // one instruction instead of a branch.
    wgmma_fence();
    words.template load_unit<0>(loads_of_slice<Config>(p, s.begin));
#pragma unroll 1
    for (int slice = s.begin; slice < s.end; ++slice) {
      const bool keeps = s.begin == 0 && slice + 1 == s.end && s.end == p.slices;
      multiply_slice<Config>(p, s, slice, words, scales, stages, offset, holding, output, keeps, digits, acc);
      if (announces) announce_partial<Config>(p, partial_set<Config>(p, block_now(), false), thread_now());
      announces = false;
    }
    const float2 scale = scales.last(0, Config::kUnit);
    if constexpr (Config::kSplitsK) {
      if (p.k_split_log > 0) {
        wgmma_wait_all(acc);
        scale_rows<Config::kRegisters>(acc, scale);
        cluster_arrive_release();  // nobody reads stages and slots any more, whose place the inbox takes
        cluster_wait();
        const ClusterSums<Config> sums(p, shared, cta.k_rank);
        const int warpgroup = thread_now() / 128;
        sums.send_all(acc, warpgroup);
        cluster_arrive_release();
        cluster_wait();
        sums.add_and_store(TileOutput<Config>(p, place, warp, lane), warpgroup);
        return;
      }
    }
    // Where the next segment is and its scales, while the last wgmmas run.
    const Segment done = s;
    const TilePlace to = place;
    more = next();
    new_table = place.part != to.part;
    wgmma_wait_all(acc);
    Sharing sharing;
    if (done.end < p.slices || (Config::kAddsInParts && done.begin > 0)) sharing = sharing_of<Config>(p, done.tile);
    const int adders = adders_of<Config>(sharing);
    if (done.begin > 0 || adders > 1) {
      if (!Config::kIntegers) stages.release_previous(lane);
      scale_rows<Config::kRegisters>(acc, scale);
      const int set = partial_set<Config>(p, block_now(), done.begin == 0);
      store_partial<Config>(p, set, thread_now(), acc);
      announces = more;
      if (!more) announce_partial<Config>(p, set, thread_now());
      // Nothing more to multiply, and all others have been announced or will be without waiting for this one.
      if (const int part = cta.cluster - sharing.first; Config::kAddsInParts && part < adders) {
        add_part<Config>(p, sharing, cta.rank, part, adders, thread_now(), TileOutput<Config>(p, to, warp, lane));
      }
      continue;
    }
    float2 rest = scale;
    if (done.end < p.slices) {
      scale_rows<Config::kRegisters>(acc, scale);
      if constexpr (Config::kStreamsSums) {
        stages.release_previous(lane);
        add_sums<Config>(p, sharing.others, stages, acc);
      } else {
        add_partials<Config>(p, cta, sharing.others, thread_now(), acc);
      }
      rest = {1, 1};
    }
    const int thread = thread_now();
    if constexpr (Config::kOutputInStages) {
      static_assert(Config::kWarpgroups == 2);
      named_barrier(1 + Config::kWarpgroups, Config::kConsumers);  // both have read the last stages
      stages.release(Stages<Config>::output_stage(1 - thread / 128), lane);
      output = true;
    } else {
      if (!Config::kIntegers && (!Config::kStreamsSums || done.end == p.slices)) stages.release_previous(lane);
      if (thread % 128 == 0) copies_wait_read();
      named_barrier(1 + thread / 128, 128);
    }
    store_tile<Config>(p, to, thread, stages.output(thread / 128), rest, acc);
  }
  if (threadIdx.x % 128 == 0) copies_wait_read();
}

template <typename Config>
__device__ __forceinline__ CtaPlace this_cta(const GemmParams& p) {
  const auto rank = static_cast<int>(cluster_rank());
  return {static_cast<int>(blockIdx.x) >> (Config::kClusterSize / 2 + p.k_split_log),
          Config::kClusterSize > 1 ? rank : 0, Config::kClusterSize > 1 ? 0 : rank};
}

template <typename Config>
__global__ void __maxnreg__(Config::kLaunchRegisters) gemm_kernel(const __grid_constant__ GemmParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t shared[];
  launch_dependents();
  Stages<Config> stages(shared);
  static_assert(!Config::kSplitsK || Config::kClusterSize == 1);
  if ((shared_address(shared) & 0xffffff) != kSharedBase) __trap();
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      barrier_init(stages.full + i, 1);
      barrier_init(stages.empty + i, Config::kConsumers / kLanes * Config::kWarpArrivals * Config::kClusterSize);
    }
    const Slots<Config> slots(shared);
    for (int i = 0; i < Config::kSlots; ++i) {
      barrier_init(slots.full + i, Config::kWordProducers);
      barrier_init(slots.empty + i, Config::kConsumers);
    }
    barrier_init_done();
  }
  __syncthreads();
  if (Config::kClusterSize > 1 || (Config::kSplitsK && p.k_split_log > 0)) {
    cluster_arrive();
    cluster_wait();
  }
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // a value the assembler knows to be uniform
  if (warpgroup == Config::kWarpgroups) {
    give_registers<Config::kProducerRegisters>();
    const CtaPlace cta = this_cta<Config>(p);
    if (threadIdx.x == Config::kConsumers) produce<Config>(p, cta, stages);
    const int warp = static_cast<int>(threadIdx.x - Config::kConsumers) / kLanes;
    if (warp > 0) produce_words<Config>(p, cta, Slots<Config>(shared), warp - 1);
    if (Config::kSplitsK && p.k_split_log > 0) {  // the barriers before and after ClusterSums' sending
      __syncwarp();
      for (int i = 0; i < 2; ++i) {
        cluster_arrive();
        cluster_wait();
      }
    }
  } else {
    take_registers<Config::kConsumerRegisters>();
    consume<Config>(p, this_cta<Config>(p), stages, shared);
  }
  if constexpr (Config::kClusterSize > 1) {  // nobody writes to the shared memory of a CTA that has gone
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
#endif
}

}  // namespace higgs::cuda
