// The oracle itself, on cases small enough to work out by hand.
#include "higgs/reference.h"

#include <gtest/gtest.h>

#include <cmath>

#include "helpers.h"

namespace higgs {
namespace {

using test::Layer;
using test::make_format;
using test::Rng;

// One row of p1_n4, 64 columns: 16 bytes of four indices each.
Layer one_row(std::uint64_t seed) {
  Layer layer(make_format("p1_n4", 1, 64, 64, 64, seed));
  layer.scales = {f32_to_f16(2.0f)};
  return layer;
}

TEST(Reference, ConstantRotatedRowIsOneColumn) {
  Layer layer = one_row(0);
  std::fill(layer.indices.begin(), layer.indices.end(), std::uint8_t{0xff});  // index 3 everywhere
  const std::vector<double> w = reference::dequantize(layer.view());
  const double top = layer.format.grid->points[3];
  EXPECT_DOUBLE_EQ(w[0], 2.0 * top * 64 / 8 * sign_of(0, 0));  // H of a constant: all in column 0
  for (std::size_t j = 1; j < 64; ++j) EXPECT_NEAR(w[j], 0.0, 1e-12) << j;
}

TEST(Reference, EnergyIsThatOfTheRotatedRow) {
  Rng rng(3);
  for (const char* name : {"p1_n8", "p2_n256", "p4_n256", "p4_n4096"}) {
    const Layer layer = test::random_layer(rng, make_format(name, 3, 256, 128, 256, 12));
    double energy = 0;
    for (const float r : test::spec::dequantize(layer, false)) energy += static_cast<double>(r) * r;
    double restored = 0;
    for (const double w : reference::dequantize(layer.view())) restored += w * w;
    EXPECT_NEAR(restored / energy, 1.0, 1e-6) << name;
  }
}

TEST(Reference, ColumnScaleDividesItsColumn) {
  Rng rng(4);
  Layer layer = test::random_layer(rng, make_format("p2_n64", 2, 64));
  const std::vector<double> plain = reference::dequantize(layer.view());
  layer.column_scale.assign(64, f32_to_f16(1.0f));
  layer.column_scale[5] = f32_to_f16(4.0f);
  const std::vector<double> scaled = reference::dequantize(layer.view());
  for (std::size_t i = 0; i < plain.size(); ++i) EXPECT_DOUBLE_EQ(scaled[i], i % 64 == 5 ? plain[i] / 4 : plain[i]);
}

TEST(Reference, MatmulIsTheProductWithTheDequantizedWeights) {
  Rng rng(5);
  const Layer layer = test::random_layer(rng, make_format("p2_n16", 3, 128), true);
  const std::vector<double> w = reference::dequantize(layer.view());
  std::vector<float> x(2 * 128);
  x[7] = 1.0f;        // row 0 picks column 7
  x[128 + 3] = 2.0f;  // row 1 picks 2 * column 3 - column 100
  x[128 + 100] = -1.0f;
  const std::vector<double> bias = {10.0, 20.0, 30.0};
  const std::vector<double> y = reference::matmul(matrix(x.data(), 2, 128), layer.view(), {});
  const std::vector<double> with_bias = reference::matmul(matrix(x.data(), 2, 128), layer.view(), bias);
  for (std::size_t o = 0; o < 3; ++o) {
    EXPECT_DOUBLE_EQ(y[o], w[o * 128 + 7]);
    EXPECT_DOUBLE_EQ(y[3 + o], 2 * w[o * 128 + 3] - w[o * 128 + 100]);
    EXPECT_NEAR(with_bias[o], y[o] + bias[o], 1e-12);
  }
}

}  // namespace
}  // namespace higgs
