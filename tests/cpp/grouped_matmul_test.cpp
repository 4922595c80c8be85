#include <gtest/gtest.h>

#include <cstring>

#include "helpers.h"
#include "higgs/matmul.h"

namespace higgs {
namespace {

using test::expect_error;
using test::Layer;
using test::make_format;
using test::Matrix;
using test::random_layer;
using test::Rng;

constexpr std::int64_t kExperts = 4;
constexpr std::int64_t kRows = 33;  // of an expert

struct Problem {
  Layer layer;
  Matrix x;

  explicit Problem(std::int64_t rows, DType dtype) : Problem(rows, dtype, Rng(7)) {}
  Problem(std::int64_t rows, DType dtype, Rng rng)
      : layer(random_layer(rng, make_format("p2_n64", kExperts * kRows, 192, 64, 64), true)),
        x(test::gaussian(rng, rows * 192), rows, 192, dtype) {}
};

// Rows of y are those of a matmul with the whole matrix, the columns of the expert.
void check(const Problem& p, const std::vector<std::int32_t>& offsets) {
  Matrix y(p.x.rows, kRows, p.x.dtype);
  grouped_matmul(p.x.view(), offsets, p.layer.view(), y.view());
  Matrix all(p.x.rows, kExperts * kRows, p.x.dtype);
  matmul(p.x.view(), p.layer.view(), nullptr, all.view());
  std::int64_t expert = 0;
  for (std::int64_t i = 0; i < p.x.rows; ++i) {
    while (i >= offsets[static_cast<std::size_t>(expert)]) ++expert;
    const std::size_t bytes = kRows * size_of(p.x.dtype);
    EXPECT_EQ(std::memcmp(y.view().row(i), all.view().row(i) + static_cast<std::size_t>(expert) * bytes, bytes), 0)
        << "row " << i << " of expert " << expert;
  }
}

TEST(GroupedMatmul, RowsMeetTheirExpert) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const Problem p(9, dtype);
    check(p, {3, 3, 8, 9});
    check(p, {0, 0, 0, 9});
    check(p, {9, 9, 9, 9});
    check(p, {1, 2, 3, 9});
  }
  check(Problem(0, DType::f32), {0, 0, 0, 0});
}

TEST(GroupedMatmul, BadArguments) {
  const Problem p(9, DType::f32);
  Matrix y(9, kRows, DType::f32);
  const auto run = [&](std::vector<std::int32_t> offsets) {
    return [&, offsets] { grouped_matmul(p.x.view(), offsets, p.layer.view(), y.view()); };
  };
  expect_error(ErrorCode::invalid_argument, {"0 experts cannot share n = 132 rows"}, run({}));
  expect_error(ErrorCode::invalid_argument, {"5 experts cannot share n = 132 rows"}, run({1, 2, 3, 4, 9}));
  expect_error(ErrorCode::invalid_argument, {"offsets[1] is 2, less than the 3 before it"}, run({3, 2, 5, 9}));
  expect_error(ErrorCode::invalid_argument, {"offsets[0] is -1"}, run({-1, 2, 5, 9}));
  expect_error(ErrorCode::invalid_argument, {"the last offset is 8, x has 9 rows"}, run({3, 4, 5, 8}));
  expect_error(ErrorCode::invalid_argument, {"y is [9, 33], expected [9, 66]"}, run({3, 9}));
}

}  // namespace
}  // namespace higgs
