#include "higgs/reference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <numbers>

#include "higgs/hadamard.h"

namespace higgs::reference {
namespace {

// T[i][j] of hadamard.h.
double transform_entry(std::int64_t block, std::int64_t i, std::int64_t j) {
  const std::int64_t size = block & -block;
  const std::int64_t r = block / size;
  const auto common = static_cast<std::uint64_t>(i % size & j % size);
  const double hadamard = std::popcount(common) % 2 != 0 ? -1.0 : 1.0;
  const double angle = 2 * std::numbers::pi * static_cast<double>((i / size) * (j / size)) / static_cast<double>(r);
  return hadamard * (std::cos(angle) + std::sin(angle)) / std::sqrt(static_cast<double>(block));
}

// T[block, block]: once, as an entry takes longer than all else.
std::vector<double> transform_matrix(std::int64_t block) {
  std::vector<double> entries;
  entries.reserve(static_cast<std::size_t>(block * block));
  for (std::int64_t i = 0; i < block; ++i) {
    for (std::int64_t j = 0; j < block; ++j) entries.push_back(transform_entry(block, i, j));
  }
  return entries;
}

}  // namespace

std::vector<double> dequantize(const PackedView& packed) {
  const LayerFormat& f = packed.format;
  validate(f);
  const int p = f.grid->p;
  const int bits = f.grid->index_bits;
  std::vector<double> out(static_cast<std::size_t>(f.n * f.k));
  std::vector<double> r(static_cast<std::size_t>(f.k));
  const std::vector<double> transform = transform_matrix(f.block);
  for (std::int64_t i = 0; i < f.n; ++i) {
    const std::uint8_t* bytes = packed.indices + i * f.row_bytes();
    for (std::int64_t j = 0; j < f.k; ++j) {
      std::size_t point = 0;
      const StreamPlace place = f.grid->trellis != nullptr ? stream_place(*f.grid, f.k, j) : StreamPlace{j / p, 1, 0};
      for (int b = 0; b < f.grid->window_bits; ++b) {
        const std::int64_t at = place.first * bits + (place.step * bits + b) % (place.steps * bits);
        point |= static_cast<std::size_t>(bytes[at / 8] >> (at % 8) & 1) << b;
      }
      const double scale = f16_to_f32(packed.scales[i * f.row_groups() + j / f.group]);
      r[j] = scale * f.grid->points[point * p + j % p];
    }
    for (std::int64_t j = 0; j < f.k; ++j) {
      const std::int64_t first = j / f.block * f.block;
      const double* row = &transform[static_cast<std::size_t>((j - first) * f.block)];
      double sum = 0;
      for (std::int64_t t = 0; t < f.block; ++t) sum += row[t] * r[first + t];
      const double s = packed.column_scale == nullptr ? 1.0 : f16_to_f32(packed.column_scale[j]);
      out[i * f.k + j] = sign_of(f.seed, j) / s * sum;
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
