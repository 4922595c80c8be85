#include "higgs/matmul.h"

#include <gtest/gtest.h>

#include <cmath>

#include "helpers.h"

namespace higgs {
namespace {

using test::expect_error;
using test::IsaGuard;
using test::Layer;
using test::make_format;
using test::Matrix;
using test::Rng;
using test::ThreadsGuard;

constexpr std::int64_t kTokens = 17;
constexpr DType kDtypes[] = {DType::f32, DType::f16, DType::bf16};

struct Shape {
  std::int64_t n;
  std::int64_t k;
  int block;
  std::int64_t group;
  bool column_scale;
};
constexpr Shape kShapes[] = {
    {3, 64, 64, 64, false},     {130, 192, 64, 192, true},   {17, 192, 64, 64, false},   {17, 192, 64, 128, true},
    {130, 576, 64, 576, false}, {17, 576, 64, 128, false},   {17, 576, 64, 512, true},   {3, 1024, 1024, 1024, true},
    {17, 1024, 64, 320, false}, {17, 1536, 512, 512, false}, {5, 1536, 128, 1152, true}, {1, 1536, 256, 1024, false},
};

std::string describe(const Shape& s) {
  return "n = " + std::to_string(s.n) + " k = " + std::to_string(s.k) + " block " + std::to_string(s.block) +
         " group " + std::to_string(s.group);
}

// x W^T + bias done plainly on dequantized weights: everything stored in `dtype`, added up in fp32 in 8 lanes.
std::vector<float> plain_matmul(const Matrix& x, const Matrix& w, const std::vector<float>& bias, DType out) {
  std::vector<float> y;
  const std::vector<float> xs = x.floats();
  const std::vector<float> ws = w.floats();
  for (std::int64_t i = 0; i < x.rows; ++i) {
    for (std::int64_t o = 0; o < w.rows; ++o) {
      float lanes[8] = {};
      const float* a = &xs[static_cast<std::size_t>(i * x.cols)];
      const float* b = &ws[static_cast<std::size_t>(o * x.cols)];
      for (std::int64_t j = 0; j < x.cols; ++j) lanes[j % 8] += a[j] * b[j];
      const float sum =
          ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
      y.push_back(sum + bias[static_cast<std::size_t>(o)]);
    }
  }
  return Matrix(y, x.rows, w.rows, out).floats();
}

double distance(const std::vector<float>& y, const double* exact) {
  double sum = 0;
  for (std::size_t i = 0; i < y.size(); ++i) sum += std::pow(y[i] - exact[i], 2);
  return std::sqrt(sum);
}

// A layer, x in one dtype, a bias, and the float64 result; exact holds kTokens rows.
struct Problem {
  Layer layer;
  Matrix x;
  Matrix bias;
  std::vector<double> exact;

