// Sizes of the GEMM kernel: warps, registers, shared memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "gemm_weights.cuh"
#include "higgs/cuda/plan.h"
#include "trellis.cuh"
#include "trellis_table.h"

namespace higgs::cuda {

// What a decoder looks up: the table, where it is in the tiled buffer, and the unit in which its points come. Integer
// products: see GemmPlan::bytes.
template <typename Decoder, typename T, bool Trellis = Decoder::kShape.trellis()>
struct GemmTable {
  using Table = Decoder;
  static constexpr bool kIntegers = false;
  static constexpr bool kHalves = false;
  static constexpr int kTableOffset = GemmWeights<Decoder, T>::kTableOffset;
  static constexpr float kUnit = 1;
};
template <typename Decoder, typename T>
struct GemmTable<ByteQuadDecoder<Decoder>, T, false> {
  using Table = ByteTable<Decoder::kShape.entry_bits()>;
  static constexpr bool kIntegers = true;
  static constexpr bool kHalves = ByteQuadDecoder<Decoder>::kHalves;
  static constexpr int kTableOffset = 2 * Decoder::kShape.value_table_bytes();
  static constexpr float kUnit = 1;
};
template <typename Decoder, typename T>
struct GemmTable<Decoder, T, true> {
  using Table = typename Decoder::Table;
  static constexpr bool kIntegers = Decoder::kIntegers;
  static constexpr bool kHalves = kIntegers;
  static constexpr int kTableOffset = kIntegers ? 0 : Decoder::kShape.byte_tables_bytes() / 2;
  static constexpr float kUnit = kIntegers ? 1 : kTrellisStep / WindowPair<T>::kUnit;
};

template <typename Decoder_, typename T_, int N_, bool Regular_>
struct GemmConfig : GemmWeights<Decoder_, T_> {
  using Weights = GemmWeights<Decoder_, T_>;
  using Looked = GemmTable<Decoder_, T_>;
  using Table = typename Looked::Table;
  static constexpr bool kIntegers = Looked::kIntegers;
  static constexpr bool kHalves = Looked::kHalves;
  static constexpr bool kUnsigned = kHalves && Weights::kShape.trellis();  // bytes of weights
  static constexpr int kTableOffset = Looked::kTableOffset;
  static constexpr float kUnit = Looked::kUnit;
  static constexpr int kN = N_;
  static constexpr int kRowsOfToken = kIntegers ? 2 : 1;  // of B
  static constexpr bool kRegular = Regular_;
  static constexpr int kWarpgroups = gemm_rows(N_, Weights::kShape) / 64;
  static constexpr int kClusterSize = gemm_cluster_size(N_);
  static constexpr bool kWholeFirst = true;
  static constexpr bool kSplitsK = gemm_splits_k(N_, Regular_);
  static constexpr bool kAddsInParts = gemm_adds_in_parts(N_);
  // A stage of x has rows of 128 bytes: a k block, in bytes two.
  static constexpr int kStageBlocks = kIntegers ? 2 : 1;
  static constexpr int kUnitStages = Weights::kUnitBlocks / kStageBlocks;
  static constexpr int kStages = N_ <= 32 && !kIntegers ? 8 : 4;
  // Of bytes, the stages are a slice of x, all in front of the table, and its scales and half sums follow them.
  static constexpr int kScalesBytes = kIntegers ? 2 * N_ * static_cast<int>(sizeof(float)) : 0;
  static constexpr int kScalesRoom = (kScalesBytes + 1023) / 1024 * 1024;
  static_assert(!kIntegers || (kStages == Weights::kUnits * kUnitStages && Regular_));
  static constexpr int kScaleBlocks = kChunk / 2 / kBlockColumns;  // k blocks of x with one scale
  static constexpr int kConsumers = 128 * kWarpgroups;
  static constexpr int kThreads = kConsumers + 128;
  // Narrow tiles leave registers to the CTAs of pack_x: the next layer's x is packed, and the CTAs of this kernel
  // start, while the kernel before still runs. Of bytes, to a warp on each of four sub-cores, as they have registers of
  // their own: packing CTAs that find no room wait for the first CTAs of that kernel to end, crowd on their
  // multiprocessors and delay the CTAs of this kernel there.
  static constexpr int kPackRegisters = 4 * kLanes * kPackBytesRegisters;
  static constexpr int kLaunchRegisters = (N_ == 256   ? 65536
                                           : N_ == 128 ? 65536 - 12288
                                           : kIntegers ? 65536 - kPackRegisters
                                                       : 65536 - 4096) /
                                          kThreads / 8 * 8;
  // 224 for the consumers of 256 tokens: where it was timed, 240 was slower. Words of eight loads leave the consumers
  // none to spare: 3 % slower with 56 for the producers.
  static constexpr int kProducerRegisters = N_ == 256 ? 56 : !kIntegers ? 32 : kHalves && Weights::kLoads < 8 ? 56 : 24;
  static constexpr int kConsumerRegisters =
      (kLaunchRegisters * kThreads - kProducerRegisters * 128) / kConsumers / 8 * 8;
  static constexpr int kWordProducers = 3;           // warps beside the one that copies x
  static constexpr int kRowTiles = 4 * kWarpgroups;  // of 16 rows
  static constexpr int kWarpTiles = 1;               // of a warp
  static constexpr int kTileFragments = N_ / 8;      // of the accumulators
  static constexpr int kRegisters = N_ / 2;          // of the accumulators, per thread

