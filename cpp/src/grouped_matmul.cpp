#include <string>

#include "checks.h"
#include "higgs/error.h"
#include "higgs/matmul.h"

namespace higgs {
namespace {

void check_offsets(std::span<const std::int32_t> offsets, std::int64_t rows) {
  std::int32_t last = 0;
  for (std::size_t e = 0; e < offsets.size(); ++e) {
    if (offsets[e] < last) {
      throw Error(ErrorCode::invalid_argument, "grouped_matmul: offsets[" + std::to_string(e) + "] is " +
                                                   std::to_string(offsets[e]) + ", less than the " +
                                                   std::to_string(last) + " before it");
    }
    last = offsets[e];
  }
  if (last != rows) {
    throw Error(ErrorCode::invalid_argument, "grouped_matmul: the last offset is " + std::to_string(last) + ", x has " +
                                                 std::to_string(rows) + " rows");
  }
}

// Rows [first, first + count) of w.
PackedView rows_of(PackedView w, std::int64_t first, std::int64_t count) {
  w.indices += first * w.format.row_bytes();
  w.scales += first * w.format.row_groups();
  w.format.n = count;
  return w;
}

}  // namespace

void grouped_matmul(ConstMatrixView x, std::span<const std::int32_t> offsets, const PackedView& w, MatrixView y) {
  validate(w.format);
  const auto experts = static_cast<std::int64_t>(offsets.size());
  if (experts == 0 || w.format.n % experts != 0) {
    throw Error(ErrorCode::invalid_argument, "grouped_matmul: " + std::to_string(experts) +
                                                 " experts cannot share n = " + std::to_string(w.format.n) + " rows");
  }
  check_offsets(offsets, x.rows);
  const std::int64_t n = w.format.n / experts;
  if (y.rows != x.rows || y.cols != n) {
    throw Error(ErrorCode::invalid_argument,
                "grouped_matmul: y is " + detail::shape(y.rows, y.cols) + ", expected " + detail::shape(x.rows, n));
  }
  std::int64_t begin = 0;
  for (std::int64_t e = 0; e < experts; ++e) {
    const std::int64_t end = offsets[static_cast<std::size_t>(e)];
    matmul({x.row(begin), x.dtype, end - begin, x.cols}, rows_of(w, e * n, n), nullptr,
           {y.row(begin), y.dtype, end - begin, n});
    begin = end;
  }
}

}  // namespace higgs
