// Time to the exact optimum of allocate(): layers of a few shapes (so that costs lie on a lattice, as bits do), 15
// grids.
#include <benchmark/benchmark.h>

#include <cmath>
#include <random>

#include "higgs/allocate.h"

namespace higgs {
namespace {

AllocationProblem random_problem(int layers) {
  constexpr int kGrids = 15;
  constexpr std::int64_t kShapes[] = {4096 * 4096, 1024 * 4096, 14336 * 4096, 4096 * 1536};
  std::mt19937_64 rng(1);
  std::lognormal_distribution<double> alpha(-4.0, 1.5);
  AllocationProblem p;
  for (int i = 0; i < layers; ++i) {
    const std::int64_t weights = kShapes[rng() % 4];
    const double a = alpha(rng);
    std::vector<Choice>& item = p.items.emplace_back();
    for (int j = 0; j < kGrids; ++j) {
      item.push_back({weights * (3 + j) / 2, a * std::pow(4.0, -(3 + j) / 2.0)});
    }
    p.budget += weights * 13 / 4;
  }
  return p;
}

void allocate_bench(benchmark::State& state) {
  const AllocationProblem p = random_problem(static_cast<int>(state.range(0)));
  double gap = 0;
  for (auto _ : state) {
    const Allocation a = allocate(p);
    gap = a.gap;
  }
  state.counters["gap"] = gap;
}

BENCHMARK(allocate_bench)->Arg(224)->Arg(2000)->Arg(20000)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace higgs
