// The search behind quantize: its result is by definition that of trying all points (FORMAT.md, step 3 of "From weights
// to bytes"), whatever short cuts it takes.
#include "nearest.h"

#include <gtest/gtest.h>

#include <cmath>

#include "helpers.h"
#include "kernels.h"

namespace higgs {
namespace {

using detail::NearestTable;
using test::IsaGuard;
using test::Rng;

// Values whose nearest point is hard to find: on cell borders and one step beside them, around the extent of the cells,
// exact points, midpoints of points, huge, tiny, zero.
std::vector<float> hard_values(const NearestTable& table, Rng& rng, int count) {
  const Grid& grid = *table.grid;
  const float border = grid.p <= 2 ? 2 * table.extent / static_cast<float>(table.cells_per_axis) : 0.125f;
  const float extent = grid.p <= 2 ? table.extent : 5.0f;
  const auto point = [&] { return grid.points[rng() % grid.points.size()]; };
  std::uniform_real_distribution<float> inside(-extent, extent);
  std::vector<float> values;
  for (int i = 0; i < count; ++i) {
    float v = inside(rng);
    switch (rng() % 8) {
      case 0: v = -extent + border * static_cast<float>(rng() % 8192); break;
      case 1: v = std::nextafter(-extent + border * static_cast<float>(rng() % 8192), v); break;
      case 2: v = std::nextafter(rng() % 2 == 0 ? extent : -extent, v * 100); break;
      case 3: v = point(); break;
      case 4: v = (point() + point()) / 2; break;
      case 5: v = std::ldexp(v, static_cast<int>(rng() % 60) - 20); break;
      case 6: v = rng() % 2 == 0 ? 0.0f : -0.0f; break;
      default: break;
    }
    values.push_back(v);
  }
  return values;
}

class NearestEveryGrid : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, NearestEveryGrid, testing::ValuesIn(test::names_of_family(false)), test::grid_name);

void check(const Grid& grid, const std::vector<float>& values, const std::string& what) {
  const NearestTable& table = detail::nearest_table(grid);
  std::vector<std::uint16_t> expected(values.size() / static_cast<std::size_t>(grid.p));
  for (std::size_t i = 0; i < expected.size(); ++i) {
    expected[i] = detail::nearest_of_all(table, &values[i * static_cast<std::size_t>(grid.p)]);
  }
  for (const Isa isa : supported_isas()) {
    const IsaGuard guard(isa);
    std::vector<std::uint16_t> indices(expected.size(), 0xffff);
    double vg = 0;
    double gg = 0;
    detail::kernels().nearest(table, values.data(), static_cast<std::int64_t>(values.size()), 1.0f, indices.data(), &vg,
                              &gg);
    for (std::size_t i = 0; i < indices.size(); ++i) {
      const float* u = &values[i * static_cast<std::size_t>(grid.p)];
      ASSERT_EQ(indices[i], expected[i]) << grid.name << ", " << what << ", " << name_of(isa) << std::hexfloat
                                         << ": u = (" << u[0] << ", " << (grid.p > 1 ? u[1] : 0.0f) << ")";
    }
    std::vector<float> rounded;
    for (const std::uint16_t i : indices) {
      for (int c = 0; c < grid.p; ++c) rounded.push_back(grid.points[static_cast<std::size_t>(i * grid.p + c)]);
    }
    const auto count = static_cast<std::int64_t>(values.size());
    EXPECT_EQ(vg, test::spec::sum_products(values.data(), rounded.data(), count)) << what << " " << name_of(isa);
    EXPECT_EQ(gg, test::spec::sum_products(rounded.data(), rounded.data(), count)) << what << " " << name_of(isa);
  }
}

TEST_P(NearestEveryGrid, ShortCutsGiveTheIndexOfTryingAllPoints) {
  const Grid& grid = find_grid(GetParam());
  const int count = grid.table_points() > 1024 ? 1 << 14 : 1 << 16;
  Rng rng(static_cast<std::uint64_t>(grid.n_points));
  check(grid, hard_values(detail::nearest_table(grid), rng, count), "hard");
  check(grid, test::gaussian(rng, count), "normal");
  std::uniform_real_distribution<float> uniform(-5.3f, 5.3f);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& v : values) v = uniform(rng);
  check(grid, values, "uniform");
}

TEST_P(NearestEveryGrid, TryingAllPointsIsTheRuleOfTheFormatAndNearestInFloat64) {
  const Grid& grid = find_grid(GetParam());
  const NearestTable& table = detail::nearest_table(grid);
  Rng rng(5);
  const std::vector<float> values = hard_values(table, rng, 2048);
  for (std::size_t i = 0; i < values.size(); i += static_cast<std::size_t>(grid.p)) {
    const float* u = &values[i];
    const int index = detail::nearest_of_all(table, u);
    ASSERT_EQ(index, test::spec::nearest(grid, u)) << grid.name;
    double best = std::numeric_limits<double>::infinity();
    double chosen = 0;
    double largest = 0;
    for (int g = 0; g < grid.n_points; ++g) {
      double d = 0;  // |u - g|^2 - |u|^2, so that a huge u does not hide the difference
      for (int c = 0; c < grid.p; ++c) {
        const double q = grid.points[static_cast<std::size_t>(g * grid.p + c)];
        d += q * q - 2 * q * u[c];
      }
      best = std::min(best, d);
      largest = std::max(largest, std::fabs(d));
      if (g == index) chosen = d;
    }
    ASSERT_LE(chosen - best, 8 * 0x1p-24 * largest) << grid.name << " u = " << u[0];
  }
}

}  // namespace
}  // namespace higgs
