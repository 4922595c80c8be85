// Trellis grids: their points, the search, and that quantize gives the same bytes everywhere. Decoding is tested with
// all other grids.
#include "trellis.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "helpers.h"
#include "kernels.h"

namespace higgs {
namespace {

using test::IsaGuard;
using test::Layer;
using test::make_format;
using test::Matrix;
using test::Rng;
using test::ThreadsGuard;

TEST(Trellis, NamesCountsAndWidthsAgree) {
  for (const Grid& g : test::grids_of_family(true)) {
    const std::string kind = g.trellis->kind == Trellis::Kind::hash ? "t" : "a";
    EXPECT_EQ(g.name, kind + std::to_string(g.p) + "_b" + std::to_string(g.index_bits));
    EXPECT_EQ(g.n_points, 1 << g.window_bits) << g.name;
    EXPECT_EQ(g.points.size(), static_cast<std::size_t>(g.n_points * g.p)) << g.name;
    EXPECT_GT(g.window_bits, g.index_bits) << g.name;
    EXPECT_GE(g.index_bits, kMinIndexBits) << g.name;
    EXPECT_LE(g.index_bits, kMaxIndexBits) << g.name;
    EXPECT_GE(64 / g.p * g.index_bits, g.window_bits) << g.name << ": the shortest run holds no window";
  }
}

TEST(Trellis, PointsAreThoseOfTheFormatAndHalves) {
  for (const Grid& g : test::grids_of_family(true)) {
    for (std::uint64_t w = 0; w < std::uint64_t{1} << g.window_bits; ++w) {
      const std::uint64_t h = w * g.trellis->multiplier % (std::uint64_t{1} << 32);
      const auto p = static_cast<std::uint64_t>(g.p);
      for (std::uint64_t c = 0; c < p; ++c) {
        const std::uint64_t sign_bit = std::array<std::uint64_t, 4>{15, 31, 14, 30}[c];
        const float expected =
            g.trellis->kind == Trellis::Kind::hash
                ? g.trellis->table[h / 65536 % static_cast<std::uint64_t>(g.trellis->rows) * p + c] *
                      (h >> sign_bit & 1 ? -1.0f : 1.0f)
                : g.trellis->table[w % 256 * 2 * p + c] + g.trellis->table[(w >> (g.window_bits - 8)) * 2 * p + p + c];
        ASSERT_EQ(g.points[w * p + c], expected) << g.name << " " << w;
        ASSERT_EQ(f16_to_f32(f32_to_f16(expected)), expected) << g.name << " " << w;
      }
    }
  }
}

TEST(Trellis, AdditiveEntriesAreInTheRangeOfTheFormat) {
  for (const Grid& g : test::grids_of_family(true)) {
    if (g.trellis->kind != Trellis::Kind::additive) continue;
    for (const float entry : g.trellis->table) {
      EXPECT_EQ(entry * 32, std::nearbyint(entry * 32)) << g.name;
      EXPECT_GE(entry, -64 / 32.0f) << g.name;
      EXPECT_LE(entry, 63 / 32.0f) << g.name;
    }
  }
}

TEST(Trellis, T2IsFarBelowThatOfVectorGridsAndAboveTheLimit) {
  for (const Grid& g : test::grids_of_family(true)) {
    EXPECT_GT(g.t2, std::exp2(-2 * g.rate())) << g.name;
    if (g.rate() < 2) continue;  // vector grids are far worse there
    EXPECT_LT(g.t2, 0.86 * grid_for_bits(g.rate()).t2) << g.name;
  }
  EXPECT_LE(find_grid("t2_b4").t2, 0.069);
  EXPECT_LE(find_grid("t2_b6").t2, 0.0184);
  EXPECT_LE(find_grid("t2_b8").t2, 0.0049);
}

class EveryTrellis : public testing::TestWithParam<std::string> {};

INSTANTIATE_TEST_SUITE_P(All, EveryTrellis, testing::ValuesIn(test::names_of_family(true)), test::grid_name);

// Gaussian rows of whole runs; the table's value was measured with other seeds. Not run with sanitizers
// (CMakePresets.json): it takes half a minute a grid there, and other tests make the same searches on less.
TEST_P(EveryTrellis, MeasuredT2IsThatOfTheTable) {
  constexpr int kRows = 8;
  constexpr std::int64_t kCols = 4096;
  const Grid& g = find_grid(GetParam());
  Rng rng(2025);
  const std::vector<float> w = test::gaussian(rng, kRows * kCols, 0.3f);
  double sum = 0;
  double squares = 0;
  for (int i = 0; i < kRows; ++i) {
    const Layer layer =
        test::quantize_layer(matrix(w.data() + i * kCols, 1, kCols), make_format(g.name, 1, kCols, 1024, kCols, 4));
    sum += layer.result.t2();
    squares += std::pow(layer.result.t2(), 2);
  }
  const double mean = sum / kRows;
  const double sigma = std::sqrt((squares / kRows - mean * mean) / (kRows - 1));
  EXPECT_NEAR(mean, g.t2, 3 * sigma + 0.003 * g.t2) << "sigma is " << sigma / g.t2 * 100 << " %";
  EXPECT_LT(sigma / g.t2, 0.02);
}

// A trellis small enough to try every stream.
struct Tiny {
  std::vector<float> points;
  Grid grid;
  Tiny(Rng& rng, int p, int window_bits) : points(test::gaussian(rng, std::int64_t{p} << window_bits)) {
    grid.name = "tiny";
    grid.p = p;
    grid.index_bits = 4;
    grid.window_bits = window_bits;
    grid.n_points = 1 << window_bits;
    grid.points = points;
  }
  // Error of the run `x` with these indices, in float64.
  [[nodiscard]] double error(const std::vector<float>& x, const std::vector<std::uint16_t>& indices) const {
    const auto p = static_cast<std::size_t>(grid.p);
    double sum = 0;
    for (std::size_t t = 0; t < indices.size(); ++t) {
      std::size_t window = 0;
      for (std::size_t b = 0; b < static_cast<std::size_t>(grid.window_bits); ++b) {
        window |= static_cast<std::size_t>(indices[(t + b / 4) % indices.size()] >> (b % 4) & 1) << b;
      }
      for (std::size_t c = 0; c < p; ++c) sum += std::pow(double{x[t * p + c]} - points[window * p + c], 2);
    }
    return sum;
  }
};

// The least error of all streams that start with these indices.
double least_error(const Tiny& tiny, const std::vector<float>& x, const std::vector<std::uint16_t>& found) {
  double best = std::numeric_limits<double>::infinity();
  const auto fixed = static_cast<std::size_t>(tiny.grid.window_bits - 4) / 4;  // indices known before step 0
  std::vector<std::uint16_t> indices = found;
  for (std::size_t stream = 0; stream < std::size_t{1} << (4 * (found.size() - fixed)); ++stream) {
    for (std::size_t t = fixed; t < found.size(); ++t) {
      indices[t] = static_cast<std::uint16_t>(stream >> (4 * (t - fixed)) & 15);
    }
    best = std::min(best, tiny.error(x, indices));
  }
  return best;
}

// The least error of all streams (window_bits 8: a state is one index), by a search for every first index.
double least_error_of_all(const Tiny& tiny, const std::vector<float>& x, std::size_t steps) {
  const auto p = static_cast<std::size_t>(tiny.grid.p);
  double best = std::numeric_limits<double>::infinity();
  for (std::size_t bite = 0; bite < 16; ++bite) {
    std::vector<double> cost(16, std::numeric_limits<double>::infinity());
    cost[bite] = 0;
    for (std::size_t t = 0; t < steps; ++t) {
      std::vector<double> next(16, std::numeric_limits<double>::infinity());
      for (std::size_t window = 0; window < 256; ++window) {
        double e = cost[window % 16];
        for (std::size_t c = 0; c < p; ++c) e += std::pow(double{x[t * p + c]} - tiny.points[window * p + c], 2);
        next[window / 16] = std::min(next[window / 16], e);
      }
      cost = next;
    }
    best = std::min(best, cost[bite]);
  }
  return best;
}

// Encodes kTrellisRuns random runs, of multiples of 1/256 within the range that the format has for additive grids;
// calls check(values, indices, points).
template <typename Check>
void for_each_encoded(const Grid& grid, Rng& rng, int steps, float sigma, const Check& check) {
  const detail::TrellisTable table = detail::make_trellis_table(grid, detail::kernels().vector_lanes);
  const int columns = steps * grid.p;
  std::vector<float> costs(static_cast<std::size_t>(detail::trellis_costs(table, columns)));
  std::vector<float> x[detail::kTrellisRuns];
  std::vector<float> points[detail::kTrellisRuns];
  std::vector<std::uint16_t> indices[detail::kTrellisRuns];
  const float* x_at[detail::kTrellisRuns];
  float* points_at[detail::kTrellisRuns];
  std::uint16_t* indices_at[detail::kTrellisRuns];
  for (int r = 0; r < detail::kTrellisRuns; ++r) {
    x[r] = test::gaussian(rng, columns);
    for (float& v : x[r]) v = std::nearbyint(std::clamp(sigma * v * 256, -1444.0f, 1444.0f)) / 256;
    points[r].resize(x[r].size());
    indices[r].resize(static_cast<std::size_t>(steps));
    x_at[r] = x[r].data();
    points_at[r] = points[r].data();
    indices_at[r] = indices[r].data();
  }
  detail::kernels().encode_runs(table, x_at, columns, costs.data(), indices_at, points_at);
  for (int r = 0; r < detail::kTrellisRuns; ++r) check(x[r], indices[r], points[r]);
}

// Calls check(values, indices, error).
template <typename Check>
void for_each_encoded(const Tiny& tiny, Rng& rng, int steps, const Check& check) {
  for_each_encoded(tiny.grid, rng, steps, 1, [&](const auto& x, const auto& indices, const auto& points) {
    double returned = 0;
    for (std::size_t j = 0; j < x.size(); ++j) returned += std::pow(double{x[j]} - points[j], 2);
    const double error = tiny.error(x, indices);
    EXPECT_NEAR(returned, error, 1e-5) << "the points are not those of the indices";
    check(x, indices, error);
  });
}

TEST(Trellis, TheSearchIsExactGivenTheBite) {
  for (const Isa isa : supported_isas()) {
    const IsaGuard guard(isa);
    for (const auto& [p, window_bits] : {std::pair{2, 8}, {2, 12}, {4, 8}, {4, 12}}) {
      Rng rng(static_cast<std::uint64_t>(100 * p + window_bits));
      const Tiny tiny(rng, p, window_bits);
      for_each_encoded(tiny, rng, 5, [&](const auto& x, const auto& indices, double error) {
        EXPECT_NEAR(error, least_error(tiny, x, indices), 1e-4) << p << " " << window_bits << " " << name_of(isa);
      });
    }
  }
}

TEST(Trellis, TheBiteIsNearlyAlwaysTheBest) {
  Rng rng(70);
  int optimal = 0;
  double excess = 0;
  for (int trial = 0; trial < 20; ++trial) {
    const Tiny tiny(rng, 2, 8);
    for_each_encoded(tiny, rng, 64, [&](const auto& x, const auto&, double error) {
      const double best = least_error_of_all(tiny, x, 64);
      EXPECT_GT(error, best - 1e-3);
      optimal += error < best + 1e-3;
      excess += error / best - 1;
    });
  }
  EXPECT_GE(optimal, 72) << "of 80 runs";
  EXPECT_LT(excess / 80, 0.001);
}

// The search as FORMAT.md has it, for one run.
class SpecSearch {
 public:
  SpecSearch(const Grid& grid, const std::vector<float>& x)
      : grid_(grid),
        x_(x),
        steps_(x.size() / static_cast<std::size_t>(grid.p)),
        states_(std::size_t{1} << (grid.window_bits - grid.index_bits)) {
    for (std::size_t w = 0; w < static_cast<std::size_t>(grid.n_points); ++w) {
      double norm = 0;
      for (std::size_t c = 0; c < p(); ++c) norm += std::pow(double{grid.points[w * p() + c]}, 2);
      norms_.push_back(static_cast<float>(norm));
    }
  }

