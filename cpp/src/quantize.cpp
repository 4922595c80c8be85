#include "higgs/quantize.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
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
static_assert(kRowsPerTask % detail::kTrellisRuns == 0);

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

// FORMAT.md, "From weights to bytes", step 2 for one scale group.
std::uint16_t rms_scale(double energy, std::int64_t count) {
  const double rms = std::sqrt(energy / static_cast<double>(count));
  const std::uint16_t scale = f32_to_f16(static_cast<float>(rms));
  if (!std::isfinite(f16_to_f32(scale))) {
    throw Error(ErrorCode::invalid_argument,
                "a scale of " + std::to_string(rms) + " does not fit in fp16 (at most 65504)");
  }
  return scale;
}

float inverse(std::uint16_t scale) {
  const float s = f16_to_f32(scale);
  return s > 0.0f ? 1.0f / s : 0.0f;
}

// Step 4, with the sums of v g and g g over the group.
GroupResult refit_scale(double energy, std::uint16_t rms, double vg, double gg) {
  const float scale = f16_to_f32(rms);
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

// One row that is being quantized.
struct RowInProgress {
  std::int64_t number = 0;
  std::vector<float> v;  // rotated
  std::vector<std::uint16_t> indices;
  std::uint16_t* scales = nullptr;  // out
  double error = 0;
  double energy = 0;
};

class Quantizer {
 public:
  Quantizer(ConstMatrixView w, const LayerFormat& format, std::vector<float> factor)
      : w_(w), format_(format), factor_(std::move(factor)) {}

  // Step 1.
  void rotate(RowInProgress& row) const {
    row.v.resize(static_cast<std::size_t>(format_.k));
    row.indices.resize(static_cast<std::size_t>(format_.row_indices()));
    detail::load_scaled(w_.row(row.number), w_.dtype, format_.k, factor_.data(), row.v.data());
    kernels_.fwht(row.v.data(), format_.k / format_.block, format_.block);
  }

  // Steps 2 to 4 with a vector grid.
  void round(RowInProgress& row) const {
    const detail::NearestTable& table = detail::nearest_table(*format_.grid);
    for (std::int64_t g = 0; g < format_.row_groups(); ++g) {
      const std::int64_t first = g * format_.group;
      const std::int64_t count = format_.group_end(g) - first;
      const double group_energy = energy(row, first, count);
      const std::uint16_t rms = rms_scale(group_energy, count);
      double vg = 0;
      double gg = 0;
      kernels_.nearest(table, row.v.data() + first, count, inverse(rms), row.indices.data() + first / format_.grid->p,
                       &vg, &gg);
      store(row, g, group_energy, refit_scale(group_energy, rms, vg, gg));
    }
  }

  // Steps 2 to 4 with a trellis grid, for kTrellisRuns rows at once (the same row may stand in for a missing one).
  void encode(RowInProgress* const* rows) const {
    constexpr int kRows = detail::kTrellisRuns;
    std::vector<double> energies[kRows];
    std::vector<std::uint16_t> rms[kRows];
    std::vector<float> u[kRows];  // values for the search, then the points found
    for (int r = 0; r < kRows; ++r) {
      u[r].resize(static_cast<std::size_t>(format_.k));
      for (std::int64_t g = 0; g < format_.row_groups(); ++g) {
        const std::int64_t first = g * format_.group;
        const std::int64_t count = format_.group_end(g) - first;
        energies[r].push_back(energy(*rows[r], first, count));
        rms[r].push_back(rms_scale(energies[r].back(), count));
        normalize(rows[r]->v.data() + first, count, inverse(rms[r].back()), u[r].data() + first);
      }
    }
    for (std::int64_t first = 0; first < format_.k;) {
      const RunGroup group = run_group(*format_.grid->trellis, format_.k, first);
      for (int t = 0; t < group.runs; ++t) encode_runs(rows, group, t, u);
      first += group.columns;
    }
    for (int r = 0; r < kRows; ++r) {
      if (r > 0 && rows[r] == rows[r - 1]) continue;
      for (std::int64_t g = 0; g < format_.row_groups(); ++g) {
        const std::int64_t first = g * format_.group;
        const std::int64_t count = format_.group_end(g) - first;
        const double vg = kernels_.sum_products(rows[r]->v.data() + first, u[r].data() + first, count);
        const double gg = kernels_.sum_products(u[r].data() + first, u[r].data() + first, count);
        store(*rows[r], g, energies[r][g], refit_scale(energies[r][g], rms[r][g], vg, gg));
      }
    }
  }

 private:
  // What the search sees of `count` values. Values for an additive grid are multiples of 1/256, and its entries are of
  // 1/32: no cost is rounded, so the search gives the same stream in any order of evaluation.
  void normalize(const float* v, std::int64_t count, float by, float* u) const {
    constexpr float kStep = 1.0f / 256;
    constexpr float kMost = 1444;
    const bool rounds = format_.grid->trellis->kind == Trellis::Kind::additive;
    for (std::int64_t i = 0; i < count; ++i) {
      u[i] = v[i] * by;
      if (rounds) u[i] = std::nearbyint(std::clamp(u[i] / kStep, -kMost, kMost)) * kStep;
    }
  }
  // Run t of a group, of all rows.
  void encode_runs(RowInProgress* const* rows, const RunGroup& group, int t, std::vector<float>* u) const {
    constexpr int kRows = detail::kTrellisRuns;
    const detail::TrellisTable& table = detail::trellis_table(*format_.grid, kernels_.vector_lanes);
    const int columns = group.run_columns();
    const std::int64_t first_index = (group.first + t * columns) / format_.grid->p;
    thread_local detail::LineFloats costs;
    costs.resize(std::max(costs.size(), static_cast<std::size_t>(detail::trellis_costs(table, columns))));
    float values[kRows][kMaxRunColumns];
    float points[kRows][kMaxRunColumns];
    const float* values_at[kRows];
    float* points_at[kRows];
    std::uint16_t* indices_at[kRows];
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < columns; ++i) values[r][i] = u[r][group.first + group.column(t, i)];
      values_at[r] = values[r];
      points_at[r] = points[r];
      indices_at[r] = rows[r]->indices.data() + first_index;
    }
    kernels_.encode_runs(table, values_at, columns, costs.data(), indices_at, points_at);
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < columns; ++i) u[r][group.first + group.column(t, i)] = points[r][i];
    }
  }
  [[nodiscard]] double energy(const RowInProgress& row, std::int64_t first, std::int64_t count) const {
    const double sum = kernels_.sum_products(row.v.data() + first, row.v.data() + first, count);
    if (!std::isfinite(sum)) check_finite(w_.row(row.number), w_.dtype, row.number, format_.k);
    return sum;
  }
  static void store(RowInProgress& row, std::int64_t g, double energy, const GroupResult& r) {
    row.scales[g] = r.scale;
    row.error += r.error;
    row.energy += energy;
  }

  const Kernels& kernels_ = detail::kernels();
  ConstMatrixView w_;
  const LayerFormat& format_;
  std::vector<float> factor_;  // sign * column scale
};