  [[nodiscard]] Matrix run(std::int64_t m, std::int64_t n, DType out) const {
    const Matrix b(bias.floats(), 1, bias.cols, out);
    Matrix y(m, n, out);
    matmul(x.top(m), layer.top(n), b.bytes.data(), y.view());
    return y;
  }
};

// One oracle call for the three dtypes: their rows of x are stacked.
std::vector<Problem> problems(const Layer& layer, Rng& rng) {
  const LayerFormat& f = layer.format;
  std::vector<float> stacked;
  std::vector<Problem> list;
  const Matrix bias(test::gaussian(rng, f.n, 0.1f), 1, f.n, DType::bf16);  // exact in fp32, nearly so in fp16
  const Matrix bias16(bias.floats(), 1, f.n, DType::f16);
  for (const DType dtype : kDtypes) {
    const Matrix x(test::gaussian(rng, kTokens * f.k), kTokens, f.k, dtype);
    const std::vector<float> values = x.floats();
    stacked.insert(stacked.end(), values.begin(), values.end());
    list.push_back({layer, x, dtype == DType::f16 ? bias16 : bias, {}});
  }
  const std::vector<double> y = reference::matmul(matrix(stacked.data(), 3 * kTokens, f.k), layer.view(), {});
  for (std::size_t d = 0; d < list.size(); ++d) {
    const auto begin = y.begin() + static_cast<std::int64_t>(d) * kTokens * f.n;
    list[d].exact.assign(begin, begin + kTokens * f.n);
    const std::vector<float> b = list[d].bias.floats();
    for (std::size_t i = 0; i < list[d].exact.size(); ++i) list[d].exact[i] += b[i % static_cast<std::size_t>(f.n)];
  }
  return list;
}

// Few outputs are a small sample of rounding errors: their bound is looser; the one on the mean over all cases is not.
void check_accuracy(const Problem& p, DType out, const std::string& what, std::vector<double>& ratios) {
  const LayerFormat& f = p.layer.format;
  Matrix w(f.n, f.k, out);
  dequantize(p.layer.view(), w.view());
  const double plain = distance(plain_matmul(p.x, w, p.bias.floats(), out), p.exact.data());
  const double bound = (p.exact.size() < 256 ? 4 : 2) * plain;
  for (const Isa isa : supported_isas()) {
    const IsaGuard guard(isa);
    const double all = distance(p.run(kTokens, f.n, out).floats(), p.exact.data());
    EXPECT_LE(all, bound) << what << ", " << name_of(isa) << ", m = " << kTokens;
    double single = 0;
    for (std::int64_t i = 0; i < kTokens; ++i) {
      Matrix y(1, f.n, out);
      const Matrix b(p.bias.floats(), 1, f.n, out);
      matmul({p.x.view().row(i), p.x.dtype, 1, f.k}, p.layer.view(), b.bytes.data(), y.view());
      single += std::pow(distance(y.floats(), p.exact.data() + i * f.n), 2);
    }
    EXPECT_LE(std::sqrt(single), bound) << what << ", " << name_of(isa) << ", m = 1";
    ratios.push_back(all / plain);
  }
}

class MatmulEveryGrid : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(All, MatmulEveryGrid, testing::ValuesIn(test::grid_names()), test::grid_name);

TEST_P(MatmulEveryGrid, ErrorIsAtMostTwiceThatOfAPlainMatmul) {
  Rng rng(51);
  std::vector<double> ratios;
  for (const Shape& s : kShapes) {
    const Layer layer =
        test::random_layer(rng, make_format(GetParam(), s.n, s.k, s.block, s.group, rng()), s.column_scale);
    for (const Problem& p : problems(layer, rng)) {
      const std::string what = describe(s) + ", x " + name_of(p.x.dtype);
      check_accuracy(p, p.x.dtype, what, ratios);
      if (p.x.dtype != DType::f32) check_accuracy(p, DType::f32, what + ", y float32", ratios);
    }
  }
  double squares = 0;
  for (const double r : ratios) squares += r * r;
  EXPECT_LE(std::sqrt(squares / static_cast<double>(ratios.size())), 2.0);
}

testing::AssertionResult same_bits(const Matrix& part, const Matrix& all) {
  for (std::int64_t i = 0; i < part.rows; ++i) {
    for (std::int64_t o = 0; o < part.cols; ++o) {
      if (std::bit_cast<std::uint32_t>(part.at(i, o)) != std::bit_cast<std::uint32_t>(all.at(i, o))) {
        return testing::AssertionFailure()
               << "y[" << i << ", " << o << "] is " << std::hexfloat << part.at(i, o) << " instead of " << all.at(i, o);
      }
    }
  }
  return testing::AssertionSuccess();
}

testing::AssertionResult every_part_is_that_of_the_whole(const Problem& p) {
  const std::int64_t n = p.layer.format.n;
  Matrix all(0, 0, DType::f32);
  {
    const ThreadsGuard threads(1);
    all = p.run(kTokens, n, DType::f32);
  }
  for (const float v : all.floats()) {
    if (!std::isfinite(v)) return testing::AssertionFailure() << "an element of y is " << v;
  }
  for (const int threads : {1, 3}) {
    const ThreadsGuard guard(threads);
    for (const std::int64_t m : {1, 2, 3, 4, 6, 17}) {
      for (const std::int64_t rows : {std::int64_t{1}, std::int64_t{3}, std::int64_t{17}, n}) {
        testing::AssertionResult same = same_bits(p.run(m, rows, DType::f32), all);
        if (!same) return same << ", threads " << threads << " m = " << m << " n = " << rows;
      }
    }
  }
  return testing::AssertionSuccess();
}

// Every m, n and thread count gives the bits of the whole product: rows and columns of y do not depend on each other.
TEST_P(MatmulEveryGrid, RowsHaveTheSameBitsInAnyBatchAndWithAnyThreads) {
  Rng rng(52);
  const Shape shapes[] = {{130, 192, 64, 128, true}, {33, 576, 64, 576, false}, {19, 1536, 128, 1152, false}};
  for (const Shape& s : shapes) {
    const Layer layer =
        test::random_layer(rng, make_format(GetParam(), s.n, s.k, s.block, s.group, rng()), s.column_scale);
    const Problem p{
        layer, Matrix(test::gaussian(rng, kTokens * s.k), kTokens, s.k), Matrix(test::gaussian(rng, s.n), 1, s.n), {}};
    for (const Isa isa : supported_isas()) {
      const IsaGuard guard(isa);
      EXPECT_TRUE(every_part_is_that_of_the_whole(p)) << describe(s) << " " << name_of(isa);
    }
  }
}

// Rows of a batch other than the first, alone.
TEST(Matmul, RowIOfABatchIsTheRowAlone) {
  Rng rng(53);
  for (const DType dtype : kDtypes) {
    const Layer layer = test::random_layer(rng, make_format("p2_n256", 37, 320, 64, 128, 1), true);
    const Matrix x(test::gaussian(rng, kTokens * 320), kTokens, 320, dtype);
    for (const Isa isa : supported_isas()) {
      const IsaGuard guard(isa);
      Matrix all(kTokens, 37, dtype);
      matmul(x.view(), layer.view(), nullptr, all.view());
      for (std::int64_t i = 0; i < kTokens; ++i) {
        Matrix one(1, 37, dtype);
        matmul({x.view().row(i), dtype, 1, 320}, layer.view(), nullptr, one.view());
        const auto size = one.bytes.size();
        ASSERT_EQ(std::memcmp(one.bytes.data(), all.bytes.data() + static_cast<std::size_t>(i) * size, size), 0)
            << name_of(isa) << " " << name_of(dtype) << " row " << i;
      }
    }
  }
}

TEST(Matmul, EmptyProblemsTouchNothing) {
  Rng rng(54);
  const Layer layer = test::random_layer(rng, make_format("p2_n256", 5, 128));
  const Matrix none(0, 128, DType::f32);
  Matrix y(0, 5, DType::f32);
  EXPECT_NO_THROW(matmul(none.view(), layer.view(), nullptr, y.view()));
  const Matrix x(test::gaussian(rng, 3 * 128), 3, 128);
  Matrix empty(3, 0, DType::f32);
  EXPECT_NO_THROW(matmul(x.view(), layer.top(0), nullptr, empty.view()));
}

TEST(Matmul, OneHotInputsReadTheColumns) {
  Rng rng(55);
  const Layer layer = test::random_layer(rng, make_format("p4_n256", 9, 192, 64, 128, 2), true);
  const std::vector<double> w = reference::dequantize(layer.view());
  std::vector<float> identity(192 * 192);
  for (std::size_t j = 0; j < 192; ++j) identity[j * 192 + j] = 1.0f;
  for (const Isa isa : supported_isas()) {
    const IsaGuard guard(isa);
    Matrix y(192, 9, DType::f32);
    matmul(matrix(identity.data(), 192, 192), layer.view(), nullptr, y.view());
    for (std::int64_t j = 0; j < 192; ++j) {
      for (std::int64_t o = 0; o < 9; ++o) ASSERT_NEAR(y.at(j, o), w[static_cast<std::size_t>(o * 192 + j)], 2e-6) << j;
    }
  }
}

TEST(Matmul, QuantizedProductIsCloseToTheOriginalOne) {
  Rng rng(56);
  const LayerFormat f = make_format("p2_n256", 48, 896, 0, 0, 3);
  const Matrix w(test::gaussian(rng, f.n * f.k, 0.03f), f.n, f.k);
  const Layer layer = test::quantize_layer(w.view(), f);
  const Matrix x(test::gaussian(rng, 8 * f.k), 8, f.k);
  Matrix y(8, f.n, DType::f32);
  matmul(x.view(), layer.view(), nullptr, y.view());
  const std::vector<float> original = plain_matmul(x, w, std::vector<float>(48), DType::f32);
  double error = 0;
  double energy = 0;
  for (std::size_t i = 0; i < original.size(); ++i) {
    error += std::pow(load_f32(y.bytes.data(), DType::f32, static_cast<std::int64_t>(i)) - original[i], 2);
    energy += std::pow(original[i], 2);
  }
  EXPECT_NEAR(error / energy / f.grid->t2, 1.0, 0.3);
}

TEST(Matmul, ErrorsNameBothSides) {
  Rng rng(57);
  const Layer layer = test::random_layer(rng, make_format("p1_n16", 5, 128));
  const Matrix x(2, 128, DType::f16);
  const Matrix wide(2, 192, DType::f16);
  Matrix y(2, 5, DType::f16);
  Matrix y_low(3, 5, DType::f16);
  Matrix y_narrow(2, 4, DType::f16);
  Matrix y_type(2, 5, DType::bf16);
  expect_error(ErrorCode::invalid_argument, {"192", "128"},
               [&] { matmul(wide.view(), layer.view(), nullptr, y.view()); });
  expect_error(ErrorCode::invalid_argument, {"[3, 5]", "[2, 5]"},
               [&] { matmul(x.view(), layer.view(), nullptr, y_low.view()); });
  expect_error(ErrorCode::invalid_argument, {"[2, 4]", "[2, 5]"},
               [&] { matmul(x.view(), layer.view(), nullptr, y_narrow.view()); });
  expect_error(ErrorCode::type, {"bfloat16", "float16"},
               [&] { matmul(x.view(), layer.view(), nullptr, y_type.view()); });
  ConstMatrixView negative = x.view();
  negative.rows = -1;
  expect_error(ErrorCode::invalid_argument, {"-1"},
               [&] { matmul(negative, layer.view(), nullptr, {nullptr, DType::f16, -1, 5}); });
  Layer bad = layer;
  bad.format.block = 256;
  expect_error(ErrorCode::invalid_argument, {"256"}, [&] { matmul(x.view(), bad.view(), nullptr, y.view()); });
  bad.format.grid = nullptr;
  expect_error(ErrorCode::invalid_argument, {"grid"}, [&] { matmul(x.view(), bad.view(), nullptr, y.view()); });
}

}  // namespace
}  // namespace higgs
