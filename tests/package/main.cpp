// Quantizes a small matrix, multiplies with it, and compares with the unquantized product.
#include <higgs/higgs.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

int main() {
  constexpr std::int64_t kN = 8;
  constexpr std::int64_t kK = 256;
  constexpr std::int64_t kM = 2;
  higgs::LayerFormat format;
  format.grid = &higgs::find_grid("p2_n256");
  format.n = kN;
  format.k = kK;
  format.block = higgs::default_block(kK);
  format.group = higgs::default_group(kK, format.block);

  std::vector<float> w(kN * kK);
  std::vector<float> x(kM * kK);
  for (std::size_t i = 0; i < w.size(); ++i) w[i] = std::sin(static_cast<float>(i * i % 1009));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::cos(static_cast<float>(i * i % 1013));
  std::vector<std::uint8_t> indices(static_cast<std::size_t>(format.index_bytes()));
  std::vector<std::uint16_t> scales(static_cast<std::size_t>(kN * format.row_groups()));
  const auto view = [](const std::vector<float>& v, std::int64_t rows) { return higgs::matrix(v.data(), rows, kK); };
  const higgs::QuantizeResult result = higgs::quantize(view(w, kN), format, nullptr, indices.data(), scales.data());

  std::vector<float> y(kM * kN);
  higgs::matmul(view(x, kM), {format, indices.data(), scales.data(), nullptr}, nullptr,
                higgs::matrix(y.data(), kM, kN));
  double error = 0;
  double energy = 0;
  for (std::int64_t i = 0; i < kM; ++i) {
    double x_norm = 0;
    for (std::int64_t j = 0; j < kK; ++j) x_norm += std::pow(x[static_cast<std::size_t>(i * kK + j)], 2);
    for (std::int64_t o = 0; o < kN; ++o) {
      double exact = 0;
      double w_norm = 0;
      for (std::int64_t j = 0; j < kK; ++j) {
        exact += static_cast<double>(x[static_cast<std::size_t>(i * kK + j)]) * w[static_cast<std::size_t>(o * kK + j)];
        w_norm += std::pow(w[static_cast<std::size_t>(o * kK + j)], 2);
      }
      error += std::pow(exact - y[static_cast<std::size_t>(i * kN + o)], 2);
      energy += x_norm * w_norm / kK;
    }
  }
  std::printf("t2 %.5f, of the grid %.5f; output error %.5f\n", result.t2(), format.grid->t2, error / energy);
  const bool good = result.t2() > 0.5 * format.grid->t2 && result.t2() < 1.5 * format.grid->t2 &&
                    error / energy < 4 * format.grid->t2 && error > 0;
  return good ? 0 : 1;
}
