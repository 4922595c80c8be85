// The layout the matmul kernels read, made from the stored one by `repack`. Never written to a file: it may change with
// every version of the kernels.
//
//   [fp16 table | bf16 table | byte tables | scales | weights], every part 256-byte aligned
//
// Quads have byte tables too, trellises have no others.
//
// Fields. Indices are grouped into fields of `weights` consecutive columns and `bits` bits, so that one table look-up
// yields up to four weights whatever the grid: p1_n16 becomes pairs of indices (8 bits, the decoder of p2_n256), p1_n4
// and p2_n16 become runs of four columns (8 bits, the decoder of p4_n256). The table lists the field values in order;
// of a sign-symmetric grid the magnitudes only.
//
// Tiles. A row tile is 16 rows. k is cut into slices of units_per_slice units of 128 columns; one warp multiplies one
// row tile by one slice. Within a unit, lane 4 g + t of the warp holds the weights it needs for eight m16n8k16 steps:
// rows g and g + 8, columns 16 step + 4 t .. + 3. Its fields make `unit_words` 32-bit words; the words of a slice are
// interleaved by lane in 16-byte pieces, so a warp reads 512 consecutive bytes per load instruction:
//
//   weights[row tile][slice][word / 4][lane][word % 4]
//   scales [row tile][scale group][16 rows]     fp16
//
// Rows beyond n have scale 0; columns beyond k hold field 0 and meet x = 0.
//
// Grids that no matmul kernel supports (trellis grids by hash) stay as they are stored: [scales | indices], each
// aligned.
#pragma once

#include <cstddef>
#include <cstdint>

#include "higgs/packed_format.h"

namespace higgs::cuda {

inline constexpr int kTileRows = 16;
inline constexpr int kUnitColumns = 128;
inline constexpr int kLanes = 32;
inline constexpr int kTiledAlignment = 256;

// Points of grids that decode as fields of four weights are multiples of this, less than 4: signed bytes (FORMAT.md).
// Those of sign-symmetric grids are half of it more: byte b stands for (b + 0.5) * kQuadStep, so that ~b is its
// negative.
inline constexpr float kQuadStep = 1.0f / 32;

// Steps between the windows of a value, of the additive trellis grids that have a kernel.
constexpr int trellis_shift(int bits) noexcept { return bits == 4 ? 2 : 1; }

// Entries of additive trellis grids are -64 .. 63 steps (FORMAT.md): with this added they are unsigned bytes, whose
// sums are bytes, too.
inline constexpr int kTrellisOffset = 64;

// How the columns of a grid are grouped into table look-ups; one decoder per (bits, weights). See instances.h.
struct FieldShape {
  int bits = 0;     // of one field
  int weights = 0;  // columns covered by one field: 4, 2 or 1
  int shift = 0;    // additive trellis: steps between the two windows of a value; 0: a vector grid

  friend bool operator==(const FieldShape&, const FieldShape&) = default;
  [[nodiscard]] constexpr bool trellis() const noexcept { return shift > 0; }
  [[nodiscard]] constexpr bool quads() const noexcept { return weights == 4; }
  // Whether bytes of the weights meet x with halves of words exchanged (SumTrellisDecoder).
  [[nodiscard]] constexpr bool crossed() const noexcept { return shift == 2; }
  // Upper bits of a field that are signs of its weights; the others choose an entry of the table, a magnitude each.
  [[nodiscard]] constexpr int sign_bits() const noexcept { return quads() && bits > 8 ? 4 : 0; }
  [[nodiscard]] constexpr int entry_bits() const noexcept { return bits - sign_bits(); }
  [[nodiscard]] constexpr int entries() const noexcept { return trellis() ? 256 : 1 << entry_bits(); }
  // 32-bit words a lane holds of one unit: 8 steps of 8 weights.
  [[nodiscard]] constexpr int unit_words() const noexcept { return 64 / weights * bits / 32; }
  // Longest slice: a warp keeps the x fragments of one slice and the words of the next tile in registers.
  [[nodiscard]] constexpr int max_units() const noexcept { return unit_words() <= 8 ? 4 : unit_words() <= 11 ? 3 : 2; }
  // Units a decoder takes at once: a trellis run covers two.
  [[nodiscard]] constexpr int joined_units() const noexcept { return trellis() ? 2 : 1; }
  // An entry of a table of 16-bit values: `weights` of them, a single one stored twice.
  [[nodiscard]] constexpr int entry_bytes() const noexcept { return weights == 4 ? 8 : 4; }
  // The table in fp16, or in bf16; a trellis has none.
  [[nodiscard]] constexpr int value_table_bytes() const noexcept {
    return trellis() ? 0 : (entries() * entry_bytes() + kTiledAlignment - 1) / kTiledAlignment * kTiledAlignment;
  }
  // Tables of four bytes per entry. Of a trellis two: signed, and with offsets (trellis.cuh). Of quads one: the points
  // over kQuadStep, rounded down.
  [[nodiscard]] constexpr int byte_tables_bytes() const noexcept {
    const int bytes = (trellis() ? 2 : quads() ? 1 : 0) * 4 * entries();
    return (bytes + kTiledAlignment - 1) / kTiledAlignment * kTiledAlignment;
  }
};

// The decoder of a grid for the matmul kernels. Throws Error(unsupported) if no decoder fits.
[[nodiscard]] FieldShape field_shape(const Grid& grid);

// Whether there is one: for all vector grids and the additive trellis grids a2_b4 to a2_b8. Of the others, weights are
// decoded first (dequantize_rotated).
[[nodiscard]] bool supports_grid(const Grid& grid) noexcept;

struct TiledFormat {
  FieldShape field;
  std::int64_t row_tiles = 0;
  std::int64_t row_groups = 0;  // scale groups of a row
  int slices = 0;
  int units_per_slice = 0;
  int last_units = 0;  // units of the last slice
  std::int64_t slice_bytes = 0;
  std::int64_t tile_bytes = 0;  // of one row tile over all of k
  std::int64_t table_f16 = 0;   // byte offsets of the parts
  std::int64_t table_bf16 = 0;
  std::int64_t table_bytes = 0;  // of quads and trellises
  std::int64_t scales = 0;
  std::int64_t weights = 0;
  std::int64_t bytes = 0;  // of the whole buffer

  [[nodiscard]] int slice_columns() const noexcept { return units_per_slice * kUnitColumns; }
  // Whether every slice is full and lies inside one scale group.
  [[nodiscard]] bool regular(const LayerFormat& f) const noexcept {
    return units_per_slice == field.max_units() && f.k % slice_columns() == 0 && f.group % slice_columns() == 0;
  }
};

// Validates the format.
[[nodiscard]] TiledFormat tiled_format(const LayerFormat& format);

// A quantized matrix in the tiled layout; `data` is a device pointer to tiled_format(format).bytes bytes.
struct TiledView {
  LayerFormat format;
  const std::byte* data = nullptr;
};

}  // namespace higgs::cuda
