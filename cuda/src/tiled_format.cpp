#include "higgs/cuda/tiled_format.h"

#include <string>

#include "higgs/error.h"

namespace higgs::cuda {
namespace {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t align(std::int64_t bytes) { return ceil_div(bytes, kTiledAlignment) * kTiledAlignment; }

// Bytes of a slice of `units` units: its words in 16-byte pieces of 32 lanes.
constexpr std::int64_t bytes_of_slice(const FieldShape& field, int units) {
  return ceil_div(std::int64_t{units} * field.unit_words(), 4) * 16 * kLanes;
}

}  // namespace

FieldShape field_shape(const Grid& grid) {
  for (const int weights : {4, 2, 1}) {
    if (weights % grid.p != 0) continue;
    const int bits = weights / grid.p * grid.index_bits;
    const bool fits = weights == 2 ? bits >= 5 && bits <= 12 : bits == 8 || (weights == 4 && (bits == 4 || bits == 6));
    if (fits) return {bits, weights};
  }
  throw Error(ErrorCode::unsupported, "grid " + std::string(grid.name) +
                                          " has no CUDA decoder; p = 1 supports 2-6 and 8 index bits, p = 2 supports "
                                          "2-12, p = 4 supports 4, 6 and 8");
}

TiledFormat tiled_format(const LayerFormat& format) {
  validate(format);
  TiledFormat t;
  t.field = field_shape(*format.grid);
  t.row_tiles = ceil_div(format.n, kTileRows);
  t.row_groups = format.row_groups();
  const std::int64_t units = ceil_div(format.k, kUnitColumns);
  t.units_per_slice = static_cast<int>(ceil_div(units, ceil_div(units, t.field.max_units())));
  t.slices = static_cast<int>(ceil_div(units, t.units_per_slice));
  t.last_units = static_cast<int>(units - std::int64_t{t.slices - 1} * t.units_per_slice);
  t.slice_bytes = bytes_of_slice(t.field, t.units_per_slice);
  t.tile_bytes = (t.slices - 1) * t.slice_bytes + bytes_of_slice(t.field, t.last_units);
  const std::int64_t table = align(std::int64_t{t.field.entries()} * t.field.entry_bytes());
  t.table_f16 = 0;
  t.table_bf16 = table;
  t.scales = 2 * table;
  t.weights = t.scales + align(t.row_tiles * t.row_groups * kTileRows * 2);
  t.bytes = t.weights + align(t.row_tiles * t.tile_bytes);
  return t;
}

}  // namespace higgs::cuda
