// Arguments of the GEMM kernels (gemm_sm90.cuh, gemm_mma.cuh), filled in by linear.cpp from a GemmPlan.
#pragma once

#include <cstdint>

#include "higgs/cuda/plan.h"
#include "slice_params.h"
#include "tensor_map.h"

namespace higgs::cuda {

inline constexpr int kBlockColumns = 64;  // of a k block: a 128-byte row of packed x
inline constexpr int kBlockSteps = kBlockColumns / 16;
inline constexpr int kRowBytes = kBlockColumns * 2;
inline constexpr int kPackBytesRegisters = 72;  // of a thread of pack_x that makes digits

struct GemmPart {
  const std::uint8_t* data = nullptr;  // the tiled buffer
  void* y = nullptr;
  const void* bias = nullptr;
  std::uint32_t weights_offset = 0;  // in units of kTiledAlignment
  int n = 0;
  int row_tiles = 0;
  int first_row_block = 0;
  bool mapped = false;  // y, by GemmParams::y
};

struct GemmParams : SliceParams {
  const void* x = nullptr;  // packed by pack_x: [k / 64][padded_m][64 columns], swizzled
  float* partials = nullptr;
  std::uint32_t* flags = nullptr;  // one per set of partial sums, cleared by pack_x
  int m = 0;
  int padded_m = 0;
  int k_blocks = 0;      // of 64 columns
  int group_blocks = 0;  // of a scale group
  int row_blocks = 0;    // of all parts
  int tiles = 0;         // row blocks x token tiles, token tile by token tile
  int split_tiles = 0;   // shared out slice by slice, the others whole (gemm_schedule.cuh)
  int clusters = 0;
  int k_split_log = 0;         // of the CTAs of a cluster that share a tile's slices; > 0: one tile per cluster
  int slices_per_cluster = 0;  // of the shared tiles; the first `longer_clusters` take one more
  int longer_clusters = 0;
  int part_count = 0;
  std::uint32_t zero = 0;  // which the compiler does not know: what is computed from v & zero waits for v
  GemmPart parts[kMaxParts];
  TensorMap y[kMaxParts];  // of the wgmma kernel: boxes of 64 rows of W by the tokens of a tile
};

}  // namespace higgs::cuda
