#include "higgs/quantize.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "helpers.h"

namespace higgs {
namespace {

using test::expect_error;
using test::gaussian;
using test::IsaGuard;
using test::Layer;
using test::make_format;
using test::Matrix;
using test::quantize_layer;
using test::Rng;
using test::ThreadsGuard;

// Rows that are hard for a quantizer: zeros, one-hot rows at several magnitudes (a rotated one-hot row is +-const, so
// it sits on two values exactly), one huge value among small ones, subnormal weights, a constant, large weights, heavy
// tails, and ordinary ones.
Matrix hard_rows(std::int64_t k, DType dtype, Rng& rng) {
  constexpr std::int64_t kRows = 12;
  std::vector<float> w = gaussian(rng, kRows * k, 0.02f);
  const auto row = [&](std::int64_t i) { return w.begin() + i * k; };
  std::fill_n(row(0), k, 0.0f);
  std::fill_n(row(1), k, 0.0f);
  row(1)[k - 1] = 1.0f;
  std::fill_n(row(2), k, 0.0f);
  row(2)[3] = -3e-5f;
  row(3)[k / 2] = 1000.0f;
  const float smallest = dtype == DType::f16 ? 0x1p-24f : std::numeric_limits<float>::denorm_min();
  for (std::int64_t j = 0; j < k; ++j) row(4)[j] = static_cast<float>(static_cast<int>(rng() % 5) - 2) * smallest;
  std::fill_n(row(5), k, 0.25f);
  for (std::int64_t j = 0; j < k; ++j) row(6)[j] = rng() % 2 == 0 ? 10000.0f : -10000.0f;
  for (std::int64_t j = 0; j < k; ++j) row(7)[j] = std::pow(row(7)[j] * 50, 3.0f);
  for (std::int64_t j = 0; j < k; ++j) row(8)[j] *= 1e-5f;
  row(9)[0] = -0.0f;
  return Matrix(w, kRows, k, dtype);
}

struct Shape {
  std::int64_t k;
  int block;
  std::int64_t group;
};
constexpr Shape kShapes[] = {{64, 64, 64}, {320, 64, 128}, {512, 512, 512}, {576, 64, 576}};

class QuantizeEveryGrid : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, QuantizeEveryGrid, testing::ValuesIn(test::names_of_family(false)), test::grid_name);

TEST_P(QuantizeEveryGrid, WritesTheBytesOfTheFormatOnEveryIsaAndThreadCount) {
  Rng rng(31);
  for (const Shape& shape : kShapes) {
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      if (dtype != DType::f32 && shape.k != 320) continue;
      const Matrix w = hard_rows(shape.k, dtype, rng);
      const LayerFormat f = make_format(GetParam(), w.rows, shape.k, shape.block, shape.group, 77);
      std::vector<std::uint16_t> column_scale;
      if (dtype == DType::bf16) column_scale = test::random_column_scale(rng, shape.k);
      if (dtype == DType::bf16) column_scale[1] = 0x0001;  // the smallest positive half
      const Layer expected = test::spec::quantize(w, f, column_scale);
      for (const Isa isa : supported_isas()) {
        for (const int threads : {1, 2, 3}) {
          const IsaGuard isa_guard(isa);
          const ThreadsGuard threads_guard(threads);
          const Layer layer = quantize_layer(w.view(), f, column_scale);
          ASSERT_EQ(layer.scales, expected.scales) << name_of(isa) << " k = " << shape.k << " threads " << threads;
          ASSERT_EQ(layer.indices, expected.indices) << name_of(isa) << " k = " << shape.k << " threads " << threads;
        }
      }
    }
  }
}

class QuantizeBothFamilies : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, QuantizeBothFamilies, testing::ValuesIn(test::grid_names()), test::grid_name);

TEST_P(QuantizeBothFamilies, ReturnedErrorIsTheErrorOfTheStoredBytes) {
  Rng rng(32);
  const LayerFormat f = make_format(GetParam(), 40, 384, 128, 384, 5);
  const Matrix w(gaussian(rng, f.n * f.k, 0.05f), f.n, f.k);
  const Layer layer = quantize_layer(w.view(), f);
  const std::vector<double> back = reference::dequantize(layer.view());
  double error = 0;
  double energy = 0;
  for (std::int64_t i = 0; i < f.n * f.k; ++i) {
    const double v = load_f32(w.bytes.data(), DType::f32, i);
    error += std::pow(v - back[static_cast<std::size_t>(i)], 2);
    energy += v * v;
  }
  EXPECT_NEAR(layer.result.energy / energy, 1.0, 1e-6);
  EXPECT_NEAR(layer.result.t2() / (error / energy), 1.0, 1e-3);
  EXPECT_NEAR(layer.result.t2() / f.grid->t2, 1.0, 0.15);
}

// Sum of squared errors of one group for a given scale, in float64.
double error_with(const test::spec::Group& group, const float* v, const Grid& grid, std::uint16_t scale) {
  double error = 0;
  for (std::size_t i = 0; i < group.u.size(); ++i) {
    const auto p = static_cast<std::size_t>(grid.p);
    const double g = grid.points[static_cast<std::size_t>(group.indices[i / p]) * p + i % p];
    error += std::pow(v[i] - static_cast<double>(f16_to_f32(scale)) * g, 2);
  }
  return error;
}

