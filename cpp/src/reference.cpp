#include "higgs/reference.h"

#include <bit>
#include <cmath>

#include "higgs/hadamard.h"

namespace higgs::reference {

std::vector<double> dequantize(const PackedView& packed) {
  const LayerFormat& f = packed.format;
  validate(f);
  const int p = f.grid->p;
  const int bits = f.grid->index_bits;
  std::vector<double> out(static_cast<std::size_t>(f.n * f.k));
  std::vector<double> r(static_cast<std::size_t>(f.k));
  for (std::int64_t i = 0; i < f.n; ++i) {
    const std::uint8_t* bytes = packed.indices + i * f.row_bytes();
    for (std::int64_t j = 0; j < f.k; ++j) {
      int index = 0;
      for (int b = 0; b < bits; ++b) {
        const std::int64_t at = j / p * bits + b;
        index |= (bytes[at / 8] >> (at % 8) & 1) << b;
      }
      const double scale = f16_to_f32(packed.scales[i * f.row_groups() + j / f.group]);
      r[j] = scale * f.grid->points[static_cast<std::size_t>(index) * p + j % p];
    }
    for (std::int64_t j = 0; j < f.k; ++j) {
      const std::int64_t first = j / f.block * f.block;
      double sum = 0;
      for (std::int64_t t = 0; t < f.block; ++t) {
        const bool minus = std::popcount(static_cast<std::uint64_t>((j - first) & t)) % 2 != 0;
        sum += minus ? -r[first + t] : r[first + t];
      }
      const double s = packed.column_scale == nullptr ? 1.0 : f16_to_f32(packed.column_scale[j]);
      out[i * f.k + j] = sign_of(f.seed, j) / s * sum / std::sqrt(static_cast<double>(f.block));
    }
  }
  return out;
}

std::vector<double> matmul(ConstMatrixView x, const PackedView& w, std::span<const double> bias) {
  const std::vector<double> weights = dequantize(w);
  const std::int64_t n = w.format.n;
  const std::int64_t k = w.format.k;
  std::vector<double> y(static_cast<std::size_t>(x.rows * n));
  for (std::int64_t i = 0; i < x.rows; ++i) {
    for (std::int64_t o = 0; o < n; ++o) {
      double sum = bias.empty() ? 0.0 : bias[o];
      for (std::int64_t j = 0; j < k; ++j) sum += load_f32(x.row(i), x.dtype, j) * weights[o * k + j];
      y[i * n + o] = sum;
    }
  }
  return y;
}

}  // namespace higgs::reference