// Which point every p columns of a row take.
void unpack_points(const LayerFormat& f, const std::uint8_t* bytes, std::span<std::uint16_t> indices,
                   std::vector<std::uint32_t>& points) {
  const Grid& grid = *f.grid;
  unpack({bytes, static_cast<std::size_t>(f.row_bytes())}, grid.index_bits, indices);
  if (grid.trellis == nullptr) {
    std::copy(indices.begin(), indices.end(), points.begin());
    return;
  }
  for (std::int64_t j = 0; j < f.k; j += grid.p) {
    const StreamPlace place = stream_place(grid, f.k, j);
    std::uint32_t window = 0;
    for (int i = 0; i * grid.index_bits < grid.window_bits; ++i) {
      const std::uint16_t index = indices[place.first + (place.step + i) % place.steps];
      window |= static_cast<std::uint32_t>(index) << (i * grid.index_bits);
    }
    points[j / grid.p] = window & (static_cast<std::uint32_t>(grid.n_points) - 1);
  }
}

// Calls use(row number, the k values scale * point) for every row.
template <typename Use>
void for_each_rotated_row(const PackedView& packed, const Use& use) {
  const LayerFormat& f = packed.format;
  const int p = f.grid->p;
  parallel_for(f.n, kRowsPerTask, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::uint16_t> indices(static_cast<std::size_t>(f.row_indices()));
    std::vector<std::uint32_t> points(indices.size());
    std::vector<float> row(static_cast<std::size_t>(f.k));
    for (std::int64_t i = begin; i < end; ++i) {
      unpack_points(f, packed.indices + i * f.row_bytes(), indices, points);
      for (std::int64_t g = 0; g < f.row_groups(); ++g) {
        const float scale = f16_to_f32(packed.scales[i * f.row_groups() + g]);
        for (std::int64_t j = g * f.group; j < f.group_end(g); ++j) {
          row[j] = scale * f.grid->points[static_cast<std::size_t>(points[j / p]) * p + j % p];
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

  const Quantizer quantizer(w, format, std::move(factor));
  std::vector<double> row_error(static_cast<std::size_t>(format.n));
  std::vector<double> row_energy(static_cast<std::size_t>(format.n));
  const auto quantize_rows = [&](std::int64_t begin, std::int64_t end) {
    constexpr std::int64_t kRows = detail::kTrellisRuns;
    for (std::int64_t i = begin; i < end; i += kRows) {
      RowInProgress rows[kRows];
      RowInProgress* at[kRows];
      const std::int64_t count = std::min(kRows, end - i);
      for (std::int64_t r = 0; r < kRows; ++r) at[r] = &rows[std::min(r, count - 1)];
      for (std::int64_t r = 0; r < count; ++r) {
        rows[r].number = i + r;
        rows[r].scales = scales + (i + r) * format.row_groups();
        quantizer.rotate(rows[r]);
        if (format.grid->trellis == nullptr) quantizer.round(rows[r]);
      }
      if (format.grid->trellis != nullptr) quantizer.encode(at);
      for (std::int64_t r = 0; r < count; ++r) {
        row_error[i + r] = rows[r].error;
        row_energy[i + r] = rows[r].energy;
        pack(rows[r].indices, format.grid->index_bits,
             {indices + (i + r) * format.row_bytes(), static_cast<std::size_t>(format.row_bytes())});
      }
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
