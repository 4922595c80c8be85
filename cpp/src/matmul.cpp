#include "higgs/matmul.h"

#include <algorithm>
#include <string>
#include <vector>

#include "checks.h"
#include "higgs/error.h"
#include "higgs/hadamard.h"
#include "higgs/parallel_for.h"
#include "kernels.h"

namespace higgs {
namespace detail {

void no_decoder(const Grid& grid) {
  throw Error(ErrorCode::unsupported, "matmul: no decoder for grid " + std::string(grid.name));
}

}  // namespace detail

namespace {

void check(ConstMatrixView x, const PackedView& w, MatrixView y) {
  validate(w.format);
  if (x.rows < 0) throw Error(ErrorCode::invalid_argument, "matmul: x has " + std::to_string(x.rows) + " rows");
  if (x.cols != w.format.k) {
    throw Error(ErrorCode::invalid_argument, "matmul: x has " + std::to_string(x.cols) +
                                                 " columns, the layer has k = " + std::to_string(w.format.k));
  }
  if (y.rows != x.rows || y.cols != w.format.n) {
    throw Error(ErrorCode::invalid_argument,
                "matmul: y is " + detail::shape(y.rows, y.cols) + ", expected " + detail::shape(x.rows, w.format.n));
  }
  if (y.dtype != x.dtype && y.dtype != DType::f32) {
    throw Error(ErrorCode::type,
                std::string("matmul: y is ") + name_of(y.dtype) + "; use x's " + name_of(x.dtype) + " or float32");
  }
}

// Rotated x * d of one row, from column order to decode order (see kernels.h).
void arrange(const float* rotated, const LayerFormat& f, float* out) {
  if (f.grid->trellis != nullptr && f.grid->trellis->kind == Trellis::Kind::additive) {
    for (std::int64_t g = 0; g < f.row_groups(); ++g) {
      for (std::int64_t first = g * f.group; first < f.group_end(g);) {
        const RunGroup group = run_group(*f.grid->trellis, f.k, first);
        const std::int64_t end = std::min(f.group_end(g), group.first + group.columns);
        const auto begin_of_run = static_cast<int>(first - group.first) / group.runs;
        const auto end_of_run = static_cast<int>(end - group.first) / group.runs;
        for (int t = 0; t < group.runs; ++t) {
          for (int i = begin_of_run; i < end_of_run; ++i) {
            *out++ = rotated[group.first + group.column(t, i)] * kAdditiveStep;
          }
        }
        first = end;
      }
    }
    return;
  }
  if (f.grid->trellis != nullptr || f.grid->table_points() > 1 << detail::kernels().component_major_bits) {
    std::copy_n(rotated, f.k, out);
    return;
  }
  const std::int64_t p = f.grid->p;
  for (std::int64_t g = 0; g < f.row_groups(); ++g) {
    for (std::int64_t first = g * f.group; first < f.group_end(g); first += detail::kChunk * p) {
      const std::int64_t count = std::min(detail::kChunk * p, f.group_end(g) - first) / p;
      for (std::int64_t i = 0; i < count; ++i) {
        for (std::int64_t c = 0; c < p; ++c) out[first + c * count + i] = rotated[first + i * p + c];
      }
    }
  }
}

std::vector<float> rotate_and_arrange(ConstMatrixView x, const PackedView& w) {
  const LayerFormat& f = w.format;
  std::vector<float> d(static_cast<std::size_t>(f.k));
  input_vector(f.seed, detail::load_column_scale(w.column_scale, f.k), d);
  std::vector<float> arranged(static_cast<std::size_t>(x.rows * f.k));
  parallel_for(x.rows, 4, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(static_cast<std::size_t>(f.k));
    for (std::int64_t i = begin; i < end; ++i) {
      detail::load_scaled(x.row(i), x.dtype, f.k, d.data(), row.data());
      detail::kernels().fwht(row.data(), f.k / f.block, f.block);
      arrange(row.data(), f, arranged.data() + i * f.k);
    }
  });
  return arranged;
}

// Rows [begin, end) of W into columns [begin, end) of y.
void finish(const float* sums, std::int64_t stride, std::int64_t begin, std::int64_t end, const void* bias,
            MatrixView y) {
  for (std::int64_t i = 0; i < y.rows; ++i) {
    for (std::int64_t o = begin; o < end; ++o) {
      const float b = bias != nullptr ? load_f32(bias, y.dtype, o) : 0.0f;
      store_f32(y.row(i), y.dtype, o, sums[i * stride + o - begin] + b);
    }
  }
}

}  // namespace

void matmul(ConstMatrixView x, const PackedView& w, const void* bias, MatrixView y) {
  check(x, w, y);
  const std::int64_t m = x.rows;
  const std::int64_t n = w.format.n;
  if (m == 0 || n == 0) return;
  const std::vector<float> arranged = rotate_and_arrange(x, w);
  const detail::Kernels& kernels = detail::kernels();
  if (m <= detail::kFewRows) {
    std::vector<float> sums(static_cast<std::size_t>(m * n));
    const std::int64_t grain = std::max<std::int64_t>(2, std::min<std::int64_t>(64, n / (4 * num_threads()) / 2 * 2));
    parallel_for(n, grain, [&](std::int64_t begin, std::int64_t end) {
      kernels.dot_rows(w, arranged.data(), m, begin, end, sums.data(), n);
    });
    finish(sums.data(), n, 0, n, bias, y);
    return;
  }
  parallel_for(n, detail::kTileRows, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> scratch(static_cast<std::size_t>(detail::kTileRows * w.format.group));
    std::vector<float> sums(static_cast<std::size_t>(m * (end - begin)));
    kernels.dot_tile(w, arranged.data(), m, begin, end, scratch.data(), sums.data(), end - begin);
    finish(sums.data(), end - begin, begin, end, bias, y);
  });
}

}  // namespace higgs
