// Small helpers shared by the public entry points.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "higgs/numeric.h"

namespace higgs::detail {

// fp16 [k] -> fp32, empty for null. Throws Error(invalid_argument) unless all are positive and finite.
[[nodiscard]] std::vector<float> load_column_scale(const std::uint16_t* column_scale, std::int64_t k);

[[nodiscard]] inline std::string shape(std::int64_t rows, std::int64_t cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

// out[j] = factor[j] * in[j]
inline void load_scaled(const std::byte* in, DType dtype, std::int64_t count, const float* factor, float* out) {
  if (dtype == DType::f32) {
    const auto* p = reinterpret_cast<const float*>(in);
    for (std::int64_t j = 0; j < count; ++j) out[j] = factor[j] * p[j];
  } else if (dtype == DType::bf16) {
    const auto* p = reinterpret_cast<const std::uint16_t*>(in);
    for (std::int64_t j = 0; j < count; ++j) out[j] = factor[j] * bf16_to_f32(p[j]);
  } else {
    const auto* p = reinterpret_cast<const std::uint16_t*>(in);
    for (std::int64_t j = 0; j < count; ++j) out[j] = factor[j] * f16_to_f32(p[j]);
  }
}

// out[j] = factor[j] * in[j]
inline void store_scaled(const float* in, std::int64_t count, const float* factor, DType dtype, std::byte* out) {
  for (std::int64_t j = 0; j < count; ++j) store_f32(out, dtype, j, factor[j] * in[j]);
}

}  // namespace higgs::detail
