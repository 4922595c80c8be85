#include "nearest.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>

#include "higgs/packed_format.h"

namespace higgs::detail {
namespace {

struct Box {
  double low[2];
  double high[2];
};

// Points not beaten everywhere in the box by a single other one. The difference of two squared distances is linear, so
// its sign on the corners decides. Every point that is nearest somewhere in the box is kept.
std::vector<std::uint16_t> undominated(const NearestTable& table, const std::vector<std::uint16_t>& from,
                                       const Box& box) {
  const Grid& grid = *table.grid;
  const int p = grid.p;
  const int corners = 1 << p;
  constexpr double kRounding = 1e-5;  // far above the error of an fp32 score
  std::vector<std::array<double, 4>> distance(from.size());
  for (std::size_t i = 0; i < from.size(); ++i) {
    for (int corner = 0; corner < corners; ++corner) {
      double d = 0;
      for (int c = 0; c < p; ++c) {
        const double x = (corner >> c & 1) != 0 ? box.high[c] : box.low[c];
        const double g = grid.points[static_cast<std::size_t>(from[i]) * p + c];
        d += g * g - 2 * x * g;  // |x - g|^2 up to |x|^2
      }
      distance[i][corner] = d;
    }
  }
  const auto beats = [&](std::size_t a, std::size_t b) {
    for (int corner = 0; corner < corners; ++corner) {
      if (distance[a][corner] + kRounding >= distance[b][corner]) return false;
    }
    return true;
  };
  // The one with the least mean distance beats nearly all: compare with it first.
  std::size_t central = 0;
  const auto mean = [&](std::size_t i) {
    double sum = 0;
    for (int corner = 0; corner < corners; ++corner) sum += distance[i][corner];
    return sum;
  };
  for (std::size_t i = 1; i < from.size(); ++i) {
    if (mean(i) < mean(central)) central = i;
  }
  std::vector<std::size_t> rest;
  for (std::size_t i = 0; i < from.size(); ++i) {
    if (!beats(central, i)) rest.push_back(i);
  }
  std::vector<std::uint16_t> kept;
  for (std::size_t i : rest) {
    bool beaten = false;
    for (std::size_t j : rest) beaten = beaten || beats(j, i);
    if (!beaten) kept.push_back(from[i]);
  }
  return kept;
}

void fill_cells(NearestTable& table) {
  constexpr int kCoarse = 16;  // fine cells per coarse cell and axis
  const int p = table.grid->p;
  const int axis = table.cells_per_axis;
  const int rows = p == 2 ? axis : 1;
  const double width = 2.0 * table.extent / axis;
  const auto box = [&](int cx, int cy, int size) {
    constexpr double kMargin = 1e-5;  // a value next to the border may be put in the neighbouring cell
    const double x = -table.extent + cx * width;
    const double y = -table.extent + cy * width;
    return Box{{x - kMargin, y - kMargin}, {x + size * width + kMargin, y + size * width + kMargin}};
  };
  std::vector<std::uint16_t> all(static_cast<std::size_t>(table.grid->n_points));
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);

  table.candidates.resize(static_cast<std::size_t>(axis) * rows * NearestTable::kSlots);
  for (int y0 = 0; y0 < rows; y0 += kCoarse) {
    for (int x0 = 0; x0 < axis; x0 += kCoarse) {
      const std::vector<std::uint16_t> near = undominated(table, all, box(x0, y0, kCoarse));
      for (int cy = y0; cy < std::min(rows, y0 + kCoarse); ++cy) {
        for (int cx = x0; cx < x0 + kCoarse; ++cx) {
          const std::vector<std::uint16_t> kept = undominated(table, near, box(cx, cy, 1));
          std::uint16_t* slots = &table.candidates[(static_cast<std::size_t>(cy) * axis + cx) * NearestTable::kSlots];
          for (std::size_t s = 0; s < NearestTable::kSlots; ++s) slots[s] = kept[std::min(s, kept.size() - 1)];
          if (kept.size() > NearestTable::kSlots) slots[0] = NearestTable::kTryAll;
        }
      }
    }
  }
}

std::unique_ptr<NearestTable> build(const Grid& grid) {
  auto table = std::make_unique<NearestTable>();
  table->grid = &grid;
  const auto n = static_cast<std::size_t>(grid.table_points());
  table->components.resize(n * grid.p);
  table->half_norms.resize(n);
  for (std::size_t i = 0; i < n; ++i) {
    double norm = 0;
    for (int c = 0; c < grid.p; ++c) {
      const float g = grid.points[i * grid.p + c];
      table->components[c * n + i] = g;
      norm += static_cast<double>(g) * g;
    }
    table->half_norms[i] = static_cast<float>(norm / 2);
  }
  if (grid.p <= 2) {
    table->extent = 5.25f;  // beyond it, a few values in ten million, all points are tried
    table->cells_per_axis = grid.p == 1 ? 8192 : grid.n_points <= 256 ? 256 : 512;
    table->inverse_width = static_cast<float>(table->cells_per_axis / (2.0 * table->extent));
    fill_cells(*table);
  }
  return table;
}

}  // namespace

const NearestTable& nearest_table(const Grid& grid) {
  struct Entry {
    std::once_flag once;
    std::unique_ptr<NearestTable> table;
  };
  static std::vector<Entry> entries(grids().size());
  const auto i = static_cast<std::size_t>(&grid - grids().data());
  std::call_once(entries[i].once, [&] { entries[i].table = build(grid); });
  return *entries[i].table;
}

std::uint16_t nearest_of_all(const NearestTable& table, const float* u) noexcept {
  const Grid& grid = *table.grid;
  const int n = grid.table_points();
  float magnitude[kMaxP];
  int signs = 0;
  for (int c = 0; c < grid.p; ++c) {
    const bool negative = grid.magnitudes > 0 && u[c] < 0;
    magnitude[c] = negative ? -u[c] : u[c];
    signs |= negative ? n << c : 0;
  }
  std::uint16_t best = 0;
  float best_score = std::numeric_limits<float>::infinity();
  for (int g = 0; g < n; ++g) {
    float t = table.half_norms[g];
    for (int c = 0; c < grid.p; ++c) t = std::fma(-magnitude[c], table.components[c * n + g], t);
    if (t < best_score) {
      best = static_cast<std::uint16_t>(g);
      best_score = t;
    }
  }
  return static_cast<std::uint16_t>(best | signs);
}

}  // namespace higgs::detail
