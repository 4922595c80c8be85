// Quantizes a random weight matrix on a grid and multiplies with it: what embedding higgs in a C++ program looks like.
//   cmake --preset dev -DHIGGS_EXAMPLES=ON && cmake --build --preset dev && build-dev/cpp/higgs_example_quantize
//   p2_n256
#include <cstdio>
#include <exception>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "higgs/higgs.h"

namespace {

int run(const std::string& grid) {
  constexpr std::int64_t n = 1024;
  constexpr std::int64_t k = 4096;
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<float> w(n * k);
  std::vector<float> x(k);
  for (float& v : w) v = normal(random);
  for (float& v : x) v = normal(random);

  higgs::LayerFormat format{&higgs::find_grid(grid), n, k, higgs::default_block(k), 0, /*seed=*/0};
  format.group = higgs::default_group(k, format.block);
  std::vector<std::uint8_t> indices(static_cast<std::size_t>(format.index_bytes()));
  std::vector<std::uint16_t> scales(static_cast<std::size_t>(n * format.row_groups()));
  const higgs::QuantizeResult result =
      higgs::quantize(higgs::matrix(w.data(), n, k), format, nullptr, indices.data(), scales.data());
  std::printf("%s: %.3f bits a weight, t2 %.6f\n", grid.c_str(), format.bits(false), result.t2());

  std::vector<float> y(n);
  const higgs::PackedView packed{format, indices.data(), scales.data(), nullptr};
  higgs::matmul(higgs::matrix(std::as_const(x).data(), 1, k), packed, nullptr, higgs::matrix(y.data(), 1, n));
  double exact = 0;
  for (std::int64_t j = 0; j < k; ++j) exact += static_cast<double>(w[j]) * x[j];
  std::printf("y[0] = %.3f, with the original weights %.3f\n", static_cast<double>(y[0]), exact);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc > 1 ? argv[1] : "p2_n256");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
