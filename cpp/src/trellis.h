// The tables behind the encoder and the decoders of trellis grids.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#include "higgs/grid.h"
#include "higgs/packed_format.h"

namespace higgs::detail {

inline constexpr int kTrellisRuns = 4;  // encoded at once, so that each value loaded serves four

// Floats that begin a cache line, so that no vector of them lies in two.
template <typename T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  LineAllocator() = default;
  template <typename U>
  explicit LineAllocator(const LineAllocator<U>& /*other*/) noexcept {}

  [[nodiscard]] T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kLine)); }
  void deallocate(T* p, std::size_t /*n*/) noexcept { ::operator delete(p, kLine); }
  bool operator==(const LineAllocator& /*other*/) const noexcept { return true; }
};
using LineFloats = std::vector<float, LineAllocator<float>>;

// A search forward through a run. Before step t its state is the bits of window t that are known then, the low
// window_bits - index_bits; window t leads to state window >> index_bits. The states that follow and share their low
// bits share their predecessors and lie side by side: at [group, lane] is state group + groups * lane.
//
// The cost of a window is |point|^2 - 2 x point. In an additive grid, where the point is lo + hi, lo follows from the
// state before and hi from the state after, and the cost is
//   (|lo|^2 - 2 x lo) + (|hi|^2 - 2 x hi) + 2 lo hi
// of which only the last term has to be looked up, and nothing multiplied, for every window.
struct TrellisTable {
  const Grid* grid = nullptr;
  bool additive = false;
  int states = 0;
  int groups = 0;
  int lanes = 0;                          // a multiple of 16
  int branches = 0;                       // windows that lead to one state: 2^index_bits
  int tile = 0;                           // lanes whose edges lie side by side
  LineFloats edges;                       // [group, lane / tile, branch, edge_terms(), lane % tile]
  std::vector<float> norms;               // [window]: |point|^2
  LineFloats before;                      // additive: [1 + p, position of the state before]: |lo|^2 and lo
  LineFloats after;                       // additive: [1 + p, position of the state after]: |hi|^2 and hi
  std::vector<std::int32_t> predecessor;  // [group, branch]: position of the state before

  // Of an edge: 2 lo hi in an additive grid, else |point|^2 and the components of the point.
  [[nodiscard]] int edge_terms() const noexcept { return additive ? 1 : 1 + grid->p; }
  [[nodiscard]] int position(int state) const noexcept { return state % groups * lanes + state / groups; }
  [[nodiscard]] int state_at(int position) const noexcept { return position / lanes + groups * (position % lanes); }
};

// For a search with vectors of `vector_lanes` floats, at most 16.
[[nodiscard]] TrellisTable make_trellis_table(const Grid& grid, int vector_lanes);

// The table of one of grids(): built on first use, kept for the life of the process. Thread safe.
[[nodiscard]] const TrellisTable& trellis_table(const Grid& grid, int vector_lanes);

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
  const int rows = trellis_rows(table.grid->index_bits, columns / table.grid->p) + 1;
  return std::int64_t{kTrellisRuns} * rows * table.states;
}

}  // namespace higgs::detail
