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
  std::int64_t to_next_block = 0;    // bytes from behind a warp's words of a row block to those of its next one
  std::uint32_t weights_offset = 0;  // in units of kTiledAlignment
  int scales_step = 0;               // scales from a row block of a warp to its next one
  int n = 0;
  int first_cluster = 0;
  int clusters = 0;
  int rounds = 0;  // row blocks per warp, the same for all CTAs of the part
};

// quotient(i, inverse_of(d)) == i / d where i * d < 2^20 and i / d < 2^12.
inline constexpr int kInverseBits = 20;
constexpr std::uint32_t inverse_of(int d) { return (1u << kInverseBits) / static_cast<std::uint32_t>(d) + 1; }
constexpr int quotient(std::uint32_t i, std::uint32_t inverse) { return static_cast<int>(i * inverse >> kInverseBits); }

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
  float norm = 1;                          // remaining_norm(block)
  std::uint32_t inverse_m = 0;             // inverse_of(m)
  std::uint32_t inverse_row_groups = 0;    // inverse_of(cta_row_groups)
  std::uint16_t row_groups_of_scales = 0;  // scale groups of a row
  std::uint16_t slices = 0;                // of the whole row
  std::uint16_t first_slice = 0;           // of this launch
  std::uint16_t block = 0;
  std::uint8_t part_count = 0;
  std::uint8_t cluster = 0;
  std::uint8_t units_per_slice = 0;  // slices of a warp
  std::uint8_t last_units = 0;
  std::uint8_t cta_slices = 0;
  std::uint8_t cta_row_groups = 0;
  std::uint8_t batch = 0;
  std::uint8_t iterations = 0;  // of the main loop per row block
  std::uint8_t rotate_warps = 0;
  std::uint8_t chunks = 0;        // of x in shared memory, at most
  std::uint8_t layout_units = 0;  // trellis: units of 256 columns of a slice of the layout
  bool add_partial = false;       // not the first k launch
  bool store_partial = false;     // not the last k launch
  GemvPart parts[kMaxParts];
};

// The part of the rotation's norm 1 / sqrt(block) that is no power of two: the kernel rotates without it
// (rotate_x.cuh).
constexpr float remaining_norm(int block) { return block == 128 || block == 512 ? 0.70710678f : 1.0f; }

}  // namespace higgs::cuda
