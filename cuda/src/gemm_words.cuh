// The way of the words of W through shared memory: slots, each a piece of a slice of all row tiles of the CTA
// (GemmConfig). Three warps fill them by bulk copies, every consumer warp reads those of its row tile. So the loop has
// no load from global memory, which all wait for each other, and as much is under way as there are slots.
#pragma once

#include <algorithm>

#include "gemm_schedule.cuh"
#include "gemm_weights.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace higgs::cuda {

// Where a warp that fills or reads them is.
template <typename Config>
struct Slots {
  uint32_t address;  // of slot 0
  uint64_t* full;
  uint64_t* empty;
  int index = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ explicit Slots(uint8_t* shared)
      : address(shared_address(shared) + Config::kSlotsStart),
        full(reinterpret_cast<uint64_t*>(shared + Config::kBarriersStart) + 2 * Config::kStages),
        empty(full + Config::kSlots) {}
  __device__ __forceinline__ uint32_t slot() const {
    return address + index * Config::kSlotBytes + (index < Config::kSlotsBefore ? 0 : Config::kSlotsGap);
  }
  __device__ __forceinline__ void advance() {
    if (++index == Config::kSlots) index = 0, phase ^= 1;
  }
};

__device__ __forceinline__ int units_of_slice(const GemmParams& p, int slice) {
  return slice == p.slices - 1 ? p.last_units : p.units_per_slice;
}
template <typename Config>
__device__ __forceinline__ int loads_of_slice(const GemmParams& p, int slice) {
  return Config::kRegular ? Config::kLoads : (units_of_slice(p, slice) * Config::kShape.unit_words() + 3) / 4;
}

// Warp `warp` of kWordProducers, each with an equal share of the row tiles (or one less): a lane copies the words of
// one. The lanes' copies are issued in turn, and one warp's would not keep up with the consumers of narrow tiles.
template <typename Config>
__device__ __forceinline__ void produce_words(const GemmParams& p, const CtaPlace& cta, Slots<Config> slots, int warp) {
  const auto lane = static_cast<int>(threadIdx.x % kLanes);
  const int tile = warp + lane * Config::kWordProducers;
  const int tiles = (Config::kRowTiles - warp + Config::kWordProducers - 1) / Config::kWordProducers;
  Schedule<Config::kWholeFirst> schedule(p, cta);
  Segment s;
  while (schedule.next(p, s)) {
    const TilePlace place = place_of<Config>(p, cta, s.tile);
    const GemmPart& part = p.parts[place.part];
    const int row_tile = min(place.row_tile + tile, part.row_tiles - 1);
    const uint8_t* from = part.data + static_cast<long long>(part.weights_offset) * kTiledAlignment +
                          static_cast<long long>(row_tile) * p.tile_bytes + s.begin * p.slice_bytes;
#pragma unroll 1
    for (int slice = s.begin; slice < s.end; ++slice, from += p.slice_bytes) {
      const int loads = loads_of_slice<Config>(p, slice);
#pragma unroll 1
      for (int first = 0; first < loads; first += Config::kPieceLoads) {
        const int bytes = min(Config::kPieceLoads, loads - first) * kLanes * 16;
        uint64_t* full = slots.full + slots.index;
        barrier_wait(slots.empty + slots.index, slots.phase ^ 1);
        if (lane == 0) mbarrier_expect(full, tiles * bytes);
        __syncwarp();
        if (lane < tiles) {
          copy_bulk_once(slots.slot() + tile * Config::kPieceBytes, from + first * kLanes * 16, bytes, full);
        }
        slots.advance();
      }
    }
  }
}

// The words of a warp's row tile.
template <typename Config>
class WordReader {
 public:
  __device__ __forceinline__ WordReader(const GemmParams& p, uint8_t* shared, int warp, int lane)
      : p_(p), slots_(shared), to_lane_(warp * Config::kPieceBytes + lane * 16) {}
  // Loads what unit U of a slice of `loads` loads needs and the units before it did not. The slots are to be given back
  // by release_unit<U>().
  template <int U>
  __device__ __forceinline__ void load_unit(int loads) {
#pragma unroll
    for (int i = loads_until(U - 1); i < loads_until(U); ++i) {
      if (i % Config::kPieceLoads == 0) barrier_wait(slots_.full + slots_.index, slots_.phase);
      load_shared(slots_.slot() + to_lane_ + i % Config::kPieceLoads * kLanes * 16, q_[i]);
      if ((i + 1) % Config::kPieceLoads == 0 || i + 1 == (Config::kRegular ? Config::kLoads : loads)) {
        if (!Config::kRegular) release<U>(slots_.index, i / Config::kPieceLoads);
        slots_.advance();
      }
    }
  }
  // Gives back what load_unit<U>() has read to its end. The arrival must wait for the words, and so had better come
  // when they have been used: right behind the loads it overtook them where these followed loads from global memory,
  // and the next copy overwrote what they were to read (h200-ladder.md).
  template <int U>
  __device__ __forceinline__ void release_unit() {
    if (!Config::kRegular) return;  // done, as `loads` said where the last piece ended
#pragma unroll
    for (int piece = pieces_until(U - 1); piece < pieces_until(U); ++piece) {
      const int slot = slots_.index - pieces_until(U) + piece;
      release<U>(slot < 0 ? slot + Config::kSlots : slot, piece);
    }
  }
  // After load_unit<0>. Tells the compiler where in shared memory it is, where that is the same for all slices.
  __device__ __forceinline__ void begin_slice() {
    constexpr bool kSame = Config::kRegular && Config::kPieces % Config::kSlots == 0;
    if (kSame) slots_.index = loads_until(0) / Config::kPieceLoads % Config::kSlots;
  }
  // The words of unit U.
  template <int U>
  __device__ __forceinline__ typename Config::Decoder unit() const {
    uint32_t w[Config::kUnitWords];
#pragma unroll
    for (int i = 0; i < Config::kUnitWords; ++i) {
      const int at = slice_word(Config::kShape, U, i);
      const uint4& v = q_[at / 4];
      w[i] = at % 4 == 0 ? v.x : at % 4 == 1 ? v.y : at % 4 == 2 ? v.z : v.w;
    }
    return typename Config::Decoder(w);
  }

 private:
  // Loads of units up to u.
  static constexpr int loads_until(int u) {
    if (u < 0) return 0;
    int last = 0;
    for (int i = 0; i < Config::kUnitWords; ++i) last = std::max(last, slice_word(Config::kShape, u, i));
    return last / 4 + 1;
  }
  // Pieces that these are all of.
  static constexpr int pieces_until(int u) {
    return loads_until(u) == Config::kLoads ? Config::kPieces : loads_until(u) / Config::kPieceLoads;
  }
  // The slot of a piece that ends in unit U; what units before it loaded has been used. By every lane, for its own
  // loads: it takes no longer than by one for the warp after a __syncwarp(), which racecheck does not follow.
  template <int U>
  __device__ __forceinline__ void release(int slot, int piece) {
    uint32_t read = 0;
#pragma unroll
    for (int i = loads_until(U - 1); i < loads_until(U); ++i) {
      if (i / Config::kPieceLoads == piece) read ^= q_[i].x;
    }
    barrier_arrive<1>(slots_.empty + slot + (read & p_.zero), 0);
  }

  const GemmParams& p_;
  Slots<Config> slots_;
  uint32_t to_lane_;
  uint4 q_[Config::kLoads];
};

}  // namespace higgs::cuda
