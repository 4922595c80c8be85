// GEMM for m > 16 on sm_90a: y[m, n] = x'[m, k] . (scale * table[index])[n, k]^T (+ bias), x' rotated and packed by
// pack_x. Computed as Y^T = W X^T: the decoded weights are the register operand A of wgmma, x is B in shared memory.
//
//   x'       [k / 64][padded m][64 columns] fp16 or bf16: the B tiles as the tensor core wants them (128-byte rows,
//   swizzled;
//            columns in the k order of decode.cuh), so that a tile is one contiguous bulk copy
//   weights  tiled layout (tiled_format.h), straight from global memory to the registers of the warp that decodes them
//   y        [m, n] in x's type, accumulated in fp32
//
// Roles. A CTA computes tiles of 64 * kWarpgroups rows (a cluster: as many times that) by N tokens. One producer thread
// copies x. Each warp of a consumer warpgroup decodes its 16 rows x 64 columns (one k block) into A fragments while the
// wgmmas of the block before run:
//
//   decode block i + 1   LDS -> registers  |  wgmma block i (asynchronous)
//
// Scales. A change of scale group rescales the accumulators by the ratio of the scales: the tensor core adds up plain
// grid points, and no second set of accumulators is needed. A scale of 0 counts as kLeastScale in between.
//
// Clusters. The CTAs of a cluster take the row blocks of a tile that follow each other, and share the copies of x
// (multicast): x comes from the L2 once per cluster.
//
// Schedule (persistent). The first `split_tiles` tiles are cut into slices and shared out evenly, in contiguous runs;
// the CTA with a tile's first slice adds the sums of the others in the order of k (they arrive through global memory),
// so the result does not depend on timing. The other tiles are a whole number of rounds, one tile per CTA.
//
// Shared memory: see GemmConfig.
//
// Template values: Decoder of instances.h; T = __half, __nv_bfloat16; N = tokens of a tile: 16, 32, 64, 128 or 256.
#pragma once

#include <type_traits>
#include <utility>

#include "decode.cuh"
#include "gemm_params.h"
#include "numeric.cuh"
#include "ptx.cuh"
#include "rotate_x.cuh"
#include "wgmma.cuh"

namespace higgs::cuda {

inline constexpr int kBlockColumns = 64;  // of a k block: a 128-byte row of B
inline constexpr int kBlockSteps = kBlockColumns / 16;
inline constexpr int kRowBytes = kBlockColumns * 2;
// The table begins at this address of the shared window, so that the upper half of a look-up address is a constant that
// the decoders' byte permutation puts in: no addition. Dynamic shared memory begins at kSharedBase: 1 KB is the
// system's.
inline constexpr int kTableAddress = 0x10000;
inline constexpr int kSharedBase = 1024;
inline constexpr float kLeastScale = 0x1p-60f;

template <typename Decoder_, typename T_, int N_, bool Regular_>
struct GemmConfig {
  using Decoder = Decoder_;
  using T = T_;
  static constexpr FieldShape kShape = Decoder_::kShape;
  static constexpr int kN = N_;
  static constexpr bool kRegular = Regular_;
  static constexpr int kWarpgroups = gemm_rows(N_) / 64;
  static constexpr int kClusterSize = gemm_cluster_size(N_);
  static constexpr int kStages = N_ == 256 ? 4 : N_ == 128 ? 6 : 8;
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr int kThreads = kConsumers + 128;
  // Narrow tiles leave 4096 registers or more to a block of pack_x: the next layer's x is packed, and the CTAs of this
  // kernel start, while the kernel before still runs.
  static constexpr int kLaunchRegisters = (N_ == 256 ? 65536 : 65536 - 4096) / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = 24;
  static constexpr int kConsumerRegisters =
      (kLaunchRegisters * kThreads - kProducerRegisters * 128) / kConsumers / 8 * 8;
  static constexpr int kRowTiles = 4 * kWarpgroups;  // of 16 rows
  static constexpr int kRegisters = N_ / 2;          // of the accumulators, per thread

