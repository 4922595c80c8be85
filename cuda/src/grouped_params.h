// Arguments of the kernel for experts, filled in by grouped.cpp from a GroupedPlan.
#pragma once

#include <cstdint>

#include "slice_params.h"

namespace higgs::cuda {

struct GroupedParams : SliceParams {
  const void* x = nullptr;  // packed (pack_x.h), padded to `rows`
  const std::int32_t* offsets = nullptr;
  const std::uint8_t* data = nullptr;  // the tiled buffer
  void* y = nullptr;
  std::uint32_t weights_offset = 0;  // in units of kTiledAlignment
  int experts = 0;
  int rows = 0;       // of x
  int n = 0;          // rows of an expert
  int row_tiles = 0;  // of an expert
  int k = 0;
  int group_halves = 0;  // half units (64 columns) of a scale group
  int tokens = 0;
  int slices_per_warp = 0;
  int k_warps = 0;
  int row_groups = 0;
  int rounds = 0;
  int max_items = 0;
};

// Shared memory behind the table, in this order: items, partial sums (two rounds), x.
struct GroupedItem {
  int expert = 0;
  int first = 0;  // row of x
  int count = 0;
};
inline constexpr int kGroupedPartialStride = 20;  // floats of 16 rows: spreads the tokens over the banks

constexpr int round_up(int bytes) { return (bytes + 15) / 16 * 16; }
constexpr int grouped_item_bytes(int max_items, int experts) {
  return round_up(max_items * static_cast<int>(sizeof(GroupedItem)) + 4 * (experts + 1));
}
constexpr int grouped_partial_bytes(int warps, int tokens) { return warps * tokens * kGroupedPartialStride * 4; }
// Values of a row of x: whole units, and rows 64 bytes apart modulo 128 (see rotate_x.cuh).
constexpr int grouped_x_stride(int k) { return (k + 127) / 128 * 128 + 32; }

}  // namespace higgs::cuda