  [[nodiscard]] std::vector<std::uint16_t> indices() const {
    const std::size_t side = std::min((192 + b() - 1) / b(), 3 * (steps_ / 4));
    std::vector<float> cost(states_, 0.0f);
    const std::vector<std::size_t> around = search(cost, steps_ - side, 2 * side, states_);
    std::vector<float> from_bite(states_, std::numeric_limits<float>::infinity());
    const std::size_t bite = around[side] % states_;
    from_bite[bite] = 0;
    std::vector<std::uint16_t> indices;
    for (const std::size_t w : search(from_bite, 0, steps_, bite)) {
      indices.push_back(static_cast<std::uint16_t>(w & ((std::size_t{1} << b()) - 1)));
    }
    return indices;
  }

 private:
  [[nodiscard]] std::size_t p() const { return static_cast<std::size_t>(grid_.p); }
  [[nodiscard]] std::size_t b() const { return static_cast<std::size_t>(grid_.index_bits); }

  // The windows of the best path of `count` steps to state `last` (or, if there is none such, to the best).
  [[nodiscard]] std::vector<std::size_t> search(std::vector<float> cost, std::size_t first, std::size_t count,
                                                std::size_t last) const {
    std::vector<std::vector<std::size_t>> best(count, std::vector<std::size_t>(states_));
    for (std::size_t k = 0; k < count; ++k) {
      std::vector<float> next(states_, std::numeric_limits<float>::infinity());
      const float* u = &x_[(first + k) % steps_ * p()];
      for (std::size_t w = 0; w < norms_.size(); ++w) {
        float t = cost[w % states_] + norms_[w];
        for (std::size_t c = 0; c < p(); ++c) t = std::fma(-2 * u[c], grid_.points[w * p() + c], t);
        if (t < next[w >> b()]) {
          next[w >> b()] = t;
          best[k][w >> b()] = w;
        }
      }
      cost = next;
    }
    if (last == states_) last = static_cast<std::size_t>(std::ranges::min_element(cost) - cost.begin());
    std::vector<std::size_t> windows(count);
    for (std::size_t k = count; k-- > 0;) {
      windows[k] = best[k][last];
      last = windows[k] % states_;
    }
    return windows;
  }