  static constexpr int kTableSize = (kShape.entries() * kShape.entry_bytes() + kTiledAlignment - 1) / kTiledAlignment *
                                    kTiledAlignment;  // in the tiled buffer: fp16, then bf16, then the scales
  static constexpr int kTableOffset = std::is_same_v<T_, __half> ? 0 : kTableSize;
  static constexpr int kScalesOffset = 2 * kTableSize;

  static constexpr int kUnits = kShape.max_units();
  static constexpr int kUnitWords = kShape.unit_words();
  static constexpr int kLoads = (kUnits * kUnitWords + 3) / 4;
  // 16-byte loads a warp keeps in flight: all of a slice, or where the accumulators take half of the registers, half
  static constexpr int kWindow = N_ == 256 && kLoads % 2 == 0 ? kLoads / 2 : kLoads;

  static constexpr int kStageBytes = N_ * kBlockColumns * 2;  // one k block of x
  static constexpr int kStagingTokens = N_ < 64 ? N_ : 64;
  static constexpr int kStagingStride = 48;  // bytes per token: 16 rows, spread over the banks
  static constexpr int kStagingBytes = kRowTiles * kStagingTokens * kStagingStride;
  // Shared memory: stages | staging | barriers | ... | table at address kTableAddress | the other stages
  static constexpr int kTableStart = kTableAddress - kSharedBase;
  static constexpr int kBarrierBytes = 2 * kStages * static_cast<int>(sizeof(uint64_t));
  static constexpr int kStagesThatFit = (kTableStart - kStagingBytes - kBarrierBytes) / kStageBytes;
  static constexpr int kStagesBefore = kStages < kStagesThatFit ? kStages : kStagesThatFit;
  static constexpr int kStagesGap = kTableStart + Decoder::kTableBytes - kStagesBefore * kStageBytes;
  static constexpr int kSharedBytes = kTableStart + Decoder::kTableBytes + (kStages - kStagesBefore) * kStageBytes;
  static_assert(kStageBytes % 1024 == 0 && kStagingBytes % 16 == 0 && kSharedBytes <= 227 * 1024);
};

// Slices [begin, end) of a tile.
struct Segment {
  int tile = 0;
  int begin = 0;
  int end = 0;
};

// The segments of a cluster, in order.
class Schedule {
 public:
  __device__ __forceinline__ Schedule(const GemmParams& p, int cluster)
      : split_(first_slice(p, cluster)), split_end_(first_slice(p, cluster + 1)), tile_(p.split_tiles + cluster) {}

  static __device__ __forceinline__ int first_slice(const GemmParams& p, int cluster) {
    return cluster * p.slices_per_cluster + min(cluster, p.longer_clusters);
  }
  __device__ __forceinline__ bool next(const GemmParams& p, Segment& s) {
    if (split_ < split_end_) {
      s.tile = split_ / p.slices;
      s.begin = split_ - s.tile * p.slices;
      s.end = min(p.slices, s.begin + split_end_ - split_);
      split_ += s.end - s.begin;
      return true;
    }
    s = {tile_, 0, p.slices};
    tile_ += p.clusters;
    return s.tile < p.tiles;
  }

