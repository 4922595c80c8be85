// Weights of the streamed loop: bulk copies bring them into a ring of every warp's own in shared memory.
#pragma once

#include "bulk_copy.cuh"
#include "gemv_config.cuh"
#include "gemv_operands.cuh"
#include "ptx.cuh"

namespace higgs::cuda {

// The weights of a warp, piece by piece: while those in registers are consumed, the next piece is loaded from the ring,
// and its place there is free again. A warp waits for its own copies only. Look-ups run kAhead MMA steps ahead of the
// products, past these waits and from one slice to the next.
//
// Places in shared memory: [stage][warp], each a piece and its barrier.
template <typename Config>
class StreamedWeights {
 public:
  // The warp's slices begin at `from`, `count` in all, the next one `to_next_block` behind the end of one.
  __device__ __forceinline__ StreamedWeights(uint8_t* ring, int warp, int warps, int lane, const uint8_t* from,
                                             long long to_next_block, int count)
      : ring_end_(ring + kRingStages * warps * kPlaceBytes),
        first_(shared_address(ring) + warp * kPlaceBytes),
        step_(warps * kPlaceBytes),
        end_(first_ + kRingStages * step_),
        place_(first_),
        source_(from),
        to_next_block_(to_next_block),
        to_copy_(count * kPieces),
        to_load_(count * kPieces),
        lane_(lane) {}
  // What lies behind the ring.
  __device__ __forceinline__ uint8_t* end() const { return ring_end_; }
  // Starts the first copies.
  __device__ __forceinline__ void fill() {
#pragma unroll 1
    for (int i = 0; i < kRingStages; ++i) {
      barrier_init_by_one(place_ + kPieceBytes);
      copy(place_);
      place_ += step_;
    }
    place_ = first_;
  }
  // First piece, first look-ups. The table is there.
  __device__ __forceinline__ void start(const uint8_t* table, uint32_t offset) {
    table_ = table;
    offset_ = offset;
    replace(0, Config::kWindow);
    take_unit(0);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) decoder_.fragment(i, table_, offset_, a_[i]);
  }
  // A slice. Behind the last one are look-ups of whatever the registers hold: any byte is an entry.
  __device__ __forceinline__ void multiply(const XFragments<Config>& x, BlockSums<Config>& sums) {
#pragma unroll
    for (int s = 0; s < kCount; ++s) {
      const uint4 b[1] = {x.of(0, s / kSteps, s % kSteps / 2)};
      sums.multiply(s, 0, a_[s % kAhead], b);
      const int next = (s + kAhead) % kCount;
      if (next % kSteps == 0) take_unit(next / kSteps);
      decoder_.fragment(next % kSteps, table_, offset_, a_[s % kAhead]);
    }
  }

 private:
  using Decoder = typename Config::Decoder;
  static constexpr int kPieces = Config::kLoads / Config::kWindow;  // of a slice
  static constexpr int kPlaceBytes = ring_place_bytes(Decoder::kShape);
  static constexpr int kPieceBytes = kPlaceBytes - 16;
  static constexpr int kAhead = 4;
  static constexpr int kCount = Config::kUnits * kSteps;
  static_assert(Config::kTiles == 1 && Config::kTokenTiles == 1 && kSteps % kAhead == 0);

  // The next copy, to the place `to`.
  __device__ __forceinline__ void copy(uint32_t to) {
    if (to_copy_ > 0) copy_by_one(to, source_, kPieceBytes, to + kPieceBytes);
    --to_copy_;
    source_ += kPieceBytes;
    if (to_copy_ % kPieces == 0) source_ += to_next_block_;
  }
  // Unit u to the decoder; its loads are replaced by those of the next piece.
  __device__ __forceinline__ void take_unit(int u) {
    constexpr int kWords = Config::kUnitWords;
    uint32_t w[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) w[i] = word(u * kWords + i);
    decoder_ = Decoder(w);
    replace(u * kWords / 4, u == Config::kUnits - 1 ? Config::kLoads : (u + 1) * kWords / 4);
  }
  // Loads begin .. end - 1 of the slice have been consumed.
  __device__ __forceinline__ void replace(int begin, int end) {
#pragma unroll
    for (int i = begin; i < end; ++i) {
      const int of_piece = i % Config::kWindow;
      if (of_piece == 0 && to_load_ > 0) barrier_wait(place_ + kPieceBytes, parity_);
      q_[of_piece] = load_shared(place_ + (of_piece * kLanes + lane_) * 16);
      if (of_piece != Config::kWindow - 1) continue;
      __syncwarp();  // all lanes have loaded it
      copy(place_);
      --to_load_;
      place_ += step_;
      if (place_ == end_) place_ = first_, parity_ ^= 1;
    }
  }
  __device__ __forceinline__ uint32_t word(int i) const {
    const uint4& v = q_[i / 4 % Config::kWindow];
    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
  }

  uint4 q_[Config::kWindow];
  Decoder decoder_;
  uint32_t a_[kAhead][4];  // A fragments
  const uint8_t* table_ = nullptr;
  uint32_t offset_ = 0;
  uint8_t* ring_end_;
  uint32_t first_;  // shared address of the warp's first place
  uint32_t step_;   // to its place in the next stage
  uint32_t end_;
  uint32_t place_;  // of the next piece to load
  uint32_t parity_ = 0;
  const uint8_t* source_;  // of the next copy
  long long to_next_block_;
  int to_copy_;  // pieces
  int to_load_;
  int lane_;
};

}  // namespace higgs::cuda
