// Sizes of the mma.sync GEMM, and the two streams that feed it: units of x through shared memory, words of W in
// registers.
#pragma once

#include "async_copy.cuh"
#include "gemm_schedule.cuh"
#include "gemm_weights.cuh"
#include "higgs/cuda/plan.h"
#include "ptx.cuh"

namespace higgs::cuda {

template <typename Decoder_, typename T_, int N_>
struct MmaConfig : GemmWeights<Decoder_, T_> {
  using Weights = GemmWeights<Decoder_, T_>;
  static constexpr int kN = N_;
  static constexpr int kClusterSize = 1;
  static constexpr bool kWholeFirst = false;  // XStream::look_ahead
  static constexpr int kRowTiles = kMmaRows / kTileRows;
  static constexpr int kWarpTiles = 2;
  static constexpr int kThreads = kRowTiles / kWarpTiles * kLanes;
  static constexpr int kWarpgroups = kThreads / 128;
  static constexpr int kTileFragments = N_ / 8;  // of the accumulators, per row tile
  static constexpr int kTileRegisters = 4 * kTileFragments;
  static constexpr int kRegisters = kWarpTiles * kTileRegisters;
  static constexpr int kBlockBytes = N_ * kRowBytes;   // of x, 64 columns
  static constexpr int kStageBytes = 2 * kBlockBytes;  // a unit
  static constexpr int kStages = 2;
  static constexpr int kSharedBytes = Decoder_::kTableBytes + kStages * kStageBytes;
  static constexpr int kTableStart90 = kTableAddress - kSharedBase;
  static constexpr int kSharedBytes90 = kTableStart90 + Decoder_::kTableBytes;
  static_assert(kSharedBytes <= kMmaSharedBytes && kStages * kStageBytes <= kTableStart90);
  static_assert(kBlockBytes % (kThreads * 16) == 0);
  // An iteration of the main loop: few units, as the loop should not be larger than the instruction caches, that make
  // whole 16-byte pieces of words; else a slice.
  static constexpr int kIterationUnits = Weights::kUnitWords % 2 == 0 ? 2 : Weights::kUnits;
  static constexpr int kLoads = (kIterationUnits * Weights::kUnitWords + 3) / 4;  // of 16 bytes, per row tile
};

// No clusters.
__device__ __forceinline__ CtaPlace this_cta() { return {static_cast<int>(blockIdx.x), 0}; }

// The k blocks [first_block, last_block) of a segment.
__device__ __forceinline__ int first_block(const GemmParams& p, const Segment& s) {
  return s.begin * p.units_per_slice * 2;
}
__device__ __forceinline__ int last_block(const GemmParams& p, const Segment& s) {
  return min(p.k_blocks, s.end * p.units_per_slice * 2);
}

// x on its way through a ring of stages in shared memory, a unit each, copied by all threads together.
template <typename Config>
class XStream {
 public:
  __device__ __forceinline__ XStream(const GemmParams& p, uint8_t* shared)
      : stages_(shared_address(shared)), schedule_(p, this_cta()) {}
  // The first copies.
  __device__ __forceinline__ void begin(const GemmParams& p) {
#pragma unroll 1
    for (int i = 0; i < Config::kStages; ++i) {
      look_ahead(p);
      copy_unit(p);
    }
    wait_for_copies<Config::kStages - 1>();
    __syncthreads();
  }
  // At the begin of every segment: finds the one to be copied next. The copies are two units ahead, so that no second
  // one begins there before the next call: but for a CTA's first segment and its last, all have two units, or one each.
  __device__ __forceinline__ void look_ahead(const GemmParams& p) {
    Segment s;
    if (next_blocks_ > 0 || !schedule_.next(p, s)) return;
    const int begin = first_block(p, s);
    next_blocks_ = last_block(p, s) - begin;
    const TilePlace place = place_of<Config>(p, this_cta(), s.tile);
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
  }

 private:
  // Copies to the stage at index_ and goes to the one after it.
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
    index_ = index_ + 1 == Config::kStages ? 0 : index_ + 1;
  }

  uint32_t stages_;
  int index_ = 0;
  Schedule<Config::kWholeFirst> schedule_;
  const uint8_t* x_ = nullptr;  // of the next unit to copy
  int blocks_ = 0;              // of its segment
  const uint8_t* next_x_ = nullptr;
  int next_blocks_ = 0;
};

