// Grids of two families; points are exactly representable in fp16.
//
// Vector grids ("p2_n256"): tables of n_points points in R^p that are MSE-optimal for N(0, I_p) (arXiv 2411.17525,
// section 4), and the constrained uniform 8-bit grid of the same paper ("ch8"). An index is the number of a point. One
// is sign-symmetric ("p4_n4096"): 256 magnitudes with every choice of signs, so searches and look-ups need only these.
//
// Trellis grids ("t2_b8", "a2_b8"): an index is b bits of a stream, and the point of step t is chosen by a window of
// more bits, those of the indices that follow too. So n_points is 2^window_bits, far more than 2^index_bits, and an
// encoder picks the best stream (cpp/FORMAT.md, "Trellis grids").
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace higgs {

// Entries of additive tables are multiples of it, from -64 to 63.
inline constexpr float kAdditiveStep = 1.0f / 32;

// Where the points of a trellis grid come from: point = f(window).
struct Trellis {
  // hash: h = window * multiplier mod 2^32. Magnitudes are row (h >> 16) mod rows of `table` [rows, p]; weight 0, 1, 2
  // and 3 are negative if bit 15, 31, 14 and 30 of h is set.
  // additive: with rows [lo, hi] of `table` [256, 2 * p], lo of the lowest plus hi of the highest 8 bits of the window.
  enum class Kind { hash, additive };
  Kind kind = Kind::hash;
  std::uint32_t multiplier = 0;  // of the hash
  int rows = 0;
  std::span<const float> table;
  // How a row is cut into runs (packed_format.h).
  int run_group = 0;  // columns of a group, a power of two
  int runs = 0;       // of a group
};

struct Grid {
  std::string_view name;          // "p2_n256": the identifier used in files, on the command line and in Python
  int p = 0;                      // weights per index
  int n_points = 0;               // 2^window_bits
  int index_bits = 0;             // bits stored per p weights
  int window_bits = 0;            // bits that choose a point: index_bits in vector grids, more in trellis grids
  double t2 = 0;                  // E ||x - Q(x)||^2 / p for x ~ N(0, I_p); of trellis grids as measured in long blocks
  std::span<const float> points;  // [n_points, p]
  const Trellis* trellis = nullptr;  // null: a vector grid
  // Of a sign-symmetric grid, else 0: the first `magnitudes` points, a power of two, are positive in every coordinate.
  // Point g + magnitudes * s is point g with minus at every coordinate c whose bit c of s is set.
  int magnitudes = 0;

  // Bits per weight without scales.
  [[nodiscard]] double rate() const noexcept { return static_cast<double>(index_bits) / p; }

  // The first points, from which the others follow by signs: the magnitudes, or all.
  [[nodiscard]] int table_points() const noexcept { return magnitudes > 0 ? magnitudes : n_points; }
};

[[nodiscard]] std::span<const Grid> grids();

// Throws Error(invalid_argument) with the list of names if there is no such grid.
[[nodiscard]] const Grid& find_grid(std::string_view name);

// The vector grid with the lowest t2 among those of exactly this rate; throws with the legal rates if there is none.
[[nodiscard]] const Grid& grid_for_bits(double bits);

}  // namespace higgs
