#include "higgs/grid.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <list>
#include <string>
#include <vector>

#include "grid_data.h"
#include "higgs/error.h"

namespace higgs {
namespace {

std::string format_rate(double rate) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", rate);
  return text;
}

std::vector<float> with_all_signs(std::span<const float> magnitudes, int p) {
  std::vector<float> points;
  points.reserve(magnitudes.size() << p);
  for (unsigned signs = 0; signs >> p == 0; ++signs) {
    for (std::size_t i = 0; i < magnitudes.size(); ++i) {
      const bool negative = (signs >> i % static_cast<std::size_t>(p) & 1) != 0;
      points.push_back(negative ? -magnitudes[i] : magnitudes[i]);
    }
  }
  return points;
}

void add_vector_grids(std::vector<Grid>& list) {
  static std::list<std::vector<float>> expanded;
  for (int i = 0; i < detail::kGridDataCount; ++i) {
    const detail::GridData& d = detail::kGridData[i];
    const int bits = std::countr_zero(static_cast<unsigned>(d.n_points));
    Grid grid{d.name, d.p, d.n_points, bits, bits, d.t2, {}, nullptr, d.magnitudes};
    grid.points = {d.points, static_cast<std::size_t>(grid.table_points()) * static_cast<std::size_t>(d.p)};
    if (d.magnitudes > 0) grid.points = expanded.emplace_back(with_all_signs(grid.points, d.p));
    list.push_back(grid);
  }
}

std::vector<float> trellis_points(const Trellis& t, int p, int window_bits) {
  std::vector<float> points;
  points.reserve((std::size_t{1} << window_bits) * p);
  for (std::uint32_t window = 0; window >> window_bits == 0; ++window) {
    const std::uint32_t hash = window * t.multiplier;
    constexpr int kSignBit[] = {15, 31, 14, 30};
    for (int c = 0; c < p; ++c) {
      if (t.kind == Trellis::Kind::additive) {
        const float lo = t.table[(window & 255) * 2 * p + c];
        points.push_back(lo + t.table[(window >> (window_bits - 8)) * 2 * p + p + c]);
      } else {
        const float magnitude = t.table[(hash >> 16) % static_cast<std::uint32_t>(t.rows) * p + c];
        points.push_back((hash >> kSignBit[c] & 1) != 0 ? -magnitude : magnitude);
      }
    }
  }
  return points;
}

// Grids with the same table differ in index_bits alone, so they share their points.
void add_trellis_grids(std::vector<Grid>& list) {
  struct Expanded {
    Trellis trellis;
    std::vector<float> points;
  };
  static std::list<Expanded> tables;
  for (int i = 0; i < detail::kTrellisDataCount; ++i) {
    const detail::TrellisData& d = detail::kTrellisData[i];
    if (tables.empty() || tables.back().trellis.table.data() != d.table) {
      const bool additive = d.kind == Trellis::Kind::additive;
      const auto size = static_cast<std::size_t>(d.rows * d.p * (additive ? 2 : 1));
      const Trellis t{d.kind, d.multiplier, d.rows, {d.table, size}, additive ? 256 : 512, additive ? 4 : 1};
      tables.push_back({t, trellis_points(t, d.p, d.window_bits)});
    }
    const Expanded& e = tables.back();
    list.push_back({d.name, d.p, 1 << d.window_bits, d.index_bits, d.window_bits, d.t2, e.points, &e.trellis});
  }
}

}  // namespace

std::span<const Grid> grids() {
  static const std::vector<Grid> all = [] {
    std::vector<Grid> list;
    add_vector_grids(list);
    add_trellis_grids(list);
    return list;
  }();
  return all;
}

const Grid& find_grid(std::string_view name) {
  for (const Grid& g : grids()) {
    if (g.name == name) return g;
  }
  std::string legal;
  for (const Grid& g : grids()) legal += (legal.empty() ? "" : ", ") + std::string(g.name);
  throw Error(ErrorCode::invalid_argument, "grid: unknown grid '" + std::string(name) + "'; use one of " + legal);
}

const Grid& grid_for_bits(double bits) {
  const Grid* best = nullptr;
  std::vector<double> rates;
  for (const Grid& g : grids()) {
    if (g.trellis != nullptr) continue;
    rates.push_back(g.rate());
    if (g.rate() == bits && (best == nullptr || g.t2 < best->t2)) best = &g;
  }
  if (best != nullptr) return *best;
  std::ranges::sort(rates);
  rates.erase(std::unique(rates.begin(), rates.end()), rates.end());
  std::string legal;
  for (double r : rates) legal += (legal.empty() ? "" : ", ") + format_rate(r);
  throw Error(ErrorCode::invalid_argument, "bits: no grid of " + format_rate(bits) + " bits; use one of " + legal);
}

}  // namespace higgs
