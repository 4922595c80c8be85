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

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Costs are |x - point|^2 - |x|^2 summed along the best path to a state: fma(-2 x_1, g_1, fma(-2 x_0, g_0, cost +
// |g|^2)). In an additive grid they are multiples of 1/4096 below 4096, also all sums on the way: nothing is rounded.
template <int P>
struct TrellisSearch {
  const TrellisTable& table;
  int steps;     // of a run
  float* costs;  // [run, rows + 1, position of state]; the last row is scratch of a step
  int side = bite_side(table.grid->index_bits, steps);
  int rows = trellis_rows(table.grid->index_bits, steps);

  [[nodiscard]] float* row(int run, int k) const {
    return costs + (static_cast<std::int64_t>(run) * (rows + 1) + k) * table.states;
  }

  // What a step needs of every run.
  struct Runs {
    Vec factor[kTrellisRuns][P];  // -2 x
    const float* from[kTrellisRuns];
    float* to[kTrellisRuns];
    float* scratch[kTrellisRuns];
  };

  // One step of every run, from costs row k to row k + 1.
  void step(const float* const* x, int k) const {
    Runs runs;
    for (int r = 0; r < kTrellisRuns; ++r) {
      for (int c = 0; c < P; ++c) runs.factor[r][c] = Vec{} - 2 * x[r][c];
      runs.from[r] = row(r, k);
      runs.to[r] = row(r, k + 1);
      runs.scratch[r] = row(r, rows);
    }
    if (!table.additive) {
      step_of_points(runs);
    } else if (table.tile == kLanes) {
      step_of_sums<1>(runs);
    } else {
      step_of_sums<2>(runs);
    }
  }

  void step_of_points(const Runs& runs) const {
    // As many runs at once as have their costs and factors in registers, of which AVX2 has half as many as AVX-512; for
    // the others the edges of the tile are in the L1 cache then.
    constexpr int kRuns = P == 2 || kLanes == 16 ? kTrellisRuns : 2;
    const int branches = table.branches;
    const int lanes = table.lanes;
    const std::int32_t* predecessor = table.predecessor.data();
    const float* edges = table.edges.data();
    for (int position = 0; position < table.states; position += kLanes) {
      for (int first = 0; first < kTrellisRuns; first += kRuns) {
        const float* edge = edges;
        Vec best[kRuns];
        Vec factor[kRuns][P];
        for (int r = 0; r < kRuns; ++r) {
          best[r] = Vec{} + __builtin_huge_valf();
          for (int c = 0; c < P; ++c) factor[r][c] = runs.factor[first + r][c];
        }
        for (int j = 0; j < branches; ++j, edge += (1 + P) * kLanes) {
          Vec term[1 + P];
          for (int i = 0; i <= P; ++i) term[i] = load(edge + i * kLanes);
          for (int r = 0; r < kRuns; ++r) {
            Vec cost = term[0] + runs.from[first + r][predecessor[j]];
            for (int c = 0; c < P; ++c) cost = fused_multiply_add(factor[r][c], term[1 + c], cost);
            best[r] = least(best[r], cost);
          }
        }
        for (int r = 0; r < kRuns; ++r) store(runs.to[first + r] + position, best[r]);
      }
      edges += branches * (1 + P) * kLanes;
      if ((position + kLanes) % lanes == 0) predecessor += branches;
    }
  }

  // Adds |g|^2 - 2 x g to the costs of kLanes states from `position` on, of every run.
  static void add_terms(const float* terms, int states, int position, const Runs& runs, Vec* cost) {
    Vec term[1 + P];
    for (int i = 0; i <= P; ++i) term[i] = load(terms + static_cast<std::int64_t>(i) * states + position);
    for (int r = 0; r < kTrellisRuns; ++r) {
      cost[r] += term[0];
      for (int c = 0; c < P; ++c) cost[r] = fused_multiply_add(runs.factor[r][c], term[1 + c], cost[r]);
    }
  }

  // V: vectors of a tile.
  template <int V>
  void step_of_sums(const Runs& runs) const {
    const int states = table.states;
    const int branches = table.branches;
    const int lanes = table.lanes;
    const float* before = table.before.data();
    const float* after = table.after.data();
    for (int position = 0; position < states; position += kLanes) {
      Vec cost[kTrellisRuns];
      for (int r = 0; r < kTrellisRuns; ++r) cost[r] = load(runs.from[r] + position);
      add_terms(before, states, position, runs, cost);
      for (int r = 0; r < kTrellisRuns; ++r) store(runs.scratch[r] + position, cost[r]);
    }
    const std::int32_t* predecessor = table.predecessor.data();
    const float* edge = table.edges.data();
    for (int position = 0; position < states; position += V * kLanes) {
      Vec best[V][kTrellisRuns];
      for (int v = 0; v < V; ++v) {
        for (int r = 0; r < kTrellisRuns; ++r) best[v][r] = Vec{} + __builtin_huge_valf();
      }
      for (int j = 0; j < branches; ++j, edge += V * kLanes) {
        Vec term[V];
        for (int v = 0; v < V; ++v) term[v] = load(edge + v * kLanes);
        for (int r = 0; r < kTrellisRuns; ++r) {
          const float from = runs.scratch[r][predecessor[j]];
          for (int v = 0; v < V; ++v) best[v][r] = least(best[v][r], term[v] + from);
        }
      }
      for (int v = 0; v < V; ++v) {
        const int at = position + v * kLanes;
        add_terms(after, states, at, runs, best[v]);
        for (int r = 0; r < kTrellisRuns; ++r) store(runs.to[r] + at, best[v][r]);
      }
      if ((position + V * kLanes) % lanes == 0) predecessor += branches;
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

  // The window before `state`, after step k, on the best path there: among equal costs the lowest. The same sums as in
  // the search, of which the first that gives the cost found there is sought.
  [[nodiscard]] std::uint32_t window_before(int run, int k, const float* x, int state) const {
    const std::uint32_t base = static_cast<std::uint32_t>(state) << table.grid->index_bits;
    const float* points = &table.grid->points[static_cast<std::size_t>(base) * P];
    const float* norms = &table.norms[base];
    const float* from = row(run, k);
    const std::int32_t* predecessor =
        &table.predecessor[static_cast<std::size_t>(state % table.groups) * table.branches];
    const float found = row(run, k + 1)[table.position(state)];
    for (int j = 0; j < table.branches - 1; ++j, points += P) {
      float cost = norms[j] + from[predecessor[j]];
      for (int c = 0; c < P; ++c) cost = __builtin_fmaf(-2 * x[c], points[c], cost);
      if (cost == found) return base + j;
    }
    return base + table.branches - 1;
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
      float least_cost = __builtin_huge_valf();
      for (int s = 0; s < table.states; ++s) least_cost = last[s] < least_cost ? last[s] : least_cost;
      int best = table.states;  // the lowest state among equals
      for (int s = 0; s < table.states; ++s) {
        if (last[s] == least_cost && table.state_at(s) < best) best = table.state_at(s);
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
