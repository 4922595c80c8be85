#include "higgs/hadamard.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <numeric>

#include "helpers.h"

namespace higgs {
namespace {

using test::expect_error;
using test::gaussian;
using test::hadamard_entry;
using test::IsaGuard;
using test::Matrix;
using test::Rng;

constexpr int kBlocks[] = {64, 128, 192, 256, 320, 448, 512, 576, 640, 704, 832, 896, 960, 1024};

double norm(const std::vector<float>& v) {
  double sum = 0;
  for (float x : v) sum += static_cast<double>(x) * x;
  return std::sqrt(sum);
}
double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += std::pow(static_cast<double>(a[i]) - b[i], 2);
  return std::sqrt(sum);
}

class FwhtEveryBlock : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(All, FwhtEveryBlock, testing::ValuesIn(kBlocks), testing::PrintToStringParamName());

// T[i][j] of hadamard.h in float64.
double transform_entry(int block, int i, int j) {
  int r = block;
  while (r % 2 == 0) r /= 2;
  const int size = block / r;
  const double z = 2 * std::numbers::pi * (i / size) * (j / size) / r;
  return hadamard_entry(i % size, j % size) * (std::cos(z) + std::sin(z)) / std::sqrt(static_cast<double>(block));
}

// The rounding error of the butterfly stages, one product and, for odd factors r, chains of r products, relative to the
// norm of the block.
double bound(int block) {
  int r = block;
  while (r % 2 == 0) r /= 2;
  return (std::log2(block / r) + 1 + (r > 1 ? r + 1 : 0)) * 0x1p-24;
}

TEST_P(FwhtEveryBlock, AgreesWithTheMatrix) {
  const int block = GetParam();
  Rng rng(static_cast<std::uint64_t>(block));
  for (const Isa isa : supported_isas()) {
    const IsaGuard guard(isa);
    const std::vector<float> in = gaussian(rng, 3 * block);
    std::vector<float> out = in;
    fwht(out, block);
    for (int b = 0; b < 3; ++b) {
      double error = 0;
      double energy = 0;
      for (int i = 0; i < block; ++i) {
        double sum = 0;
        for (int j = 0; j < block; ++j) {
          sum += transform_entry(block, i, j) * in[static_cast<std::size_t>(b * block + j)];
        }
        const double exact = sum;
        error += std::pow(exact - out[static_cast<std::size_t>(b * block + i)], 2);
        energy += exact * exact;
      }
      EXPECT_LE(std::sqrt(error), bound(block) * std::sqrt(energy)) << name_of(isa) << ", block number " << b;
    }
  }
}

TEST_P(FwhtEveryBlock, IsTheSameBitsAsTheFormatSaysOnEveryIsa) {
  const int block = GetParam();
  Rng rng(7);
  std::vector<float> in = gaussian(rng, 4 * block);
  in[3] = 1e30f;  // a large value makes any other order of additions visible
  in[static_cast<std::size_t>(block) + 5] = -3e-39f;
  std::vector<float> expected = in;
  for (int b = 0; b < 4; ++b) test::spec::transform(&expected[static_cast<std::size_t>(b * block)], block);
  for (const Isa isa : supported_isas()) {
    const IsaGuard guard(isa);
    std::vector<float> out = in;
    fwht(out, block);
    test::expect_same_bits(out, expected, name_of(isa));
  }
}

TEST_P(FwhtEveryBlock, IsAnInvolutionAndKeepsTheNorm) {
  const int block = GetParam();
  Rng rng(11);
  for (int trial = 0; trial < 20; ++trial) {
    const std::vector<float> in = gaussian(rng, block);
    std::vector<float> out = in;
    fwht(out, block);
    EXPECT_NEAR(norm(out) / norm(in), 1.0, bound(block));
    EXPECT_GT(distance(out, in), 0.5 * norm(in));
    fwht(out, block);
    EXPECT_LE(distance(out, in), 2 * bound(block) * norm(in));
  }
}

TEST_P(FwhtEveryBlock, IsLinear) {
  const int block = GetParam();
  Rng rng(13);
  for (int trial = 0; trial < 20; ++trial) {
    std::vector<float> a = gaussian(rng, block);
    std::vector<float> b = gaussian(rng, block);
    std::vector<float> sum(a.size());
    for (std::size_t i = 0; i < a.size(); ++i) sum[i] = 2.0f * a[i] - 0.5f * b[i];
    fwht(a, block);
    fwht(b, block);
    fwht(sum, block);
    std::vector<float> expected(a.size());
    for (std::size_t i = 0; i < a.size(); ++i) expected[i] = 2.0f * a[i] - 0.5f * b[i];
    EXPECT_LE(distance(sum, expected), 3 * bound(block) * (2 * norm(a) + norm(b)));
  }
}

TEST_P(FwhtEveryBlock, OneHotGivesOneColumnOfTheMatrix) {
  const int block = GetParam();
  for (int j = 0; j < block; j += 37) {
    std::vector<float> v(static_cast<std::size_t>(block));
    v[static_cast<std::size_t>(j)] = 1.0f;
    fwht(v, block);
    for (int i = 0; i < block; ++i) {
      ASSERT_NEAR(v[static_cast<std::size_t>(i)], transform_entry(block, i, j), 1e-7) << i << " " << j;
    }
  }
}

TEST(Fwht, WrongBlockNamesTheValueAndTheLegalSet) {
  std::vector<float> v(96);
  for (const int block : {0, -64, 1, 32, 96, 1088, 2048}) {
    expect_error(ErrorCode::invalid_argument, {std::to_string(block), "multiple of 64 in 64..1024"},
                 [&] { fwht(v, block); });
  }
  expect_error(ErrorCode::invalid_argument, {"64", "96"}, [&] { fwht(v, 64); });
}

TEST(Signs, GoldenWords) {  // the published outputs of SplitMix64 for the seeds 0 and 1234567
  EXPECT_EQ(sign_word(0, 0), 0xe220a8397b1dcdafull);
  EXPECT_EQ(sign_word(0, 1), 0x6e789e6aa1b965f4ull);
  EXPECT_EQ(sign_word(0, 2), 0x06c45d188009454full);
  EXPECT_EQ(sign_word(1234567, 0), 6457827717110365317ull);
  EXPECT_EQ(sign_word(1234567, 4), 16408922859458223821ull);
}

TEST(Signs, BitSetMeansMinusOne) {
  for (std::int64_t j = 0; j < 4096; ++j) {
    ASSERT_EQ(sign_of(42, j), test::spec::sign(42, j)) << j;
    const bool bit = (sign_word(42, static_cast<std::uint64_t>(j / 64)) >> (j % 64) & 1u) != 0;
    ASSERT_EQ(sign_of(42, j), bit ? -1.0f : 1.0f) << j;
  }
}

TEST(Signs, AreBalancedAndUncorrelated) {
  constexpr int kColumns = 1 << 18;
  const double sigma = std::sqrt(static_cast<double>(kColumns));
  for (const std::uint64_t seed : {0ull, 1ull, 2ull, 0xffffffffffffffffull}) {
    std::vector<double> sums(4);
    for (std::int64_t j = 0; j < kColumns; ++j) {
      const double s = sign_of(seed, j);
      sums[0] += s;
      sums[1] += s * sign_of(seed, j + 1);
      sums[2] += s * sign_of(seed, j + 64);
      sums[3] += s * sign_of(seed + 1, j);
    }
    for (std::size_t t = 0; t < sums.size(); ++t) EXPECT_LT(std::fabs(sums[t]), 4 * sigma) << seed << " " << t;
  }
}

TEST(Signs, InputVectorIsSignOverScaleAndDependsOnSeedAndColumnOnly) {
  constexpr int kColumns = 640;
  std::vector<float> plain(kColumns);
  input_vector(9, {}, plain);
  std::vector<float> longer(2 * kColumns);
  input_vector(9, {}, longer);
  std::vector<float> other(kColumns);
  input_vector(10, {}, other);
  std::vector<float> scale(kColumns);
  std::iota(scale.begin(), scale.end(), 1.0f);
  std::vector<float> scaled(kColumns);
  input_vector(9, scale, scaled);
  int differences = 0;
  for (std::size_t j = 0; j < plain.size(); ++j) {
    ASSERT_EQ(plain[j], sign_of(9, static_cast<std::int64_t>(j)));
    ASSERT_EQ(plain[j], longer[j]);
    ASSERT_EQ(scaled[j], plain[j] / scale[j]);
    differences += plain[j] != other[j];
  }
  EXPECT_NEAR(differences, kColumns / 2, 4 * std::sqrt(kColumns) / 2);
  expect_error(ErrorCode::invalid_argument, {"640", "1280"}, [&] { input_vector(9, scale, longer); });
}

void check_rotate_and_back(const Matrix& in, const std::vector<float>& scale) {
  Matrix rotated(in.rows, in.cols, DType::f32);
  rotate(in.view(), 128, 5, scale, rotated.view());
  for (std::int64_t i = 0; i < in.rows; ++i) {
    std::vector<float> expected(static_cast<std::size_t>(in.cols));
    for (std::size_t j = 0; j < expected.size(); ++j) {
      const auto column = static_cast<std::int64_t>(j);
      expected[j] = test::spec::sign(5, column) * (scale.empty() ? 1.0f : scale[j]) * in.at(i, column);
    }
    for (std::size_t b = 0; b < expected.size(); b += 128) test::spec::transform(&expected[b], 128);
    for (std::int64_t j = 0; j < in.cols; ++j) ASSERT_EQ(rotated.at(i, j), expected[static_cast<std::size_t>(j)]);
  }
  Matrix back(in.rows, in.cols, in.dtype);
  unrotate(rotated.view(), 128, 5, scale, back.view());
  const double tolerance = in.dtype == DType::f32 ? 2e-5 : in.dtype == DType::f16 ? 0x1p-10 : 0x1p-7;
  for (std::int64_t i = 0; i < in.rows; ++i) {
    for (std::int64_t j = 0; j < in.cols; ++j) {
      ASSERT_NEAR(back.at(i, j), in.at(i, j), tolerance * (1 + std::fabs(in.at(i, j)))) << i << " " << j;
    }
  }
}

TEST(Rotate, UndoneByUnrotateInEveryDtypeWithAndWithoutColumnScales) {
  constexpr std::int64_t kRows = 19;
  constexpr std::int64_t kCols = 384;
  Rng rng(3);
  std::vector<float> scale;
  for (const std::uint16_t s : test::random_column_scale(rng, kCols)) scale.push_back(f16_to_f32(s));
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const Matrix in(gaussian(rng, kRows * kCols), kRows, kCols, dtype);
    check_rotate_and_back(in, {});
    check_rotate_and_back(in, scale);
  }
}

TEST(Rotate, ErrorsNameBothSides) {
  const Matrix in(4, 128, DType::f32);
  Matrix narrow(4, 64, DType::f32);
  Matrix half(4, 128, DType::f16);
  Matrix out(4, 128, DType::f32);
  const std::vector<float> short_scale(64, 1.0f);
  expect_error(ErrorCode::invalid_argument, {"[4, 64]", "[4, 128]"},
               [&] { rotate(in.view(), 64, 0, {}, narrow.view()); });
  expect_error(ErrorCode::invalid_argument, {"64", "128"}, [&] { rotate(in.view(), 64, 0, short_scale, out.view()); });
  expect_error(ErrorCode::invalid_argument, {"256", "128"}, [&] { rotate(in.view(), 256, 0, {}, out.view()); });
  expect_error(ErrorCode::type, {"float32"}, [&] { rotate(in.view(), 64, 0, {}, half.view()); });
  expect_error(ErrorCode::type, {"float32"}, [&] { unrotate(half.view(), 64, 0, {}, out.view()); });
}

}  // namespace
}  // namespace higgs
