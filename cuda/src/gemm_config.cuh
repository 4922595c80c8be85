// Sizes of the GEMM kernel: warps, registers, shared memory.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "decode.cuh"
#include "higgs/cuda/plan.h"

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
  static constexpr int kWarpgroups = gemm_rows(N_, kShape) / 64;
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
  // 16-byte loads a warp keeps in flight: all of a slice, or half where accumulators or warps take most registers
  static constexpr int kWindow = (N_ == 256 || kWarpgroups == 4) && kLoads % 2 == 0 ? kLoads / 2 : kLoads;

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

}  // namespace higgs::cuda