 private:
  int split_;
  int split_end_;
  int tile_;
};

// The place of a CTA in the grid.
struct CtaPlace {
  int cluster = 0;
  int rank = 0;
};

// Where a CTA's rows of a tile are: the part and the first row tile and token.
struct TilePlace {
  int part = 0;
  int row_tile = 0;
  int token = 0;
};

template <typename Config>
__device__ __forceinline__ TilePlace place_of(const GemmParams& p, const CtaPlace& cta, int tile) {
  TilePlace place;
  const int token_tile = tile / p.row_blocks;
  const int block = tile - token_tile * p.row_blocks;
  while (place.part + 1 < p.part_count && block >= p.parts[place.part + 1].first_row_block) ++place.part;
  place.row_tile =
      ((block - p.parts[place.part].first_row_block) * Config::kClusterSize + cta.rank) * Config::kRowTiles;
  place.token = token_tile * Config::kN;
  return place;
}

// The words of a warp's slices: load i of a slice is in q_[i % kWindow], and is replaced when it has been consumed.
template <typename Config>
class WeightStream {
 public:
  __device__ __forceinline__ WeightStream(const GemmParams& p, const CtaPlace& cta, int warp, int lane)
      : schedule_(p, cta.cluster), cta_(cta), warp_(warp), lane_(lane) {
    step(p);
#pragma unroll
    for (int i = 0; i < Config::kWindow; ++i) load(i, next_, next_loads_);
  }
  __device__ __forceinline__ void begin_slice(const GemmParams& p) {
    current_ = next_;
    current_loads_ = next_loads_;
    step(p);
  }
  __device__ __forceinline__ uint32_t word(int i) const {
    const uint4& v = q_[i / 4 % Config::kWindow];
    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
  }
  // Loads [First, Last) of the slice have been consumed: their registers take the loads kWindow later, of this slice or
  // of the next.
  template <int First, int Last>
  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int i = First; i < Last; ++i) {
      const int ahead = i + Config::kWindow;
      if (ahead < Config::kLoads) {
        load(ahead, current_, current_loads_);
      } else {
        load(ahead - Config::kLoads, next_, next_loads_);
      }
    }
  }

 private:
  __device__ __forceinline__ void load(int i, const uint8_t* slice, int loads) {
    if (Config::kRegular ? loads != 0 : i < loads) {
      q_[i % Config::kWindow] = load_streaming(reinterpret_cast<const uint4*>(slice) + i * kLanes);
    }
  }
  // next_ = the slice after it.
  __device__ __forceinline__ void step(const GemmParams& p) {
    next_loads_ = 0;
    if (++slice_ >= segment_.end) {
      if (!schedule_.next(p, segment_)) return;
      slice_ = segment_.begin;
      const TilePlace place = place_of<Config>(p, cta_, segment_.tile);
      const GemmPart& part = p.parts[place.part];
      const int row_tile = min(place.row_tile + warp_, part.row_tiles - 1);
      next_ = part.data + static_cast<long long>(part.weights_offset) * kTiledAlignment +
              static_cast<long long>(row_tile) * p.tile_bytes + slice_ * p.slice_bytes + lane_ * 16;
    } else {
      next_ += p.slice_bytes;
    }
    const int units = slice_ == p.slices - 1 ? p.last_units : p.units_per_slice;
    next_loads_ = (units * Config::kUnitWords + 3) / 4;
  }

  uint4 q_[Config::kWindow];
  Schedule schedule_;
  Segment segment_;
  CtaPlace cta_;
  int slice_ = 0;
  int warp_;
  int lane_;
  const uint8_t* current_ = nullptr;
  const uint8_t* next_ = nullptr;
  int current_loads_ = 0;
  int next_loads_ = 0;
};

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
        full(reinterpret_cast<uint64_t*>(shared + Config::kStagesBefore * Config::kStageBytes + Config::kStagingBytes)),
        empty(full + Config::kStages) {}
  __device__ __forceinline__ uint8_t* stage() const {
    return shared + index * Config::kStageBytes + (index < Config::kStagesBefore ? 0 : Config::kStagesGap);
  }
  __device__ __forceinline__ uint8_t* staging(int warp) const {
    return shared + Config::kStagesBefore * Config::kStageBytes +
           warp * Config::kStagingTokens * Config::kStagingStride;
  }
  __device__ __forceinline__ void advance() {
    if (++index == Config::kStages) index = 0, phase ^= 1;
  }
  // Called by every lane of a warp. All CTAs of the cluster write to this one's stages.
  __device__ __forceinline__ void release_previous(int lane) const {
    uint64_t* barrier = empty + (index == 0 ? Config::kStages : index) - 1;
    if (lane < Config::kClusterSize) barrier_arrive<Config::kClusterSize>(barrier, lane);
  }
};

