// dequantize and dequantize_rotated of quantize.h.
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

struct Shape {
  std::int64_t k;
  int block;
  std::int64_t group;
  bool column_scale;
};
constexpr Shape kShapes[] = {{64, 64, 64, false}, {320, 64, 128, true}, {576, 64, 576, false}, {1536, 512, 1024, true}};

template <typename Check>
void for_each_layer(const Check& check) {
  Rng rng(41);
  for (const Grid& grid : grids()) {
    for (const Shape& s : kShapes) {
      check(test::random_layer(rng, make_format(grid.name, 11, s.k, s.block, s.group, rng()), s.column_scale));
    }
  }
}

std::string describe(const Layer& layer) {
  return std::string(layer.format.grid->name) + " k = " + std::to_string(layer.format.k) + " ";
}

TEST(Dequantize, HasTheBitsOfTheFormatOnEveryIsaAndThreadCount) {
  for_each_layer([](const Layer& layer) {
    const std::vector<float> expected = test::spec::dequantize(layer);
    for (const Isa isa : supported_isas()) {
      for (const int threads : {1, 3}) {
        const IsaGuard isa_guard(isa);
        const ThreadsGuard threads_guard(threads);
        Matrix out(layer.format.n, layer.format.k, DType::f32);
        dequantize(layer.view(), out.view());
        test::expect_same_bits(out.floats(), expected, describe(layer) + name_of(isa));
      }
    }
  });
}

TEST(Dequantize, RotatedHasTheBitsOfTheFormatAndIgnoresColumnScales) {
  for_each_layer([](const Layer& layer) {
    Matrix out(layer.format.n, layer.format.k, DType::f32);
    dequantize_rotated(layer.view(), out.view());
    test::expect_same_bits(out.floats(), test::spec::dequantize(layer, false), describe(layer));
  });
}

TEST(Dequantize, IsCloseToTheFloat64Reference) {
  for_each_layer([](const Layer& layer) {
    Matrix out(layer.format.n, layer.format.k, DType::f32);
    dequantize(layer.view(), out.view());
    const std::vector<double> exact = reference::dequantize(layer.view());
    double error = 0;
    double energy = 0;
    for (std::size_t i = 0; i < exact.size(); ++i) {
      error += std::pow(exact[i] - load_f32(out.bytes.data(), DType::f32, static_cast<std::int64_t>(i)), 2);
      energy += exact[i] * exact[i];
    }
    EXPECT_LT(std::sqrt(error), (std::log2(layer.format.block) + 3) * 0x1p-24 * std::sqrt(energy)) << describe(layer);
  });
}

TEST(Dequantize, NarrowTypesAreTheRoundedFp32) {
  Rng rng(42);
  const Layer layer = test::random_layer(rng, make_format("p2_n64", 9, 192), true);
  Matrix full(9, 192, DType::f32);
  Matrix full_rotated(9, 192, DType::f32);
  dequantize(layer.view(), full.view());
  dequantize_rotated(layer.view(), full_rotated.view());
  for (const DType dtype : {DType::f16, DType::bf16}) {
    Matrix out(9, 192, dtype);
    dequantize(layer.view(), out.view());
    EXPECT_EQ(out.bytes, Matrix(full.floats(), 9, 192, dtype).bytes) << name_of(dtype);
    dequantize_rotated(layer.view(), out.view());
    EXPECT_EQ(out.bytes, Matrix(full_rotated.floats(), 9, 192, dtype).bytes) << name_of(dtype);
  }
}

TEST(Dequantize, WrongOutputShapeNamesBothSides) {
  Rng rng(43);
  const Layer layer = test::random_layer(rng, make_format("p1_n8", 2, 128));
  Matrix out(2, 64, DType::f32);
  const std::vector<std::string> words = {"[2, 64]", "[2, 128]"};
  expect_error(ErrorCode::invalid_argument, words, [&] { dequantize(layer.view(), out.view()); });
  expect_error(ErrorCode::invalid_argument, words, [&] { dequantize_rotated(layer.view(), out.view()); });
  Layer bad = layer;
  bad.format.group = 96;
  Matrix right(2, 128, DType::f32);
  expect_error(ErrorCode::invalid_argument, {"group 96"}, [&] { dequantize(bad.view(), right.view()); });
  Layer none(make_format("p1_n8", 0, 128));
  Matrix empty(0, 128, DType::f32);
  EXPECT_NO_THROW(dequantize(none.view(), empty.view()));
}

}  // namespace
}  // namespace higgs
