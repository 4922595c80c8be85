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

// make(), once per grid and `kind` of what is made.
template <typename T, int Kinds, typename Make>
const T& once_per_grid(const Grid& grid, int kind, const Make& make) {
  struct Entry {
    std::once_flag once;
    T value;
  };
  static std::vector<Entry> entries(grids().size() * Kinds);
  Entry& entry = entries[static_cast<std::size_t>(&grid - grids().data()) * Kinds + kind];
  std::call_once(entry.once, [&] { entry.value = make(); });
  return entry.value;
}

double dot(const float* a, const float* b, int p) {
  double sum = 0;
  for (int c = 0; c < p; ++c) sum += static_cast<double>(a[c]) * b[c];
  return sum;
}

// [1 + p, position]: |entry|^2 and the components of entry(state).
template <typename Entry>
LineFloats terms_of_states(const TrellisTable& table, const Entry& entry) {
  const int p = table.grid->p;
  LineFloats terms(static_cast<std::size_t>(table.states) * (1 + p));
  for (int state = 0; state < table.states; ++state) {
    const float* g = entry(state);
    float* at = &terms[static_cast<std::size_t>(table.position(state))];
    *at = static_cast<float>(dot(g, g, p));
    for (int c = 0; c < p; ++c) *(at += table.states) = g[c];
  }
  return terms;
}

}  // namespace

TrellisTable make_trellis_table(const Grid& grid, int vector_lanes) {
  TrellisTable table;
  const int p = grid.p;
  const int step_bits = grid.index_bits;
  const float* points = grid.points.data();
  table.grid = &grid;
  table.additive = grid.trellis != nullptr && grid.trellis->kind == Trellis::Kind::additive;
  table.states = 1 << (grid.window_bits - step_bits);
  table.groups = 1 << std::max(grid.window_bits - 2 * step_bits, 0);
  table.lanes = table.states / table.groups;
  table.branches = 1 << step_bits;
  table.tile = table.additive ? std::min(2 * vector_lanes, table.lanes) : vector_lanes;
  for (std::int64_t w = 0; w < grid.n_points; ++w) {
    table.norms.push_back(static_cast<float>(dot(points + w * p, points + w * p, p)));
  }
  const auto lo = [&](int window) { return &grid.trellis->table[static_cast<std::size_t>(window % 256 * 2 * p)]; };
  const auto hi = [&](int window) {
    return &grid.trellis->table[static_cast<std::size_t>((window >> (grid.window_bits - 8)) * 2 * p + p)];
  };
  if (table.additive) {
    table.before = terms_of_states(table, lo);
    table.after = terms_of_states(table, [&](int state) { return hi(state << step_bits); });
  }
  for (int group = 0; group < table.groups; ++group) {
    for (int branch = 0; branch < table.branches; ++branch) {
      table.predecessor.push_back(table.position((group << step_bits | branch) % table.states));
    }
    for (int first = 0; first < table.lanes; first += table.tile) {
      for (int branch = 0; branch < table.branches; ++branch) {
        for (int term = 0; term < table.edge_terms(); ++term) {
          for (int lane = first; lane < first + table.tile; ++lane) {
            const int window = (group + table.groups * lane) << step_bits | branch;
            table.edges.push_back(table.additive ? static_cast<float>(2 * dot(lo(window), hi(window), p))
                                  : term == 0    ? table.norms[static_cast<std::size_t>(window)]
                                                 : points[static_cast<std::size_t>(window) * p + term - 1]);
          }
        }
      }
    }
  }
  return table;
}

const TrellisTable& trellis_table(const Grid& grid, int vector_lanes) {
  const int kind = vector_lanes == 16 ? 2 : vector_lanes == 8 ? 1 : 0;
  return once_per_grid<TrellisTable, 3>(grid, kind, [&] { return make_trellis_table(grid, vector_lanes); });
}

const std::uint16_t* trellis_halves(const Grid& grid) {
  return once_per_grid<std::vector<std::uint16_t>, 1>(grid, 0, [&] { return to_halves(grid); }).data();
}

}  // namespace higgs::detail