TEST(Quantize, RefittedScaleNeverRaisesTheErrorAndUsuallyLowersIt) {
  Rng rng(33);
  int lowered = 0;
  int groups = 0;
  for (const char* name : {"p1_n4", "p2_n16", "p2_n256", "p4_n256", "p4_n4096", "ch8"}) {
    const Matrix w = hard_rows(512, DType::f32, rng);
    const LayerFormat f = make_format(name, w.rows, 512, 128, 256, 3);
    const Layer layer = quantize_layer(w.view(), f);
    for (std::int64_t i = 0; i < f.n; ++i) {
      const std::vector<float> v = test::spec::rotated_row(w, i, f, {});
      for (std::int64_t g = 0; g < f.row_groups(); ++g, ++groups) {
        const float* values = &v[static_cast<std::size_t>(g * f.group)];
        const test::spec::Group group = test::spec::quantize_group(*f.grid, values, f.group);
        const std::uint16_t stored = layer.scales[static_cast<std::size_t>(i * f.row_groups() + g)];
        const double before = error_with(group, values, *f.grid, group.rms_scale);
        const double after = error_with(group, values, *f.grid, stored);
        ASSERT_LE(after, before * (1 + 1e-9)) << name << " row " << i;
        lowered += after < before;
      }
    }
  }
  EXPECT_GT(lowered, groups / 3);
}

TEST(Quantize, ZeroRowsGiveZeroScalesAndExactZeros) {
  for (const Grid& grid : grids()) {
    const LayerFormat f = make_format(grid.name, 3, 192);
    const Matrix w(std::vector<float>(3 * 192), 3, 192);
    const Layer layer = quantize_layer(w.view(), f);
    EXPECT_EQ(layer.scales, std::vector<std::uint16_t>(layer.scales.size())) << grid.name;
    EXPECT_EQ(layer.result.error, 0.0);
    EXPECT_EQ(layer.result.energy, 0.0);
    EXPECT_EQ(layer.result.t2(), 0.0);
    Matrix out(3, 192, DType::f32);
    dequantize(layer.view(), out.view());
    for (const float v : out.floats()) ASSERT_EQ(v, 0.0f) << grid.name;
  }
}

TEST(Quantize, QuantizingTheResultAgainChangesLittle) {
  Rng rng(34);
  for (const char* name : {"p1_n16", "p2_n64", "p2_n256", "p4_n256", "p4_n4096"}) {
    const LayerFormat f = make_format(name, 24, 1024, 256, 1024, 8);
    const Matrix w(gaussian(rng, f.n * f.k), f.n, f.k);
    const Layer once = quantize_layer(w.view(), f);
    Matrix back(f.n, f.k, DType::f32);
    dequantize(once.view(), back.view());
    const Layer twice = quantize_layer(back.view(), f);
    // Rounded values have less energy, so their first scale is smaller by half of t2: a second rounding moves few
    // points.
    EXPECT_LT(twice.result.t2(), 0.25 * once.result.t2()) << name;
    std::int64_t same = 0;
    for (std::size_t i = 0; i < once.indices.size(); ++i) same += once.indices[i] == twice.indices[i];
    EXPECT_GT(static_cast<double>(same), 0.8 * static_cast<double>(once.indices.size())) << name;
  }
}

TEST(Quantize, PowersOfTwoScaleTheScalesOnly) {
  Rng rng(35);
  const LayerFormat f = make_format("p2_n256", 6, 256);
  std::vector<float> values = gaussian(rng, f.n * f.k, 0.1f);
  const Layer before = quantize_layer(matrix(values.data(), f.n, f.k), f);
  for (float& v : values) v *= 8.0f;
  const Layer after = quantize_layer(matrix(values.data(), f.n, f.k), f);
  EXPECT_EQ(after.indices, before.indices);
  for (std::size_t i = 0; i < before.scales.size(); ++i) {
    EXPECT_EQ(f16_to_f32(after.scales[i]), 8.0f * f16_to_f32(before.scales[i]));
  }
  EXPECT_DOUBLE_EQ(after.result.error, 64 * before.result.error);
}

TEST(Quantize, RowsAreIndependentAndNeighboursUntouched) {
  Rng rng(36);
  const LayerFormat f = make_format("p2_n512", 9, 320, 64, 128);
  const Matrix w(gaussian(rng, f.n * f.k), f.n, f.k);
  const Layer all = quantize_layer(w.view(), f);
  LayerFormat one = f;
  one.n = 1;
  for (std::int64_t i = 0; i < f.n; ++i) {
    const Layer single = quantize_layer({w.view().row(i), DType::f32, 1, f.k}, one);
    for (std::size_t b = 0; b < single.indices.size(); ++b) {
      ASSERT_EQ(single.indices[b], all.indices[static_cast<std::size_t>(i * f.row_bytes()) + b]) << i;
    }
    for (std::size_t g = 0; g < single.scales.size(); ++g) {
      ASSERT_EQ(single.scales[g], all.scales[static_cast<std::size_t>(i * f.row_groups()) + g]) << i;
    }
  }
  LayerFormat none = f;
  none.n = 0;
  EXPECT_EQ(quantize(w.top(0), none, nullptr, nullptr, nullptr).energy, 0.0);
}