  const Grid& grid_;
  const std::vector<float>& x_;
  std::size_t steps_;
  std::size_t states_;
  std::vector<float> norms_;
};

TEST(Trellis, StreamsAreThoseOfTheFormat) {
  for (const char* name : {"a2_b4", "a2_b5", "a2_b8", "t2_b4", "t2_b5", "t2_b8", "t4_b8"}) {
    const Grid& grid = find_grid(name);
    // With a sigma of 10 most values are as large as they may be: costs of additive grids still are not rounded.
    for (const auto& [steps, sigma] : {std::pair{8, 1.0f}, {24, 1.0f}, {32, 10.0f}}) {
      for (const Isa isa : supported_isas()) {
        if (isa == Isa::portable && steps == 24) continue;  // slow
        const IsaGuard guard(isa);
        Rng rng(static_cast<std::uint64_t>(steps));
        for_each_encoded(grid, rng, steps, sigma, [&](const auto& x, const auto& indices, const auto&) {
          EXPECT_EQ(indices, SpecSearch(grid, x).indices()) << name << " " << steps << " " << name_of(isa);
        });
      }
    }
  }
}

struct Shape {
  std::int64_t n;
  std::int64_t k;
  int block;
  std::int64_t group;
};

TEST(Trellis, QuantizeGivesTheSameBytesOnEveryIsaAndThreadCount) {
  Rng rng(71);
  const Shape shapes[] = {{5, 64, 64, 64}, {3, 576, 576, 576}, {9, 320, 64, 128}};
  for (const char* name : {"t2_b4", "t2_b9", "t4_b8", "a2_b6"}) {
    for (const Shape& s : shapes) {
      if (s.n == 9 && std::string(name) != "t4_b8") continue;  // the portable search is slow
      const Matrix w(test::gaussian(rng, s.n * s.k, 0.02f), s.n, s.k);
      const LayerFormat f = make_format(name, s.n, s.k, s.block, s.group, 7);
      const Layer expected = test::quantize_layer(w.view(), f);
      for (const Isa isa : supported_isas()) {
        const IsaGuard isa_guard(isa);
        const ThreadsGuard threads_guard(isa == Isa::portable ? 1 : 3);
        const Layer layer = test::quantize_layer(w.view(), f);
        ASSERT_EQ(layer.scales, expected.scales) << name << " k = " << s.k << " " << name_of(isa);
        ASSERT_EQ(layer.indices, expected.indices) << name << " k = " << s.k << " " << name_of(isa);
      }
    }
  }
}

// Rows are encoded four at a time: their neighbours and their number must not matter.
TEST(Trellis, ARowHasTheSameBytesAlone) {
  Rng rng(72);
  const Matrix w(test::gaussian(rng, 7 * 256), 7, 256);
  const LayerFormat f = make_format("t2_b8", 7, 256);
  const Layer all = test::quantize_layer(w.view(), f);
  for (std::int64_t i = 0; i < 7; ++i) {
    LayerFormat one = f;
    one.n = 1;
    const Layer alone = test::quantize_layer({w.view().row(i), DType::f32, 1, 256}, one);
    EXPECT_EQ(alone.scales[0], all.scales[static_cast<std::size_t>(i)]);
    EXPECT_TRUE(std::equal(alone.indices.begin(), alone.indices.end(), all.indices.begin() + i * f.row_bytes())) << i;
  }
}

// Weights that a stream represents exactly come back with hardly any error.
TEST(Trellis, AStreamIsFoundAgain) {
  Rng rng(73);
  const Layer source = test::random_layer(rng, make_format("t2_b8", 4, 1024));
  Matrix w(4, 1024, DType::f32);
  dequantize(source.view(), w.view());
  const Layer found = test::quantize_layer(w.view(), source.format);
  EXPECT_LT(found.result.t2(), 0.5 * source.format.grid->t2);
}

}  // namespace
}  // namespace higgs
