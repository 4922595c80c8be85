#include "higgs/hadamard.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <string>
#include <vector>

#include "checks.h"
#include "higgs/error.h"
#include "higgs/packed_format.h"
#include "higgs/parallel_for.h"
#include "kernels.h"

namespace higgs {
namespace {

constexpr std::int64_t kRowsPerTask = 16;

void check_block(std::int64_t k, int block) {
  if (!is_block(block)) {
    throw Error(ErrorCode::invalid_argument,
                "block " + std::to_string(block) + " is not supported; use a multiple of 64 in 64..1024");
  }
  if (k % block != 0) {
    throw Error(ErrorCode::invalid_argument,
                "block " + std::to_string(block) + " does not divide " + std::to_string(k) + " columns");
  }
}

void check_same_shape(ConstMatrixView in, MatrixView out, std::span<const float> column_scale) {
  if (in.rows != out.rows || in.cols != out.cols) {
    throw Error(ErrorCode::invalid_argument,
                "out is " + detail::shape(out.rows, out.cols) + ", expected " + detail::shape(in.rows, in.cols));
  }
  if (!column_scale.empty() && static_cast<std::int64_t>(column_scale.size()) != in.cols) {
    throw Error(ErrorCode::invalid_argument, "column_scale has " + std::to_string(column_scale.size()) +
                                                 " values, expected " + std::to_string(in.cols));
  }
}

}  // namespace

namespace detail {

const float* hartley_table(int r) noexcept {
  static const auto tables = [] {
    std::array<std::array<float, 15 * 15>, 7> all{};
    for (int odd = 3; odd <= 15; odd += 2) {
      for (int a = 0; a < odd; ++a) {
        for (int b = 0; b < odd; ++b) {
          const double angle = 2 * std::numbers::pi * (a * b % odd) / odd;
          all[(odd - 3) / 2][a * odd + b] = static_cast<float>((std::cos(angle) + std::sin(angle)) / std::sqrt(odd));
        }
      }
    }
    return all;
  }();
  return tables[(r - 3) / 2].data();
}

}  // namespace detail

void fwht(std::span<float> data, int block) {
  check_block(static_cast<std::int64_t>(data.size()), block);
  detail::kernels().fwht(data.data(), static_cast<std::int64_t>(data.size()) / block, block);
}

void input_vector(std::uint64_t seed, std::span<const float> column_scale, std::span<float> d) {
  if (!column_scale.empty() && column_scale.size() != d.size()) {
    throw Error(ErrorCode::invalid_argument, "column_scale has " + std::to_string(column_scale.size()) +
                                                 " values, expected " + std::to_string(d.size()));
  }
  for (std::size_t j = 0; j < d.size(); ++j) {
    const float sign = sign_of(seed, static_cast<std::int64_t>(j));
    d[j] = column_scale.empty() ? sign : sign / column_scale[j];
  }
}

void rotate(ConstMatrixView in, int block, std::uint64_t seed, std::span<const float> column_scale, MatrixView out) {
  check_block(in.cols, block);
  check_same_shape(in, out, column_scale);
  if (out.dtype != DType::f32) throw Error(ErrorCode::type, "rotate: out must be float32");
  std::vector<float> factor(static_cast<std::size_t>(in.cols));
  for (std::int64_t j = 0; j < in.cols; ++j) {
    factor[j] = sign_of(seed, j) * (column_scale.empty() ? 1.0f : column_scale[j]);
  }
  parallel_for(in.rows, kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      auto* row = reinterpret_cast<float*>(out.row(i));
      detail::load_scaled(in.row(i), in.dtype, in.cols, factor.data(), row);
      detail::kernels().fwht(row, in.cols / block, block);
    }
  });
}

void unrotate(ConstMatrixView in, int block, std::uint64_t seed, std::span<const float> column_scale, MatrixView out) {
  check_block(in.cols, block);
  check_same_shape(in, out, column_scale);
  if (in.dtype != DType::f32) throw Error(ErrorCode::type, "unrotate: in must be float32");
  std::vector<float> d(static_cast<std::size_t>(in.cols));
  input_vector(seed, column_scale, d);
  parallel_for(in.rows, kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(static_cast<std::size_t>(in.cols));
    for (std::int64_t i = begin; i < end; ++i) {
      std::copy_n(reinterpret_cast<const float*>(in.row(i)), in.cols, row.data());
      detail::kernels().fwht(row.data(), in.cols / block, block);
      detail::store_scaled(row.data(), in.cols, d.data(), out.dtype, out.row(i));
    }
  });
}

}  // namespace higgs
