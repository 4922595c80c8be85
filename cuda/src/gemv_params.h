// Arguments of the decode kernel, filled in by linear.cpp from a LaunchPlan.
#pragma once

#include <cstdint>

#include "higgs/cuda/plan.h"

namespace higgs::cuda {

struct GemvPart {
  const std::uint8_t* data = nullptr;  // the tiled buffer
  void* y = nullptr;
  const void* bias = nullptr;
  float* partial = nullptr;          // fp32 [m, n] sums of the k launches so far
  std::uint32_t weights_offset = 0;  // in units of kTiledAlignment
  int n = 0;
  int first_cluster = 0;
  int clusters = 0;
  int rounds = 0;  // row tiles per warp, the same for all CTAs of the part
};

// Few bytes, the most urgent first: a launch starts with cold constant caches.
struct GemvParams {
  const void* x = nullptr;
  const float* d = nullptr;
  int m = 0;
  int k = 0;
  int group = 0;
  int slice_bytes = 0;
  int tile_bytes = 0;
  int inbox_floats = 0;
  std::uint16_t row_groups_of_scales = 0;  // scale groups of a row
  std::uint16_t slices = 0;                // of the whole row
  std::uint16_t first_slice = 0;           // of this launch
  std::uint16_t block = 0;
  std::uint8_t part_count = 0;
  std::uint8_t cluster = 0;
  std::uint8_t units_per_slice = 0;
  std::uint8_t last_units = 0;
  std::uint8_t cta_slices = 0;
  std::uint8_t cta_row_groups = 0;
  std::uint8_t batch = 0;
  std::uint8_t rotate_warps = 0;
  bool add_partial = false;    // not the first k launch
  bool store_partial = false;  // not the last k launch
  GemvPart parts[kMaxParts];
};

}  // namespace higgs::cuda