TEST(Quantize, ColumnScalesMoveTheErrorToTheSmallOnes) {
  Rng rng(37);
  const LayerFormat f = make_format("p2_n256", 64, 256);
  const Matrix w(gaussian(rng, f.n * f.k), f.n, f.k);
  std::vector<std::uint16_t> s(256, f32_to_f16(0.5f));
  for (std::size_t j = 0; j < 16; ++j) s[j] = f32_to_f16(4.0f);
  const Layer layer = quantize_layer(w.view(), f, s);
  EXPECT_NEAR(layer.result.t2() / f.grid->t2, 1.0, 0.1);  // of the scaled weights
  const std::vector<double> back = reference::dequantize(layer.view());
  double protected_error = 0;
  double other_error = 0;
  for (std::int64_t i = 0; i < f.n * f.k; ++i) {
    const double e = std::pow(load_f32(w.bytes.data(), DType::f32, i) - back[static_cast<std::size_t>(i)], 2);
    (i % f.k < 16 ? protected_error : other_error) += e;
  }
  EXPECT_NEAR((other_error / 240) / (protected_error / 16), 64.0, 12.0);
}

TEST(Quantize, BadWeightIsNamedInEveryDtype) {
  const LayerFormat f = make_format("p2_n256", 20, 128);
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity()}) {
      std::vector<float> values(20 * 128, 0.5f);
      values[17 * 128 + 93] = bad;
      values[17 * 128 + 95] = bad;
      const Matrix w(values, 20, 128, dtype);
      expect_error(ErrorCode::invalid_argument, {"[17, 93]", std::isnan(bad) ? "nan" : "inf"},
                   [&] { quantize_layer(w.view(), f); });
    }
  }
}

TEST(Quantize, FirstBadElementIsNamedWithSeveralThreads) {
  const LayerFormat f = make_format("p2_n256", 200, 64);
  std::vector<float> values(200 * 64, 1.0f);
  for (std::size_t i = 3; i < 200; ++i) values[i * 64 + 1] = std::numeric_limits<float>::quiet_NaN();
  const Matrix w(values, 200, 64);
  const ThreadsGuard guard(3);
  for (int trial = 0; trial < 20; ++trial) {
    expect_error(ErrorCode::invalid_argument, {"[3, 1]"}, [&] { quantize_layer(w.view(), f); });
  }
}

TEST(Quantize, ScaleThatDoesNotFitIsAnError) {
  const LayerFormat f = make_format("p2_n256", 2, 128);
  for (const float value : {7e4f, 1e30f, std::numeric_limits<float>::max()}) {
    std::vector<float> values(2 * 128, 1.0f);
    for (std::size_t j = 128; j < 256; ++j) values[j] = value;
    const Matrix w(values, 2, 128);
    expect_error(ErrorCode::invalid_argument, {"65504"}, [&] { quantize_layer(w.view(), f); });
  }
}

TEST(Quantize, BadColumnScaleIsNamed) {
  const LayerFormat f = make_format("p1_n16", 1, 64);
  const Matrix w(std::vector<float>(64, 1.0f), 1, 64);
  // zero, minus zero, negative, infinite, NaN
  for (const std::uint16_t bad : {0x0000, 0x8000, 0xbc00, 0x7c00, 0x7e00}) {
    std::vector<std::uint16_t> s(64, 0x3c00);
    s[41] = bad;
    expect_error(ErrorCode::invalid_argument, {"column_scale[41]", "positive"},
                 [&] { quantize_layer(w.view(), f, s); });
    Layer layer(f);
    std::fill(layer.scales.begin(), layer.scales.end(), std::uint16_t{0});
    layer.column_scale = s;
    Matrix out(1, 64, DType::f32);
    expect_error(ErrorCode::invalid_argument, {"column_scale[41]", "positive"},
                 [&] { dequantize(layer.view(), out.view()); });
  }
}

TEST(Quantize, ShapesThatDoNotMatchNameBothSides) {
  const LayerFormat f = make_format("p1_n16", 4, 128);
  Layer layer(f);
  const Matrix narrow(4, 64, DType::f32);
  const Matrix low(3, 128, DType::f32);
  expect_error(ErrorCode::invalid_argument, {"[4, 64]", "[4, 128]"}, [&] { quantize_layer(narrow.view(), f); });
  expect_error(ErrorCode::invalid_argument, {"[3, 128]", "[4, 128]"}, [&] { quantize_layer(low.view(), f); });
  LayerFormat wrong = f;
  wrong.block = 96;
  expect_error(ErrorCode::invalid_argument, {"block 96"}, [&] { quantize_layer(low.view(), wrong); });
}

}  // namespace
}  // namespace higgs
