#include "higgs/grid.h"

#include <algorithm>
#include <bit>
#include <cstdio>
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

}  // namespace

std::span<const Grid> grids() {
  static const std::vector<Grid> all = [] {
    std::vector<Grid> list;
    for (int i = 0; i < detail::kGridDataCount; ++i) {
      const detail::GridData& d = detail::kGridData[i];
      const auto n = static_cast<unsigned>(d.n_points);
      list.push_back({d.name,
                      d.p,
                      d.n_points,
                      std::countr_zero(n),
                      d.t2,
                      {d.points, static_cast<std::size_t>(d.n_points) * static_cast<std::size_t>(d.p)}});
    }
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
