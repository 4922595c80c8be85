// The tables behind the encoder and the decoders of trellis grids.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "higgs/grid.h"
#include "higgs/packed_format.h"

namespace higgs::detail {

inline constexpr int kTrellisRuns = 4;  // encoded at once, so that each value loaded serves four

// A search forward through a run. Before step t its state is the bits of window t that are known then, the low
// window_bits - index_bits; window t leads to state window >> index_bits. The states that follow and share their low
// bits share their predecessors and lie side by side: at [group, lane] is state group + groups * lane.
struct TrellisTable {
  const Grid* grid = nullptr;
  int states = 0;
  int groups = 0;
  int lanes = 0;                          // a multiple of 16
  int branches = 0;                       // windows that lead to one state: 2^index_bits
  std::vector<float> norms;               // [group, branch, lane]: |point|^2
  std::vector<float> components;          // [p, group, branch, lane]
  std::vector<std::int32_t> predecessor;  // [group, branch]: where the state before lies

  [[nodiscard]] int position(int state) const noexcept { return state % groups * lanes + state / groups; }
  [[nodiscard]] int state_at(int position) const noexcept { return position / lanes + groups * (position % lanes); }
};

[[nodiscard]] TrellisTable make_trellis_table(const Grid& grid);

// The table of one of grids(): built on first use, kept for the life of the process. Thread safe.
[[nodiscard]] const TrellisTable& trellis_table(const Grid& grid);

// fp16 bits of the points [n_points, p] of a trellis grid; kept like the table.
[[nodiscard]] const std::uint16_t* trellis_halves(const Grid& grid);

// Steps to each side of the bite that the search for it takes in: around a short run, partly twice.
[[nodiscard]] constexpr int bite_side(int index_bits, int steps) noexcept {
  constexpr int kBits = 192;
  return std::min((kBits + index_bits - 1) / index_bits, steps / 4 * 3);
}

// Rows of costs of a search: before the first step and after each.
[[nodiscard]] constexpr int trellis_rows(int index_bits, int steps) noexcept {
  return std::max(steps, 2 * bite_side(index_bits, steps)) + 1;
}

// Floats of scratch for encode_runs with runs of up to `columns` columns.
[[nodiscard]] inline std::int64_t trellis_costs(const TrellisTable& table, int columns) noexcept {
  return std::int64_t{kTrellisRuns} * trellis_rows(table.grid->index_bits, columns / table.grid->p) * table.states;
}

}  // namespace higgs::detail
