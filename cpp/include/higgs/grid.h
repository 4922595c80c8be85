// Grids: tables of n_points points in R^p that are MSE-optimal for N(0, I_p) (arXiv 2411.17525, section 4), and the
// constrained uniform 8-bit grid of the same paper ("ch8"). Points are exactly representable in fp16.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace higgs {

struct Grid {
  std::string_view name;          // "p2_n256": the identifier used in files, on the command line and in Python
  int p = 0;                      // weights per index
  int n_points = 0;               // a power of two
  int index_bits = 0;             // log2(n_points)
  double t2 = 0;                  // E ||x - Q(x)||^2 / p for x ~ N(0, I_p)
  std::span<const float> points;  // [n_points, p]

  // Bits per weight without scales.
  [[nodiscard]] double rate() const noexcept { return static_cast<double>(index_bits) / p; }
};

[[nodiscard]] std::span<const Grid> grids();

// Throws Error(invalid_argument) with the list of names if there is no such grid.
[[nodiscard]] const Grid& find_grid(std::string_view name);

// The grid with the lowest t2 among those of exactly this rate; throws with the legal rates if there is none.
[[nodiscard]] const Grid& grid_for_bits(double bits);

}  // namespace higgs
