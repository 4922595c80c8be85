// A row-major matrix somebody else owns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "higgs/numeric.h"

namespace higgs {

template <typename Byte>  // std::byte or const std::byte
struct BasicMatrixView {
  Byte* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;

  [[nodiscard]] Byte* row(std::int64_t i) const noexcept {
    return data + i * cols * static_cast<std::int64_t>(size_of(dtype));
  }
  operator BasicMatrixView<const std::byte>() const noexcept  // NOLINT: as std::span converts
    requires(!std::is_const_v<Byte>)
  {
    return {data, dtype, rows, cols};
  }
};

using MatrixView = BasicMatrixView<std::byte>;
using ConstMatrixView = BasicMatrixView<const std::byte>;

[[nodiscard]] inline MatrixView matrix(float* data, std::int64_t rows, std::int64_t cols) noexcept {
  return {reinterpret_cast<std::byte*>(data), DType::f32, rows, cols};
}
[[nodiscard]] inline ConstMatrixView matrix(const float* data, std::int64_t rows, std::int64_t cols) noexcept {
  return {reinterpret_cast<const std::byte*>(data), DType::f32, rows, cols};
}

}  // namespace higgs
