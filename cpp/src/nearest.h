// Exact nearest-point search. For p <= 2 space is cut into cells, each with the few points that can be nearest to
// something in it; for p = 4 all points are tried. In a sign-symmetric grid only |u| and the magnitudes are compared.
#pragma once

#include <cstdint>
#include <vector>

#include "higgs/grid.h"

namespace higgs::detail {

struct NearestTable {
  const Grid* grid = nullptr;
  // Points component-major, [p][table_points], and h = |g|^2 / 2 of each: score(u, g) = h - u.g
  std::vector<float> components;
  std::vector<float> half_norms;

  // Cells (p <= 2): cell (cx, cy) covers [-extent + cx * width, ... + width) in each coordinate; candidates[cell][slot]
  // in ascending order, the last repeated to fill the slots. Cells that need more than kSlots have candidate
  // kTryAll in slot 0.
  static constexpr int kSlots = 4;
  static constexpr std::uint16_t kTryAll = 0xffff;
  int cells_per_axis = 0;
  float extent = 0;
  float inverse_width = 0;
  std::vector<std::uint16_t> candidates;
};

// Built on first use, kept for the life of the process. Thread safe.
[[nodiscard]] const NearestTable& nearest_table(const Grid& grid);

// Index of the nearest point to u[0, p) by trying all table_points: for values outside the cells or in a cell with too
// many candidates, and what the search by cells is tested against.
[[nodiscard]] std::uint16_t nearest_of_all(const NearestTable& table, const float* u) noexcept;

}  // namespace higgs::detail
