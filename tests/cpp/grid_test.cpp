#include "higgs/grid.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <numbers>
#include <set>

#include "helpers.h"

namespace higgs {
namespace {

using test::expect_error;
using test::Rng;

double density(double x) { return std::isinf(x) ? 0.0 : std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi); }
double distribution(double x) { return 0.5 * std::erfc(-x / std::numbers::sqrt2); }

// Mass, first and second moment of N(0, 1) on [a, b].
struct Moments {
  double mass;
  double first;
  double second;
};
Moments moments(double a, double b) {
  const double mass = a > 0 ? distribution(-a) - distribution(-b) : distribution(b) - distribution(a);
  const double da = std::isinf(a) ? 0.0 : a * density(a);
  const double db = std::isinf(b) ? 0.0 : b * density(b);
  return {mass, density(a) - density(b), mass + da - db};
}

// The cell of point i of a sorted one-dimensional grid.
Moments cell(const Grid& g, int i) {
  const double infinity = std::numeric_limits<double>::infinity();
  const auto at = [&](int j) { return static_cast<double>(g.points[static_cast<std::size_t>(j)]); };
  return moments(i == 0 ? -infinity : (at(i - 1) + at(i)) / 2,
                 i + 1 == g.n_points ? infinity : (at(i) + at(i + 1)) / 2);
}

double exact_t2(const Grid& g) {
  double error = 0;
  for (int i = 0; i < g.n_points; ++i) {
    const Moments m = cell(g, i);
    const double q = g.points[static_cast<std::size_t>(i)];
    error += m.second - 2 * q * m.first + q * q * m.mass;
  }
  return error;
}

TEST(Grid, EveryPromisedGridExists) {
  const std::set<std::string_view> promised = {
      "p1_n4",   "p1_n8",   "p1_n16",   "p1_n32",   "p1_n64",   "p1_n256", "p2_n16", "p2_n32",  "p2_n64",   "p2_n128",
      "p2_n256", "p2_n512", "p2_n1024", "p2_n2048", "p2_n4096", "p4_n16",  "p4_n64", "p4_n256", "p4_n4096", "ch8"};
  std::set<std::string_view> names;
  for (const Grid& g : grids()) EXPECT_TRUE(names.insert(g.name).second) << g.name << " twice";
  for (const std::string_view name : promised) EXPECT_TRUE(names.contains(name)) << name;
}

TEST(Grid, NameCountsAndWidthsAgree) {
  for (const Grid& g : test::grids_of_family(false)) {
    EXPECT_EQ(g.n_points, 1 << g.index_bits) << g.name;
    EXPECT_EQ(g.points.size(), static_cast<std::size_t>(g.n_points * g.p)) << g.name;
    EXPECT_DOUBLE_EQ(g.rate(), static_cast<double>(g.index_bits) / g.p) << g.name;
    EXPECT_GE(g.index_bits, kMinIndexBits) << g.name;
    EXPECT_LE(g.index_bits, kMaxIndexBits) << g.name;
    EXPECT_LE(g.p, kMaxP) << g.name;
    EXPECT_EQ(find_grid(g.name).points.data(), g.points.data());
    if (g.name == "ch8") {
      EXPECT_EQ(g.n_points, 256);
      EXPECT_EQ(g.p, 1);
    } else {
      EXPECT_EQ(std::string(g.name), "p" + std::to_string(g.p) + "_n" + std::to_string(g.n_points));
    }
  }
}

TEST(Grid, PointsAreDistinctHalves) {
  for (const Grid& g : test::grids_of_family(false)) {
    std::set<std::vector<float>> seen;
    for (int i = 0; i < g.n_points; ++i) {
      const float* point = &g.points[static_cast<std::size_t>(i * g.p)];
      for (int c = 0; c < g.p; ++c) ASSERT_EQ(f16_to_f32(f32_to_f16(point[c])), point[c]) << g.name << " " << i;
      EXPECT_TRUE(seen.insert(std::vector<float>(point, point + g.p)).second) << g.name << ": point " << i << " twice";
    }
  }
}

TEST(Grid, ScalarGridsHaveTheirExactT2) {
  for (const Grid& g : grids()) {
    if (g.p != 1) continue;
    ASSERT_TRUE(std::is_sorted(g.points.begin(), g.points.end())) << g.name;
    EXPECT_NEAR(exact_t2(g) / g.t2, 1.0, 1e-4) << g.name;
  }
}

TEST(Grid, ScalarPointsAreTheMeansOfTheirCells) {
  for (const Grid& g : grids()) {
    if (g.p != 1 || g.name == "ch8") continue;
    double lost = 0;  // by points that are not quite the mean, for instance because they are halves
    for (int i = 0; i < g.n_points; ++i) {
      const Moments m = cell(g, i);
      lost += m.mass * std::pow(m.first / m.mass - g.points[static_cast<std::size_t>(i)], 2);
    }
    EXPECT_LT(lost / g.t2, 2e-3) << g.name;
  }
}

// A power of two as step makes every point exact; the best real number would lower t2 by less than 1 %.
TEST(Grid, Ch8IsExactlyUniformAndNearlyTheBestUniformGrid) {
  const Grid& g = find_grid("ch8");
  const float step = g.points[128] - g.points[127];
  for (std::size_t i = 0; i < 256; ++i) EXPECT_EQ(g.points[i], step * (static_cast<float>(i) - 127.5f)) << i;
  std::vector<float> scaled(256);
  Grid other = g;
  other.points = scaled;
  for (int percent = 50; percent <= 200; ++percent) {
    for (std::size_t i = 0; i < 256; ++i) scaled[i] = static_cast<float>(0.01 * percent * g.points[i]);
    EXPECT_GT(exact_t2(other), 0.99 * g.t2) << percent;
  }
}

// An optimal grid has E Q(x) = 0 and E x.Q(x) = E |Q(x)|^2 = p (1 - t2). Deviations in standard errors.
void check_moments(const Grid& g, Rng& rng) {
  constexpr int kSamples = 20000;
  std::vector<double> q_sum(static_cast<std::size_t>(g.p));
  double gap = 0;
  double gap_squares = 0;
  double power = 0;
  for (int s = 0; s < kSamples; ++s) {
    const std::vector<float> x = test::gaussian(rng, g.p);
    const int index = test::spec::nearest(g, x.data());
    double dot = 0;
    double norm = 0;
    for (int c = 0; c < g.p; ++c) {
      const double q = g.points[static_cast<std::size_t>(index * g.p + c)];
      q_sum[static_cast<std::size_t>(c)] += q;
      dot += q * x[static_cast<std::size_t>(c)];
      norm += q * q;
    }
    gap += dot - norm;
    gap_squares += (dot - norm) * (dot - norm);
    power += norm;
  }
  for (const double q : q_sum) EXPECT_LT(std::fabs(q) / kSamples, 4 / std::sqrt(kSamples)) << g.name;
  EXPECT_LT(std::fabs(gap), 4 * std::sqrt(gap_squares)) << g.name;
  EXPECT_NEAR(power / kSamples / g.p, 1 - g.t2, 4 * std::sqrt(2.0 / (kSamples * g.p))) << g.name;
}

TEST(Grid, VectorGridsHaveTheMomentsOfAnOptimalGrid) {
  Rng rng(17);
  for (const Grid& g : test::grids_of_family(false)) {
    if (g.p > 1 && g.table_points() <= 512) check_moments(g, rng);
  }
}

TEST(Grid, EveryPointIsTheNearestToItself) {
  for (const Grid& g : test::grids_of_family(false)) {
    if (g.table_points() > 1024) continue;
    for (int i = 0; i < g.n_points; ++i) {
      ASSERT_EQ(test::spec::nearest(g, &g.points[static_cast<std::size_t>(i * g.p)]), i) << g.name;
    }
  }
}

TEST(Grid, SignSymmetricGridsAreTheirMagnitudesWithAllSigns) {
  int count = 0;
  for (const Grid& g : grids()) {
    if (g.magnitudes == 0) continue;
    ++count;
    ASSERT_EQ(g.name, "p4_n4096");
    ASSERT_EQ(g.magnitudes, 256);
    ASSERT_EQ(g.table_points(), 256);
    for (int i = 0; i < g.n_points; ++i) {
      for (int c = 0; c < 4; ++c) {
        const float magnitude = g.points[static_cast<std::size_t>(i % 256 * 4 + c)];
        const float sign = (i >> (8 + c) & 1) != 0 ? -1.0f : 1.0f;
        ASSERT_EQ(g.points[static_cast<std::size_t>(i * 4 + c)], sign * magnitude) << i << " " << c;
        // What kernels rely on: a signed byte b stands for (b + 1/2) / 32, so that ~b stands for minus that.
        const float byte = magnitude * 32 - 0.5f;
        ASSERT_TRUE(byte == std::nearbyint(byte) && byte >= 0 && byte <= 127) << i << " " << c;
      }
    }
  }
  EXPECT_EQ(count, 1);
  EXPECT_EQ(find_grid("p2_n256").table_points(), 256);
}

// What kernels that look up four weights at a time rely on.
TEST(Grid, PointsOfFourWeightsAreSignedBytes) {
  int count = 0;
  for (const Grid& g : test::grids_of_family(false)) {
    const bool four = g.p == 4 || (g.index_bits * 4 / g.p == 8 && g.p <= 2);  // p1_n4, p2_n16: runs of indices
    if (!four || g.magnitudes != 0) continue;
    ++count;
    for (const float v : g.points) {
      EXPECT_EQ(v * 32, std::nearbyint(v * 32)) << g.name;
      EXPECT_LE(std::fabs(v * 32), 127) << g.name;
    }
  }
  EXPECT_EQ(count, 5);
}

struct Published {
  const char* name;
  double t2;
};

TEST(Grid, T2IsNotAboveThePublishedOneByMoreThanHalfAPercent) {
  const Published table[] = {{"p1_n4", 0.1175},    {"p1_n8", 0.03455},     {"p1_n16", 0.00950},    {"p1_n32", 0.002505},
                             {"p1_n64", 0.000644}, {"p1_n256", 0.0000413}, {"p2_n16", 0.1076},     {"p2_n64", 0.0296},
                             {"p2_n256", 0.00775}, {"p2_n1024", 0.001975}, {"p2_n4096", 0.000499}, {"p4_n256", 0.0970}};
  for (const Published& p : table) {
    const Grid& g = find_grid(p.name);
    EXPECT_LT(g.t2, 1.005 * p.t2) << p.name;
    EXPECT_GT(g.t2, std::exp2(-2 * g.rate())) << p.name << " is below the rate-distortion limit";
  }
}

// The whole path: Gaussian rows, long scale groups (a short one would let its scale follow the sample).
TEST(Grid, MeasuredT2OfGaussianRowsIsWithinThreeSigmaOfTheTable) {
  constexpr int kRows = 48;
  constexpr std::int64_t kCols = 16384;
  Rng rng(2024);
  const std::vector<float> w = test::gaussian(rng, kRows * kCols, 0.3f);
  for (const Grid& g : test::grids_of_family(false)) {
    double sum = 0;
    double squares = 0;
    for (int i = 0; i < kRows; ++i) {
      const auto* row = w.data() + i * kCols;
      const test::Layer layer =
          test::quantize_layer(matrix(row, 1, kCols), test::make_format(g.name, 1, kCols, 1024, kCols, 4));
      sum += layer.result.t2();
      squares += std::pow(layer.result.t2(), 2);
    }
    const double mean = sum / kRows;
    const double sigma = std::sqrt((squares / kRows - mean * mean) / (kRows - 1));
    EXPECT_NEAR(mean, g.t2, 3 * sigma) << g.name << ", sigma is " << sigma / g.t2 * 100 << " %";
    EXPECT_LT(sigma / g.t2, 0.03) << g.name;  // the test could not fail if it were large
  }
}

TEST(Grid, UnknownNameIsGivenWithTheLegalOnes) {
  expect_error(ErrorCode::invalid_argument, {"'p3_n8'", "p1_n4", "p2_n256", "p4_n256", "ch8"},
               [] { (void)find_grid("p3_n8"); });
  expect_error(ErrorCode::invalid_argument, {"''"}, [] { (void)find_grid(""); });
  expect_error(ErrorCode::invalid_argument, {"'p2_n25'"}, [] { (void)find_grid("p2_n25"); });
  expect_error(ErrorCode::invalid_argument, {"'P2_N256'"}, [] { (void)find_grid("P2_N256"); });
}

TEST(Grid, ForBitsIsTheBestOfThatRate) {
  std::set<double> rates;
  for (const Grid& g : test::grids_of_family(false)) rates.insert(g.rate());
  for (const double rate : rates) {
    const Grid& best = grid_for_bits(rate);
    EXPECT_EQ(best.rate(), rate);
    for (const Grid& g : test::grids_of_family(false))
      EXPECT_TRUE(g.rate() != rate || best.t2 <= g.t2) << rate << " " << g.name;
  }
  EXPECT_EQ(grid_for_bits(4).name, "p2_n256");
  EXPECT_EQ(grid_for_bits(1).name, "p4_n16");
  EXPECT_EQ(grid_for_bits(1.5).name, "p4_n64");
  EXPECT_EQ(grid_for_bits(2).name, "p4_n256");
  EXPECT_EQ(grid_for_bits(3).name, "p4_n4096");
  EXPECT_EQ(grid_for_bits(8).name, "p1_n256");
  for (const double bits : {0.0, -1.0, 3.1, 16.0, std::numeric_limits<double>::quiet_NaN()}) {
    expect_error(ErrorCode::invalid_argument, {"bits", "1, 1.5, 2, 2.5, 3"}, [&] { (void)grid_for_bits(bits); });
  }
  expect_error(ErrorCode::invalid_argument, {"3.1"}, [] { (void)grid_for_bits(3.1); });
}

}  // namespace
}  // namespace higgs
