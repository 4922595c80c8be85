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

// bits = 0: none.
FieldShape find_shape(const Grid& grid) noexcept {
  const int bits = grid.index_bits;
  if (grid.trellis != nullptr) {
    const bool fits = grid.trellis->kind == Trellis::Kind::additive && grid.p == 2 && bits >= 4 && bits <= 8 &&
                      grid.window_bits == bits * trellis_shift(bits) + 8;
    return fits ? FieldShape{bits, 2, trellis_shift(bits)} : FieldShape{};
  }
  for (const int weights : {4, 2, 1}) {
    if (weights % grid.p != 0) continue;
    const int field = weights / grid.p * bits;
    const FieldShape shape{field, weights};
    const bool fits = shape.sign_bits() > 0 ? field == 12 && grid.magnitudes == shape.entries()
                      : weights == 2        ? field >= 5 && field <= 12
                                            : field == 8 || (weights == 4 && (field == 4 || field == 6));
    if (fits) return shape;
  }
  return {};
}

}  // namespace

FieldShape field_shape(const Grid& grid) {
  const FieldShape shape = find_shape(grid);
  if (shape.bits > 0) return shape;
  throw Error(ErrorCode::unsupported,
              "grid " + std::string(grid.name) +
                  " has no CUDA kernel that multiplies; p = 1 supports 2-6 and 8 index bits, p = 2 supports 2-12, "
                  "p = 4 supports 4, 6, 8 and, with signs, 12, of trellis grids a2_b4 to a2_b8 are supported; for the "
                  "others use rotate, dequantize_rotated and a GEMM");
}

bool supports_grid(const Grid& grid) noexcept { return find_shape(grid).bits > 0; }

TiledFormat tiled_format(const LayerFormat& format) {
  validate(format);
  TiledFormat t;
  if (!supports_grid(*format.grid)) {
    t.weights = align(2 * format.n * format.row_groups());
    t.bytes = t.weights + align(format.index_bytes());
    return t;
  }
  t.field = field_shape(*format.grid);
  t.row_tiles = ceil_div(format.n, kTileRows);
  t.row_groups = format.row_groups();
  const int joined = t.field.joined_units();
  const std::int64_t units = ceil_div(format.k, kUnitColumns * joined) * joined;
  const std::int64_t slices = ceil_div(units, t.field.max_units());
  t.units_per_slice = static_cast<int>(ceil_div(units, slices * joined) * joined);
  t.slices = static_cast<int>(ceil_div(units, t.units_per_slice));
  t.last_units = static_cast<int>(units - std::int64_t{t.slices - 1} * t.units_per_slice);
  t.slice_bytes = bytes_of_slice(t.field, t.units_per_slice);
  t.tile_bytes = (t.slices - 1) * t.slice_bytes + bytes_of_slice(t.field, t.last_units);
  const std::int64_t table = t.field.value_table_bytes();
  t.table_f16 = 0;
  t.table_bf16 = table;
  t.table_bytes = 2 * table;
  t.scales = 2 * table + t.field.byte_tables_bytes();
  t.weights = t.scales + align(t.row_tiles * t.row_groups * kTileRows * 2);
  t.bytes = t.weights + align(t.row_tiles * t.tile_bytes);
  return t;
}

}  // namespace higgs::cuda
