// Trellis grids as kernel arguments.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "higgs/cuda/tiled_format.h"
#include "higgs/error.h"
#include "higgs/numeric.h"

namespace higgs::cuda {

inline constexpr float kTrellisStep = 1.0f / 32;  // entries are integers times this, see kTrellisOffset
static_assert(kTrellisStep == kQuadStep);         // so that digits of x in order serve quads and sums alike

// Entry w: hi[w] of both weights, then lo[w], in bytes; T1 and T2 of trellis.cuh. That counts steps from where the
// first window of the run is a hi: its window i is window i + shift of FORMAT.md.
struct TrellisTable {
  static constexpr int kCapacity = 512;  // as if it had fp16 values, see GridPoints
  int bits = 0;
  int shift = 0;
  alignas(16) std::uint32_t entries[256] = {};
};

[[nodiscard]] inline bool is_additive(const Grid& grid) noexcept {
  return grid.trellis != nullptr && grid.trellis->kind == Trellis::Kind::additive;
}

// Throws Error(unsupported) for a trellis grid without a kernel.
[[nodiscard]] inline TrellisTable make_trellis_table(const Grid& grid) {
  const FieldShape shape = field_shape(grid);
  TrellisTable t;
  t.bits = shape.bits;
  t.shift = shape.shift;
  for (std::size_t w = 0; w < 256; ++w) {
    for (std::size_t c = 0; c < 4; ++c) {
      const float entry = grid.trellis->table[w * 4 + (c < 2 ? c + 2 : c - 2)] / kTrellisStep;
      if (entry != std::nearbyint(entry) || entry < -kTrellisOffset || entry >= kTrellisOffset) {
        throw Error(ErrorCode::unsupported, "trellis grid " + std::string(grid.name) +
                                                " has entries that are no multiples of 1/32 from -2 to 63/32");
      }
      t.entries[w] |= static_cast<std::uint32_t>(static_cast<int>(entry) & 0xff) << (8 * c);
    }
  }
  return t;
}

// A hashed grid: what Trellis (grid.h) says of it, magnitudes in fp16.
struct HashedTrellis {
  static constexpr int kCapacity = 2048;
  int p = 0;
  int bits = 0;
  int rows = 0;  // a power of two
  std::uint32_t multiplier = 0;
  alignas(16) std::uint16_t values[kCapacity] = {};
};

[[nodiscard]] inline HashedTrellis make_hashed_trellis(const Grid& grid) {
  HashedTrellis t{grid.p, grid.index_bits, grid.trellis->rows, grid.trellis->multiplier};
  for (std::size_t i = 0; i < grid.trellis->table.size(); ++i) t.values[i] = f32_to_f16(grid.trellis->table[i]);
  return t;
}

}  // namespace higgs::cuda
