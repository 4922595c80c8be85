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

DecodeGeometry decode_geometry(const LayerFormat& format) {
  const std::int64_t chunk_cols = kChunk * format.grid->p;
  const auto chunks = [&](std::int64_t cols) { return (cols + chunk_cols - 1) / chunk_cols; };
  DecodeGeometry g;
  g.groups = format.row_groups();
  g.group_chunks = chunks(format.group);
  g.last_group_chunks = chunks(format.k - (g.groups - 1) * format.group);
  g.arranged_cols = ((g.groups - 1) * g.group_chunks + g.last_group_chunks) * chunk_cols;
  return g;
}

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

// Rotated x * d of one row, from column order to decode order (see kernels.h); the padding stays zero.
void arrange(const float* rotated, const LayerFormat& f, const detail::DecodeGeometry& geometry, float* out) {
  const int p = f.grid->p;
  for (std::int64_t g = 0; g < geometry.groups; ++g) {
    float* group_out = out + g * geometry.group_chunks * detail::kChunk * p;
    const std::int64_t first = g * f.group;
    if (f.grid->trellis != nullptr || f.grid->table_points() > 1 << detail::kernels().component_major_bits) {
      std::copy(rotated + first, rotated + f.group_end(g), group_out);
      continue;
    }
    const std::int64_t indices = (f.group_end(g) - first) / p;
    for (std::int64_t i = 0; i < indices; ++i) {
      float* chunk_out = group_out + i / detail::kChunk * detail::kChunk * p + i % detail::kChunk;
      for (int c = 0; c < p; ++c) chunk_out[c * detail::kChunk] = rotated[first + i * p + c];
    }
  }
}

std::vector<float> rotate_and_arrange(ConstMatrixView x, const PackedView& w, const detail::DecodeGeometry& geometry) {
  const LayerFormat& f = w.format;
  std::vector<float> d(static_cast<std::size_t>(f.k));
  input_vector(f.seed, detail::load_column_scale(w.column_scale, f.k), d);
  std::vector<float> arranged(static_cast<std::size_t>(x.rows * geometry.arranged_cols));
  parallel_for(x.rows, 4, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(static_cast<std::size_t>(f.k));
    for (std::int64_t i = begin; i < end; ++i) {
      detail::load_scaled(x.row(i), x.dtype, f.k, d.data(), row.data());
      detail::kernels().fwht(row.data(), f.k / f.block, f.block);
      arrange(row.data(), f, geometry, arranged.data() + i * geometry.arranged_cols);
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
  const detail::DecodeGeometry geometry = detail::decode_geometry(w.format);
  const std::vector<float> arranged = rotate_and_arrange(x, w, geometry);
  const detail::Kernels& kernels = detail::kernels();
  if (m == 1) {
    std::vector<float> sums(static_cast<std::size_t>(n));
    const std::int64_t grain = std::max<std::int64_t>(2, std::min<std::int64_t>(64, n / (4 * num_threads()) / 2 * 2));
    parallel_for(n, grain, [&](std::int64_t begin, std::int64_t end) {
      kernels.dot_rows(w, arranged.data(), begin, end, sums.data());
    });
    finish(sums.data(), n, 0, n, bias, y);
    return;
  }
  const std::int64_t scratch_cols = geometry.group_chunks * detail::kChunk * w.format.grid->p;
  parallel_for(n, detail::kTileRows, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> scratch(static_cast<std::size_t>(detail::kTileRows * scratch_cols));
    std::vector<float> sums(static_cast<std::size_t>(m * (end - begin)));
    kernels.dot_tile(w, arranged.data(), m, begin, end, scratch.data(), sums.data(), end - begin);
    finish(sums.data(), end - begin, begin, end, bias, y);
  });
}

}  // namespace higgs