  // A slot of shared memory holds a piece of a slice, kPieceLoads loads of 16 bytes a lane, of all row tiles of the
  // CTA.
  static constexpr int kPieceLoads = !kIntegers ? 2 : Weights::kLoads > 4 ? Weights::kLoads / 2 : Weights::kLoads;
  static constexpr int kPieceBytes = kPieceLoads * kLanes * 16;
  static constexpr int kSlotBytes = kRowTiles * kPieceBytes;
  static constexpr int kPieces = (Weights::kLoads + kPieceLoads - 1) / kPieceLoads;  // of a slice
  static constexpr int kSlots = N_ == 256 ? 2 : kPieceLoads == 4 ? 3 : 4;

  // Steps of 16 columns whose products are one group of wgmmas: the operands of two groups are in registers.
  static constexpr bool kHalfGroups = kIntegers && (N_ > 16 || kHalves);
  static constexpr int kGroupSteps = kHalfGroups ? kBlockSteps / 2 : kBlockSteps;

  static constexpr int kStageBytes = N_ * kRowsOfToken * kRowBytes;  // one k block of x
  // Sums of others that fit into a stage, of all threads. In wide tiles they come as x does; of narrow ones there is
  // only one a stage, which takes longer than loads.
  static constexpr int kStageSums = kStageBytes / (kConsumers * 16);
  static constexpr bool kStreamsSums = kStageSums > 1;
  // Arrivals by which a warp gives back a stage of x. Where lanes read stages themselves, each arrives behind what it
  // has read; behind a wgmma one lane does, for all.
  static constexpr bool kLanesRead = kClusterSize == 1 && (kIntegers || kStreamsSums);
  static constexpr int kWarpArrivals = kLanesRead ? kLanes : 1;
  // A warpgroup's part of y on its way out: kN tokens of 64 rows. Of the widest tiles it takes the place of the last
  // stages of x, one for each warpgroup.
  static constexpr int kOutputBytes = N_ * 128;
  static constexpr bool kOutputInStages = N_ == 256;
  static constexpr int kStagingBytes = kOutputInStages ? 0 : kWarpgroups * kOutputBytes;
  // Where k is split within a cluster, the inbox of sums (gemm_cluster.cuh) takes the place of what follows the table.
  static constexpr int kInboxBytes = kSplitsK ? std::max(kTileFragments, 1 << kMaxSplitLog) * kConsumers * 16 : 0;
  // Shared memory: stages of x | staging of y, if it fits | slots of words | barriers | ... | table at address
  // kTableAddress | the other stages | the other slots | staging of y
  static constexpr int kTableStart = kTableAddress - kSharedBase;
  static constexpr int kTableEnd = kTableStart + Table::kTableBytes;
  static constexpr int kBarrierBytes = 2 * (kStages + kSlots) * static_cast<int>(sizeof(uint64_t));
  static constexpr int kRoomBefore = kTableStart - kBarrierBytes;
  static constexpr int kStagesBefore = std::min(kStages, kRoomBefore / kStageBytes);
  static constexpr int kStagesGap = kTableEnd - kStagesBefore * kStageBytes;
  static constexpr int kStagesEnd = kTableEnd + (kStages - kStagesBefore) * kStageBytes;
  static constexpr bool kStagingBefore = kStagesBefore * kStageBytes + kScalesRoom + kStagingBytes <= kRoomBefore;
  static constexpr int kSlotsStart = kStagesBefore * kStageBytes + kScalesRoom + (kStagingBefore ? kStagingBytes : 0);
  static constexpr int kSlotsBefore = std::min(kSlots, (kRoomBefore - kSlotsStart) / kSlotBytes);
  static constexpr int kSlotsGap = kStagesEnd - kSlotsStart - kSlotsBefore * kSlotBytes;
  static constexpr int kBarriersStart = kSlotsStart + kSlotsBefore * kSlotBytes;
  static constexpr int kSlotsEnd = kStagesEnd + (kSlots - kSlotsBefore) * kSlotBytes;
  static constexpr int kStagingStart = kStagingBefore ? kStagesBefore * kStageBytes + kScalesRoom : kSlotsEnd;
  static constexpr int kScratchStart = kTableEnd;
  static constexpr int kSharedBytes =
      std::max(kSlotsEnd + (kStagingBefore ? 0 : kStagingBytes), kScratchStart + kInboxBytes);
  static_assert(!kIntegers || kStagesBefore == kStages);
  static_assert(kStageBytes % 1024 == 0 && kStagingStart % 1024 == 0 && kSharedBytes <= 227 * 1024);
  static_assert(!kStreamsSums || kRegisters / 4 % std::max(1, kStageSums* kStages) == 0);
  static_assert(!kOutputInStages || (kRegular && kStageBytes == kOutputBytes && kWarpgroups <= kStages));
};

}  // namespace higgs::cuda
