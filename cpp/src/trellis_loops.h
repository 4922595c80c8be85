// The Viterbi search of trellis grids (FORMAT.md, "Trellis grids"), compiled once per instruction set like
// block_loops.h, whose vectors it uses.
#pragma once

#include "block_loops.h"
#include "trellis.h"

namespace higgs::detail {
namespace {

inline Vec least(Vec a, Vec b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_min_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__FMA__)
  return reinterpret_cast<Vec>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

// Costs are |x - point|^2 - |x|^2 summed along the best path to a state: fma(-2 x_1, g_1, fma(-2 x_0, g_0, cost +
// |g|^2)).
template <int P>
struct TrellisSearch {
  const TrellisTable& table;
  int steps;     // of a run
  float* costs;  // [run, rows, state]
  int side = bite_side(table.grid->index_bits, steps);
  int rows = trellis_rows(table.grid->index_bits, steps);

  [[nodiscard]] float* row(int run, int k) const {
    return costs + (static_cast<std::int64_t>(run) * rows + k) * table.states;
  }

  // One step of every run, from costs row k to row k + 1.
  void step(const float* const* x, int k) const {
    const std::int64_t windows = table.grid->n_points;
    for (int group = 0; group < table.groups; ++group) {
      const std::int32_t* predecessor = &table.predecessor[static_cast<std::size_t>(group) * table.branches];
      for (int lane = 0; lane < table.lanes; lane += kLanes) {
        Vec best[kTrellisRuns];
        for (Vec& b : best) b = Vec{} + __builtin_huge_valf();
        const float* norm_at = table.norms.data() + std::int64_t{group} * table.branches * table.lanes + lane;
        const float* component_at = table.components.data() + (norm_at - table.norms.data());
        for (int j = 0; j < table.branches; ++j, norm_at += table.lanes, component_at += table.lanes) {
          Vec norm;
          Vec g[P];
          std::memcpy(&norm, norm_at, sizeof norm);
          for (int c = 0; c < P; ++c) std::memcpy(&g[c], component_at + c * windows, sizeof norm);
          for (int r = 0; r < kTrellisRuns; ++r) {
            Vec cost = norm + row(r, k)[predecessor[j]];
            for (int c = 0; c < P; ++c) cost = fused_multiply_add(Vec{} - 2 * x[r][c], g[c], cost);
            best[r] = least(best[r], cost);
          }
        }
        for (int r = 0; r < kTrellisRuns; ++r) {
          std::memcpy(row(r, k + 1) + group * table.lanes + lane, &best[r], sizeof best[r]);
        }
      }
    }
  }

  // `count` steps from step `first` on, cyclic, from the given state or (-1) from any.
  void forward(const float* const* values, int first, int count, const int* start) const {
    for (int r = 0; r < kTrellisRuns; ++r) {
      const float other = start[r] < 0 ? 0.0f : __builtin_huge_valf();
      for (int s = 0; s < table.states; ++s) row(r, 0)[s] = other;
      if (start[r] >= 0) row(r, 0)[table.position(start[r])] = 0.0f;
    }
    for (int k = 0; k < count; ++k) {
      const int t = (first + k) % steps;
      const float* x[kTrellisRuns];
      for (int r = 0; r < kTrellisRuns; ++r) x[r] = values[r] + t * P;
      step(x, k);
    }
  }

  // The window before `state` on the best path there: among equal costs the lowest.
  [[nodiscard]] std::uint32_t window_before(int run, int k, const float* x, int state) const {
    const float* points = table.grid->points.data();
    const std::uint32_t base = static_cast<std::uint32_t>(state) << table.grid->index_bits;
    const std::int32_t* predecessor =
        &table.predecessor[static_cast<std::size_t>(state % table.groups) * table.branches];
    const int lane = state / table.groups;
    const float* norms =
        &table.norms[(static_cast<std::size_t>(state % table.groups) * table.branches) * table.lanes + lane];
    float best_cost = __builtin_huge_valf();
    std::uint32_t best = base;
    for (int j = 0; j < table.branches; ++j) {
      float cost = norms[static_cast<std::int64_t>(j) * table.lanes] + row(run, k)[predecessor[j]];
      for (int c = 0; c < P; ++c) cost = __builtin_fmaf(-2 * x[c], points[(base + j) * P + c], cost);
      best = cost < best_cost ? base + j : best;
      best_cost = cost < best_cost ? cost : best_cost;
    }
    return best;
  }

  // Follows the best path of one run back from `state` after `count` steps; calls use(step, window). Returns the state
  // before the first step.
  template <typename Use>
  int backward(const float* values, int run, int first, int count, int state, const Use& use) const {
    for (int k = count - 1; k >= 0; --k) {
      const int t = (first + k) % steps;
      const std::uint32_t window = window_before(run, k, values + t * P, state);
      use(t, window);
      state = static_cast<int>(window) & (table.states - 1);
    }
    return state;
  }

  // The state at the bite: on the best path through the steps around it, with free ends.
  void find_bites(const float* const* values, int* bites) const {
    for (int r = 0; r < kTrellisRuns; ++r) bites[r] = -1;
    forward(values, steps - side, 2 * side, bites);
    for (int r = 0; r < kTrellisRuns; ++r) {
      const float* last = row(r, 2 * side);
      int best = 0;  // the lowest state among equals
      for (int s = 1; s < table.states; ++s) {
        if (last[table.position(s)] < last[table.position(best)]) best = s;
      }
      backward(values[r], r, steps - side, 2 * side, best, [&](int t, std::uint32_t window) {
        if (t == 0) bites[r] = static_cast<int>(window) & (table.states - 1);
      });
    }
  }

  void encode(const float* const* values, std::uint16_t* const* indices, float* const* points) const {
    int bites[kTrellisRuns];
    find_bites(values, bites);
    forward(values, 0, steps, bites);
    for (int r = 0; r < kTrellisRuns; ++r) {
      backward(values[r], r, 0, steps, bites[r], [&](int t, std::uint32_t window) {
        indices[r][t] = static_cast<std::uint16_t>(window & (static_cast<std::uint32_t>(table.branches) - 1));
        for (int c = 0; c < P; ++c) points[r][t * P + c] = table.grid->points[window * P + c];
      });
    }
  }
};

void encode_runs(const TrellisTable& table, const float* const* values, int columns, float* costs,
                 std::uint16_t* const* indices, float* const* points) {
  const int steps = columns / table.grid->p;
  if (table.grid->p == 2) {
    TrellisSearch<2>{table, steps, costs}.encode(values, indices, points);
  } else {
    TrellisSearch<4>{table, steps, costs}.encode(values, indices, points);
  }
}

}  // namespace
}  // namespace higgs::detail