// One thread. Every CTA of a cluster copies an equal part of the tokens, to all of them.
template <typename Config>
__device__ __forceinline__ void produce(const GemmParams& p, const CtaPlace& cta, Stages<Config> stages) {
  constexpr int kShare = Config::kStageBytes / Config::kClusterSize;
  Schedule schedule(p, cta.cluster);
  Segment s;
  const long long block_stride = static_cast<long long>(p.padded_m) * kRowBytes;
  wait_for_primary();
  while (schedule.next(p, s)) {
    const int first = s.begin * p.units_per_slice * 2;
    const int last = min(p.k_blocks, s.end * p.units_per_slice * 2);
    const uint8_t* x = static_cast<const uint8_t*>(p.x) + cta.rank * kShare + first * block_stride +
                       static_cast<long long>(place_of<Config>(p, cta, s.tile).token) * kRowBytes;
    for (int k = first; k < last; ++k, x += block_stride) {
      uint64_t* full = stages.full + stages.index;
      barrier_wait(stages.empty + stages.index, stages.phase ^ 1);
      barrier_expect(full, Config::kStageBytes);
      copy_bulk<Config::kClusterSize>(stages.stage() + cta.rank * kShare, x, kShare, full);
      stages.advance();
    }
  }
}

// The scales of a warp's row tile along k; a lane needs those of rows g and g + 8.
struct RowScales {
  const uint16_t* at = nullptr;  // of the next scale group
  float2 now = {};
  float2 greatest = {};
  float2 next = {};
  int boundary = 0;  // k block where the next group begins
  int left = 0;      // groups after this one

  static __device__ __forceinline__ float load(const uint16_t* p) { return __half2float(__ushort_as_half(__ldg(p))); }
  __device__ __forceinline__ void take() {
    greatest = {fmaxf(greatest.x, next.x), fmaxf(greatest.y, next.y)};
    now = {fmaxf(next.x, kLeastScale), fmaxf(next.y, kLeastScale)};
    if (--left >= 0) {
      next = {load(at), load(at + 8)};
      at += kTileRows;
    }
  }
  __device__ __forceinline__ void begin(const GemmParams& p, const uint16_t* tile_scales, int block, int lane) {
    const int group = block / p.group_blocks;
    at = tile_scales + group * kTileRows + lane / 4;
    next = {load(at), load(at + 8)};
    at += kTileRows;
    left = p.scale_groups - 1 - group;
    boundary = (group + 1) * p.group_blocks;
    greatest = {};
    take();
  }
};

template <int Registers>
__device__ __forceinline__ void scale_rows(float (&acc)[Registers], float2 by) {
#pragma unroll
  for (int i = 0; i < Registers; ++i) acc[i] *= (i & 2) == 0 ? by.x : by.y;
}

// Calls body(integral_constant<int, 0>) .. body(integral_constant<int, Count - 1>) while it returns true.
template <int Count, typename Body>
__device__ __forceinline__ void unrolled(const Body& body) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    (body(std::integral_constant<int, kIndex>{}) && ...);
  }(std::make_integer_sequence<int, Count>{});
}

