#include "trellis.h"

#include <mutex>

#include "higgs/numeric.h"

namespace higgs::detail {
namespace {

std::vector<std::uint16_t> to_halves(const Grid& grid) {
  std::vector<std::uint16_t> halves;
  halves.reserve(grid.points.size());
  for (const float g : grid.points) halves.push_back(f32_to_f16(g));
  return halves;
}

// make(grid), once per grid.
template <typename T>
const T& once_per_grid(const Grid& grid, T (*make)(const Grid&)) {
  struct Entry {
    std::once_flag once;
    T value;
  };
  static std::vector<Entry> entries(grids().size());
  Entry& entry = entries[static_cast<std::size_t>(&grid - grids().data())];
  std::call_once(entry.once, [&] { entry.value = make(grid); });
  return entry.value;
}

}  // namespace

TrellisTable make_trellis_table(const Grid& grid) {
  TrellisTable table;
  const int step_bits = grid.index_bits;
  const auto windows = static_cast<std::size_t>(grid.n_points);
  table.grid = &grid;
  table.states = 1 << (grid.window_bits - step_bits);
  table.groups = 1 << std::max(grid.window_bits - 2 * step_bits, 0);
  table.lanes = table.states / table.groups;
  table.branches = 1 << step_bits;
  table.norms.resize(windows);
  table.components.resize(windows * grid.p);
  std::size_t at = 0;
  for (int group = 0; group < table.groups; ++group) {
    for (int branch = 0; branch < table.branches; ++branch) {
      table.predecessor.push_back(table.position((group << step_bits | branch) % table.states));
      for (int lane = 0; lane < table.lanes; ++lane, ++at) {
        const std::size_t window = static_cast<std::size_t>(group + table.groups * lane) << step_bits | branch;
        double norm = 0;
        for (int c = 0; c < grid.p; ++c) {
          const float g = grid.points[window * grid.p + c];
          table.components[c * windows + at] = g;
          norm += static_cast<double>(g) * g;
        }
        table.norms[at] = static_cast<float>(norm);
      }
    }
  }
  return table;
}

const TrellisTable& trellis_table(const Grid& grid) { return once_per_grid(grid, make_trellis_table); }

const std::uint16_t* trellis_halves(const Grid& grid) { return once_per_grid(grid, to_halves).data(); }

}  // namespace higgs::detail