// The words of a warp's row tiles, iteration by iteration over all its segments. A register is loaded with a word of
// the next iteration as soon as it has been consumed.
template <typename Config>
class WordStream {
 public:
  int units = 0;  // of this iteration

  __device__ __forceinline__ WordStream(const GemmParams& p, int warp, int lane)
      : schedule_(p, this_cta()), warp_(warp), lane_(lane) {
    look_ahead(p);
    step(p);
    load<0, Config::kLoads>();
  }
  // At the begin of every segment: finds the one after it.
  __device__ __forceinline__ void look_ahead(const GemmParams& p) {
    Segment s;
    if (next_slices_ > 0 || !schedule_.next(p, s)) return;
    const TilePlace place = place_of<Config>(p, this_cta(), s.tile);
    const GemmPart& part = p.parts[place.part];
    const int row_tile = min(place.row_tile + warp_ * Config::kWarpTiles, part.row_tiles - 1);
    next_slices_ = s.end - s.begin;
    next_last_units_ = s.end == p.slices ? p.last_units : p.units_per_slice;
    next_slice_ = part.data + static_cast<long long>(part.weights_offset) * kTiledAlignment +
                  static_cast<long long>(row_tile) * p.tile_bytes + s.begin * p.slice_bytes + lane_ * 16;
    next_to_second_ = row_tile + 1 < part.row_tiles ? p.tile_bytes : 0;
  }
  // Enters the next iteration.
  __device__ __forceinline__ void next(const GemmParams& p) {
    units = next_units_;
    step(p);
  }
  // The words of unit `Unit` have been consumed, or with Last those of all units from there on.
  template <int Unit, bool Last>
  __device__ __forceinline__ void consumed() {
    load<Unit * Config::kUnitWords / 4, Last ? Config::kLoads : (Unit + 1) * Config::kUnitWords / 4>();
  }
  __device__ __forceinline__ uint32_t word(int tile, int i) const {
    const uint4& v = words_[tile][i / 4];
    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
  }

 private:
  // Loads [First, Last) of the next iteration; where it has fewer, others of it, not to be used: a load that may be
  // skipped would cost copies of the registers.
  template <int First, int Last>
  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = First; i < Last; ++i) {
      const int at = i < next_loads_ ? i : 0;
      words_[0][i] = load_streaming(reinterpret_cast<const uint4*>(data_) + at * kLanes);
      words_[1][i] = load_streaming(reinterpret_cast<const uint4*>(data_ + to_second_) + at * kLanes);
    }
  }
  // data_ = the iteration after it, if there is one.
  __device__ __forceinline__ void step(const GemmParams& p) {
    units_left_ -= next_units_;
    data_ += Config::kLoads * 16 * kLanes;
    if (units_left_ == 0) begin_slice(p);
    next_units_ = min(units_left_, Config::kIterationUnits);
    next_loads_ = (next_units_ * Config::kUnitWords + 3) / 4;
  }
  __device__ __forceinline__ void begin_slice(const GemmParams& p) {
    if (slices_ > 1) {
      --slices_;
      slice_ += p.slice_bytes;
    } else {  // at the end of all, once more what was last
      slices_ = next_slices_;
      next_slices_ = 0;
      slice_ = next_slice_;
      last_units_ = next_last_units_;
      to_second_ = next_to_second_;
    }
    units_left_ = slices_ > 1 ? p.units_per_slice : last_units_;
    data_ = slice_;
  }

  static_assert(Config::kWarpTiles == 2);
  uint4 words_[Config::kWarpTiles][Config::kLoads];
  Schedule<Config::kWholeFirst> schedule_;
  int warp_;
  int lane_;
  int slices_ = 0;  // of the segment, from the next iteration's on
  int last_units_ = 0;
  const uint8_t* slice_ = nullptr;
  const uint8_t* data_ = nullptr;  // of the next iteration
  int to_second_ = 0;              // bytes to the second row tile; 0 where there is none
  int units_left_ = 0;             // of the slice, from there on
  int next_units_ = 0;
  int next_loads_ = 0;
  int next_slices_ = 0;  // of the segment after it
  int next_last_units_ = 0;
  const uint8_t* next_slice_ = nullptr;
  int next_to_second_ = 0;
};

}  // namespace higgs::cuda