// One slice: `units` units of 128 columns from k block `block` on.
template <typename Config>
__device__ __forceinline__ void multiply_slice(const GemmParams& p, WeightStream<Config>& weights, RowScales& scales,
                                               Stages<Config>& stages, uint32_t offset, int block, int units,
                                               bool& holding, float (&acc)[Config::kRegisters]) {
  constexpr int kWords = Config::kUnitWords;
  uint32_t a[2][kBlockSteps][4];
  const auto new_group = [&] {
    wgmma_wait<0>();
    const float2 before = scales.now;
    scales.take();
    scales.boundary += p.group_blocks;
    scale_rows(acc, {__fdiv_rn(before.x, scales.now.x), __fdiv_rn(before.y, scales.now.y)});
  };
  weights.begin_slice(p);
  if (Config::kRegular && block == scales.boundary) new_group();
  unrolled<Config::kUnits>([&](auto unit) {
    constexpr int u = decltype(unit)::value;
    if (!Config::kRegular && u >= units) {
      weights.template advance<u * kWords / 4, Config::kLoads>();
      return false;
    }
    uint32_t w[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) w[i] = weights.word(u * kWords + i);
    const typename Config::Decoder decoder(w);
    weights.template advance<u * kWords / 4, u == Config::kUnits - 1 ? Config::kLoads : (u + 1) * kWords / 4>();
    unrolled<2>([&](auto half) {
      constexpr int h = decltype(half)::value;
      if (!Config::kRegular && h == 1 && block >= p.k_blocks) return false;
#pragma unroll
      for (int s = 0; s < kBlockSteps; ++s) decoder.fragment(h * kBlockSteps + s, SharedWindow{}, offset, a[h][s]);
      barrier_wait(stages.full + stages.index, stages.phase);
      if (!Config::kRegular && block == scales.boundary) new_group();
      const uint64_t b = tile_descriptor(shared_address(stages.stage()));
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < kBlockSteps; ++s) wgmma<typename Config::T>(acc, a[h][s], b + s * kDescriptorStep);
      wgmma_commit();
      wgmma_wait<Config::kRegular ? 1 : 0>();  // the block before: a[1 - h] and its stage are free
      if (holding) stages.release_previous(threadIdx.x % kLanes);
      holding = true;
      stages.advance();
      ++block;
      return true;
    });
    return true;
  });
}

// The sums of a segment that does not begin its tile, for the CTA that does.
template <typename Config>
__device__ __forceinline__ float4* partial_of(const GemmParams& p, int cta, int warpgroup) {
  return reinterpret_cast<float4*>(p.partials) +
         (static_cast<long long>(cta) * Config::kWarpgroups + warpgroup) * (Config::kRegisters / 4) * 128 +
         threadIdx.x % 128;
}

