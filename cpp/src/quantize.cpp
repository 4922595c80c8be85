#include "higgs/quantize.h"

#include <cmath>
#include <string>
#include <vector>

#include "checks.h"
#include "higgs/error.h"
#include "higgs/hadamard.h"
#include "higgs/pack.h"
#include "higgs/parallel_for.h"
#include "kernels.h"

namespace higgs {
namespace {

using detail::Kernels;
constexpr std::int64_t kRowsPerTask = 8;

void check_finite(const std::byte* row, DType dtype, std::int64_t i, std::int64_t k) {
  for (std::int64_t j = 0; j < k; ++j) {
    const float v = load_f32(row, dtype, j);
    if (!std::isfinite(v)) {
      throw Error(ErrorCode::invalid_argument, "weight [" + std::to_string(i) + ", " + std::to_string(j) + "] is " +
                                                   std::to_string(v) + "; only finite weights can be quantized");
    }
  }
}

struct GroupResult {
  std::uint16_t scale;
  double error;
};

// FORMAT.md, "From weights to bytes", steps 2 to 4 for one scale group.
GroupResult quantize_group(const Kernels& kernels, const detail::NearestTable& table, const float* v,
                           std::int64_t count, double energy, std::uint16_t* indices) {
  const std::uint16_t rms = f32_to_f16(static_cast<float>(std::sqrt(energy / static_cast<double>(count))));
  const float scale = f16_to_f32(rms);
  if (!std::isfinite(scale)) {
    throw Error(ErrorCode::invalid_argument, "a scale of " +
                                                 std::to_string(std::sqrt(energy / static_cast<double>(count))) +
                                                 " does not fit in fp16 (at most 65504)");
  }
  double vg = 0;
  double gg = 0;
  kernels.nearest(table, v, count, scale > 0.0f ? 1.0f / scale : 0.0f, indices, &vg, &gg);
  const auto error = [&](double s) { return energy - 2 * s * vg + s * s * gg; };
  const std::uint16_t refit = f32_to_f16(static_cast<float>(vg / gg));
  const float refit_scale = f16_to_f32(refit);
  if (refit_scale > 0.0f && std::isfinite(refit_scale) && error(refit_scale) < error(scale)) {
    return {refit, error(refit_scale)};
  }
  return {rms, error(scale)};
}

void check_packed(const PackedView& packed, MatrixView out) {
  validate(packed.format);
  if (out.rows != packed.format.n || out.cols != packed.format.k) {
    throw Error(ErrorCode::invalid_argument, "out is " + detail::shape(out.rows, out.cols) + ", expected " +
                                                 detail::shape(packed.format.n, packed.format.k));
  }
}

// Calls use(row number, the k values scale * point) for every row.
template <typename Use>
void for_each_rotated_row(const PackedView& packed, const Use& use) {
  const LayerFormat& f = packed.format;
  const int p = f.grid->p;
  parallel_for(f.n, kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::uint16_t> indices(static_cast<std::size_t>(f.row_indices()));
    std::vector<float> row(static_cast<std::size_t>(f.k));
    for (std::int64_t i = begin; i < end; ++i) {
      const auto bytes = static_cast<std::size_t>(f.row_bytes());
      unpack({packed.indices + i * f.row_bytes(), bytes}, f.grid->index_bits, indices);
      for (std::int64_t g = 0; g < f.row_groups(); ++g) {
        const float scale = f16_to_f32(packed.scales[i * f.row_groups() + g]);
        for (std::int64_t j = g * f.group; j < f.group_end(g); ++j) {
          row[j] = scale * f.grid->points[static_cast<std::size_t>(indices[j / p]) * p + j % p];
        }
      }
      use(i, row);
    }
  });
}

}  // namespace

QuantizeResult quantize(ConstMatrixView w, const LayerFormat& format, const std::uint16_t* column_scale,
                        std::uint8_t* indices, std::uint16_t* scales) {
  validate(format);
  if (w.rows != format.n || w.cols != format.k) {
    throw Error(ErrorCode::invalid_argument,
                "w is " + detail::shape(w.rows, w.cols) + ", expected " + detail::shape(format.n, format.k));
  }
  const std::vector<float> s = detail::load_column_scale(column_scale, format.k);
  std::vector<float> factor(static_cast<std::size_t>(format.k));
  for (std::int64_t j = 0; j < format.k; ++j) factor[j] = sign_of(format.seed, j) * (s.empty() ? 1.0f : s[j]);

  const detail::NearestTable& table = detail::nearest_table(*format.grid);
  const Kernels& kernels = detail::kernels();
  std::vector<double> row_error(static_cast<std::size_t>(format.n));
  std::vector<double> row_energy(static_cast<std::size_t>(format.n));
  const auto quantize_rows = [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> v(static_cast<std::size_t>(format.k));
    std::vector<std::uint16_t> row_indices(static_cast<std::size_t>(format.row_indices()));
    for (std::int64_t i = begin; i < end; ++i) {
      detail::load_scaled(w.row(i), w.dtype, format.k, factor.data(), v.data());
      kernels.fwht(v.data(), format.k / format.block, format.block);
      for (std::int64_t g = 0; g < format.row_groups(); ++g) {
        const std::int64_t first = g * format.group;
        const std::int64_t count = format.group_end(g) - first;
        const double energy = kernels.sum_squares(v.data() + first, count);
        if (!std::isfinite(energy)) check_finite(w.row(i), w.dtype, i, format.k);
        const GroupResult r = quantize_group(kernels, table, v.data() + first, count, energy,
                                             row_indices.data() + first / format.grid->p);
        scales[i * format.row_groups() + g] = r.scale;
        row_error[i] += r.error;
        row_energy[i] += energy;
      }
      pack(row_indices, format.grid->index_bits,
           {indices + i * format.row_bytes(), static_cast<std::size_t>(format.row_bytes())});
    }
  };
  try {
    parallel_for(format.n, kRowsPerTask, quantize_rows);
  } catch (const Error&) {
    // Another thread may have met a later bad row first: name the first one.
    for (std::int64_t i = 0; i < format.n; ++i) check_finite(w.row(i), w.dtype, i, format.k);
    throw;
  }
  QuantizeResult result;
  for (std::int64_t i = 0; i < format.n; ++i) {
    result.error += row_error[i];
    result.energy += row_energy[i];
  }
  return result;
}

void dequantize_rotated(const PackedView& packed, MatrixView out) {
  check_packed(packed, out);
  for_each_rotated_row(packed, [&](std::int64_t i, const std::vector<float>& row) {
    for (std::int64_t j = 0; j < out.cols; ++j) store_f32(out.row(i), out.dtype, j, row[j]);
  });
}

void dequantize(const PackedView& packed, MatrixView out) {
  check_packed(packed, out);
  const LayerFormat& f = packed.format;
  std::vector<float> d(static_cast<std::size_t>(f.k));
  input_vector(f.seed, detail::load_column_scale(packed.column_scale, f.k), d);
  for_each_rotated_row(packed, [&](std::int64_t i, std::vector<float>& row) {
    detail::kernels().fwht(row.data(), f.k / f.block, f.block);
    detail::store_scaled(row.data(), f.k, d.data(), out.dtype, out.row(i));
  });
}

}  // namespace higgs
