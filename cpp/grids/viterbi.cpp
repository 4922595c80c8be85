// Tail-biting Viterbi for any table of window values: the engine of make_trellis.py, which compiles and loads it.
// Written for experiments, without the library's promises (bitwise equality, threads); the library's encoder is
// trellis_loops.h.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int kRuns = 4;  // encoded at once, so that each value loaded serves four
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Window e (L bits, the oldest lowest) leads from state e mod 2^(L-b) to state e >> b. The next states that share their
// low bits share their predecessors: lane n of group u is state u + groups * n.
struct Trellis {
  int window_bits, step_bits, weights;
  int states = 1 << (window_bits - step_bits);
  int groups = 1 << std::max(window_bits - 2 * step_bits, 0);
  int lanes = states / groups;
  int branches = 1 << step_bits;
  std::vector<float> norms, values;  // [group, branch, lane], and that for each weight
  std::vector<int> predecessor;      // [group, branch]

  [[nodiscard]] int position(int state) const { return state % groups * lanes + state / groups; }
  [[nodiscard]] int state(int position) const { return position / lanes + groups * (position % lanes); }
};

Trellis make(int window_bits, int step_bits, int weights, const float* points) {
  Trellis t{window_bits, step_bits, weights};
  const std::size_t windows = std::size_t{1} << window_bits;
  t.norms.assign(windows, 0.0f);
  t.values.resize(windows * weights);
  for (int u = 0; u < t.groups; ++u) {
    for (int j = 0; j < t.branches; ++j) {
      const int branch = u * t.branches + j;
      t.predecessor.push_back(t.position(branch % t.states));
      for (int n = 0; n < t.lanes; ++n) {
        const std::size_t window = (static_cast<std::size_t>(u + t.groups * n) << step_bits) + j;
        const std::size_t at = static_cast<std::size_t>(branch) * t.lanes + n;
        for (int v = 0; v < weights; ++v) {
          const float value = points[window * weights + v];
          t.values[v * windows + at] = value;
          t.norms[at] += value * value;
        }
      }
    }
  }
  return t;
}

template <int W, int V>
void step(const Trellis& t, const float* x, std::size_t stride, const float* const* from, float* const* to) {
  typedef float Vec __attribute__((vector_size(4 * W)));
  const std::size_t windows = t.norms.size();
  for (int u = 0; u < t.groups; ++u) {
    for (int lane = 0; lane < t.lanes; lane += W) {
      Vec best[kRuns];
      for (Vec& b : best) b = Vec{} + kInfinity;
      for (int j = 0; j < t.branches; ++j) {
        const int branch = u * t.branches + j;
        const float* at = &t.norms[static_cast<std::size_t>(branch) * t.lanes + lane];
        Vec norm;
        Vec value[V];
        std::memcpy(&norm, at, sizeof norm);
        for (int v = 0; v < V; ++v) {
          std::memcpy(&value[v], &t.values[v * windows + (at - t.norms.data())], sizeof norm);
        }
        for (int r = 0; r < kRuns; ++r) {
          Vec cost = norm + from[r][t.predecessor[branch]];
          for (int v = 0; v < V; ++v) cost += value[v] * (-2 * x[r * stride + v]);
          best[r] = best[r] < cost ? best[r] : cost;
        }
      }
      for (int r = 0; r < kRuns; ++r) std::memcpy(to[r] + u * t.lanes + lane, &best[r], sizeof best[r]);
    }
  }
}

struct Search {
  const Trellis& t;
  const float* points;
  int steps;                     // of a run
  int rows = steps / 2 * 3 + 2;  // of costs, per run
  std::vector<float> costs{std::vector<float>(static_cast<std::size_t>(kRuns) * rows * t.states)};

  float* row(int run, int k) { return &costs[(static_cast<std::size_t>(run) * rows + k) * t.states]; }

  // Costs of all states after each of `count` steps from step `first` on, from any state or from the given ones.
  void forward(const float* x, int first, int count, const int* start) {
    for (int r = 0; r < kRuns; ++r) {
      std::fill_n(row(r, 0), t.states, start == nullptr ? 0.0f : 1e30f);
      if (start != nullptr) row(r, 0)[t.position(start[r])] = 0;
    }
    for (int k = 0; k < count; ++k) {
      const float* from[kRuns];
      float* to[kRuns];
      for (int r = 0; r < kRuns; ++r) {
        from[r] = row(r, k);
        to[r] = row(r, k + 1);
      }
      const float* at = x + (first + k) % steps * t.weights;
      const std::size_t stride = static_cast<std::size_t>(steps) * t.weights;
      if (t.weights == 2) {
        t.lanes >= 16 ? step<16, 2>(t, at, stride, from, to) : step<8, 2>(t, at, stride, from, to);
      } else {
        t.lanes >= 16 ? step<16, 4>(t, at, stride, from, to) : step<8, 4>(t, at, stride, from, to);
      }
    }
  }

  // The windows of the best path of one run to `state`; returns the state before step 0 of the run.
  int backward(const float* x, int run, int first, int count, int state, std::uint32_t* windows) {
    int bite = state;
    for (int k = count - 1; k >= 0; --k) {
      const int at = (first + k) % steps;
      float least = kInfinity;
      std::uint32_t best = 0;
      for (int j = 0; j < t.branches; ++j) {
        const std::uint32_t window = (static_cast<std::uint32_t>(state) << t.step_bits) + j;
        float cost = row(run, k)[t.position(window % t.states)];
        for (int v = 0; v < t.weights; ++v) {
          const float value = points[static_cast<std::size_t>(window) * t.weights + v];
          cost += value * value - 2 * x[at * t.weights + v] * value;
        }
        if (cost < least) least = cost, best = window;
      }
      windows[at] = best;
      state = best % t.states;
      if (at == 0) bite = state;
    }
    return bite;
  }
};

}  // namespace

// x [runs, length], points [2^window_bits, weights] -> windows [runs, length / weights]. First a search around the
// bite, `overlap` steps to both sides with free ends, gives the state there; then that state is start and end.
extern "C" void encode(const float* x, int runs, int length, int window_bits, int step_bits, int weights,
                       const float* points, int overlap, std::uint32_t* windows) {
  const Trellis t = make(window_bits, step_bits, weights, points);
  const int steps = length / weights;
  const int side = std::min(overlap, steps / 4 * 3);
  Search search{t, points, steps};
  std::vector<float> batch(static_cast<std::size_t>(kRuns) * length);
  std::vector<std::uint32_t> path(static_cast<std::size_t>(steps));
  for (int g = 0; g < runs; g += kRuns) {
    for (int r = 0; r < kRuns; ++r) {
      std::copy_n(x + static_cast<std::size_t>(std::min(g + r, runs - 1)) * length, length, &batch[r * length]);
    }
    int bite[kRuns];
    search.forward(batch.data(), steps - side, 2 * side, nullptr);
    for (int r = 0; r < kRuns; ++r) {
      const float* last = search.row(r, 2 * side);
      const int best = static_cast<int>(std::min_element(last, last + t.states) - last);
      bite[r] = search.backward(&batch[r * length], r, steps - side, 2 * side, t.state(best), path.data());
    }
    search.forward(batch.data(), 0, steps, bite);
    for (int r = 0; r < std::min(kRuns, runs - g); ++r) {
      search.backward(&batch[r * length], r, 0, steps, bite[r], windows + static_cast<std::size_t>(g + r) * steps);
    }
  }
}