template <typename Config>
__device__ __forceinline__ void send_partial(const GemmParams& p, int warpgroup,
                                             const float (&acc)[Config::kRegisters]) {
  float4* to = partial_of<Config>(p, blockIdx.x, warpgroup);
#pragma unroll
  for (int i = 0; i < Config::kRegisters / 4; ++i) {
    __stcg(to + i * 128, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
  }
  __threadfence();
  named_barrier(1 + warpgroup, 128);
  if (threadIdx.x % 128 == 0) store_release(p.flags + blockIdx.x * Config::kWarpgroups + warpgroup, 1);
}

template <typename Config>
__device__ __forceinline__ void add_partials(const GemmParams& p, const CtaPlace& place, int warpgroup, int tile,
                                             float (&acc)[Config::kRegisters]) {
  const int end = (tile + 1) * p.slices;
  const auto helps = [&](int cluster) {
    return cluster < p.clusters && Schedule::first_slice(p, cluster) < min(end, Schedule::first_slice(p, cluster + 1));
  };
  for (int cluster = place.cluster + 1 + threadIdx.x % 128; helps(cluster); cluster += 128) {
    const int cta = cluster * Config::kClusterSize + place.rank;
    while (load_acquire(p.flags + cta * Config::kWarpgroups + warpgroup) == 0) __nanosleep(20);
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

template <typename Config>
__device__ __forceinline__ void store_tile(const GemmParams& p, const GemmPart& part, int row_tile, int token,
                                           uint8_t* staging, int lane, const float (&acc)[Config::kRegisters]) {
  using T = typename Config::T;
  const int row = row_tile * kTileRows;
  if (row >= part.n) return;
  float2 bias = {};
  if (part.bias != nullptr) {
    const T* b = static_cast<const T*>(part.bias) + row + lane / 4;
    if (row + lane / 4 < part.n) bias.x = to_float(b[0]);
    if (row + lane / 4 + 8 < part.n) bias.y = to_float(b[8]);
  }
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

template <typename Config>
__device__ __forceinline__ void consume(const GemmParams& p, const CtaPlace& cta, Stages<Config> stages,
                                        uint8_t* shared, int warpgroup) {
  const int lane = threadIdx.x % kLanes;
  const int warp = threadIdx.x / kLanes;
  WeightStream<Config> weights(p, cta, warp, lane);
  uint8_t* staging = stages.staging(warp);
  // The upper byte of a shared address is the CTA's rank in its cluster.
  const uint32_t offset = shared_address(shared) + Config::kTableStart + Config::Decoder::lane_offset(lane);
  int table_of = -1;
  bool waited = false;
  Schedule schedule(p, cta.cluster);
  Segment s;
  while (schedule.next(p, s)) {
    const TilePlace place = place_of<Config>(p, cta, s.tile);
    const GemmPart& part = p.parts[place.part];
    if (place.part != table_of) {
      named_barrier(1 + Config::kWarpgroups, Config::kConsumers);  // nobody reads the table before
      TableFill<typename Config::Decoder>(part.data + Config::kTableOffset, threadIdx.x, Config::kConsumers)
          .store(shared + Config::kTableStart);
      named_barrier(1 + Config::kWarpgroups, Config::kConsumers);
      table_of = place.part;
    }
    const int row_tile = min(place.row_tile + warp, part.row_tiles - 1);
    const auto* tile_scales = reinterpret_cast<const uint16_t*>(part.data + Config::kScalesOffset) +
                              static_cast<long long>(row_tile) * p.scale_groups * kTileRows;
    RowScales scales;
    scales.begin(p, tile_scales, s.begin * p.units_per_slice * 2, lane);
    if (!waited) wait_for_primary();
    waited = true;
    float acc[Config::kRegisters] = {};
    bool holding = false;  // a stage whose wgmmas may still run
#pragma unroll 1
    for (int slice = s.begin; slice < s.end; ++slice) {
      multiply_slice<Config>(p, weights, scales, stages, offset, slice * p.units_per_slice * 2,
                             slice == p.slices - 1 ? p.last_units : p.units_per_slice, holding, acc);
    }
    wgmma_wait<0>();
    stages.release_previous(lane);
    scale_rows(acc, {scales.greatest.x == 0 ? 0.0f : scales.now.x, scales.greatest.y == 0 ? 0.0f : scales.now.y});
    if (s.begin > 0) {
      send_partial<Config>(p, warpgroup, acc);
      continue;
    }
    if (s.end < p.slices) add_partials<Config>(p, cta, warpgroup, s.tile, acc);
    store_tile<Config>(p, part, place.row_tile + warp, place.token, staging, lane, acc);
  }
}

template <typename Config>
__global__ void __maxnreg__(Config::kLaunchRegisters) gemm_kernel(const __grid_constant__ GemmParams p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) uint8_t shared[];
  launch_dependents();
  Stages<Config> stages(shared);
  if ((shared_address(shared) & 0xffffff) != kSharedBase) __trap();
  if (threadIdx.x == 0) {
    for (int i = 0; i < Config::kStages; ++i) {
      barrier_init(stages.full + i, 1);
      barrier_init(stages.empty + i, Config::kConsumers / kLanes * Config::kClusterSize);
    }
    barrier_init_done();
  }
  __syncthreads();
  if constexpr (Config::kClusterSize > 1) {
    cluster_arrive();
    cluster_wait();
  }
  const CtaPlace cta{static_cast<int>(blockIdx.x) / Config::kClusterSize, static_cast<int>(cluster_rank())};
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);  // a value the assembler knows to be uniform
  if (warpgroup == Config::kWarpgroups) {
    give_registers<Config::kProducerRegisters>();
    if (threadIdx.x == Config::kConsumers) produce<Config>(p, cta, stages);
  } else {
    take_registers<Config::kConsumerRegisters>();
    consume<Config>(p, cta, stages, shared, warpgroup);
  }
  if constexpr (Config::kClusterSize > 1) {  // nobody writes to the shared memory of a CTA that has gone
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
#endif
}

}  // namespace higgs::cuda
