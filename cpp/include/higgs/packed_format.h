// Stored format v1 in code (in prose: cpp/FORMAT.md). All sizes of the format are computed here and nowhere else.
//
//   indices  uint8  [n, k / p * index_bits / 8]   bit-packed along k in order, least significant bit first; its stream,
//                                                 if the grid is a trellis
//   scales   fp16   [n, ceil(k / group)]          one per scale group
//   column_scale fp16 [k]                         optional
#pragma once

#include <algorithm>
#include <cstdint>

#include "higgs/grid.h"

namespace higgs {

inline constexpr int kFormatVersion = 1;
inline constexpr int kMinBlock = 64;
inline constexpr int kMaxBlock = 1024;
inline constexpr int kColumnAlignment = 64;  // k is a multiple of this
inline constexpr int kMinIndexBits = 2;
inline constexpr int kMaxIndexBits = 12;
inline constexpr int kMaxP = 4;
// Every kColumnAlignment columns hold a whole number of index bytes whatever the grid, so that blocks, scale groups and
// tensor-parallel slices along k start at byte boundaries.
static_assert(kColumnAlignment / kMaxP * 1 % 8 == 0);

// The stream of a trellis grid is cyclic in runs. A row is cut into groups of Trellis::run_group columns; what is left
// is a shorter group if a group has four runs, and joins the last group if it is one run. Run t has the group's columns
// c with (c / 4) % runs == t. Groups follow each other in the stream, and so do the runs of a group.
struct RunGroup {
  std::int64_t first = 0;  // column
  int columns = 0;
  int runs = 1;

  [[nodiscard]] constexpr int run_columns() const noexcept { return columns / runs; }
  // Where the group has column i of run t.
  [[nodiscard]] constexpr int column(int t, int i) const noexcept { return i / 4 * 4 * runs + 4 * t + i % 4; }
};
inline constexpr int kMaxRunColumns = 1024;

// The group of column j of a row of k columns.
[[nodiscard]] constexpr RunGroup run_group(const Trellis& trellis, std::int64_t k, std::int64_t j) noexcept {
  const std::int64_t size = trellis.run_group;
  std::int64_t first = j & -size;  // no division: the matmul kernels call this
  if (trellis.runs == 1 && first > 0 && k - first < size) first -= size;
  const std::int64_t left = k - first;
  const bool ends = left < (trellis.runs == 1 ? 2 * size : size);
  return {first, static_cast<int>(ends ? left : size), trellis.runs};
}

struct StreamPlace {
  std::int64_t first = 0;  // index of the run's first step in the row's stream
  int steps = 0;           // of the run
  int step = 0;            // that holds the column
};

// Where column j of a row of k columns is, in a trellis grid.
[[nodiscard]] constexpr StreamPlace stream_place(const Grid& grid, std::int64_t k, std::int64_t j) noexcept {
  const RunGroup group = run_group(*grid.trellis, k, j);
  const int c = static_cast<int>(j - group.first);
  const int steps = group.run_columns() / grid.p;
  const int step = (c / (4 * group.runs) * 4 + c % 4) / grid.p;
  return {group.first / grid.p + c / 4 % group.runs * steps, steps, step};
}

// How one weight matrix W[n, k] is stored.
struct LayerFormat {
  const Grid* grid = nullptr;
  std::int64_t n = 0;
  std::int64_t k = 0;
  int block = 0;           // Hadamard block: multiple of 64 in [64, 1024], divides k
  std::int64_t group = 0;  // columns per scale: multiple of block, at most k; the last group may be shorter
  std::uint64_t seed = 0;  // key of the signs

  [[nodiscard]] std::int64_t row_indices() const noexcept { return k / grid->p; }
  [[nodiscard]] std::int64_t row_bytes() const noexcept { return row_indices() * grid->index_bits / 8; }
  [[nodiscard]] std::int64_t row_groups() const noexcept { return (k + group - 1) / group; }
  [[nodiscard]] std::int64_t group_end(std::int64_t g) const noexcept { return std::min(k, (g + 1) * group); }
  [[nodiscard]] std::int64_t index_bytes() const noexcept { return n * row_bytes(); }
  [[nodiscard]] std::int64_t stored_bytes(bool has_column_scale) const noexcept {
    return index_bytes() + 2 * n * row_groups() + (has_column_scale ? 2 * k : 0);
  }
  // Effective bits per weight, scales counted.
  [[nodiscard]] double bits(bool has_column_scale) const noexcept {
    return n * k == 0 ? 0.0 : 8.0 * static_cast<double>(stored_bytes(has_column_scale)) / static_cast<double>(n * k);
  }
};

[[nodiscard]] constexpr bool is_block(int block) noexcept {
  return block >= kMinBlock && block <= kMaxBlock && block % kMinBlock == 0;
}

// The largest power of two that divides k, at most 1024, if that is at least 256; else the largest multiple of 64 that
// divides k, at most 1024. Throws if k is not a positive multiple of 64.
[[nodiscard]] int default_block(std::int64_t k);

// The smallest multiple of block that divides k and has at least 512 columns (so that a scale costs at most 1/32 bit);
// if that is longer than 2048, the smallest multiple of block with at least 512 columns, the last group being shorter;
// never longer than k. Throws if k is not a positive multiple of 64, or block none in 64..1024.
[[nodiscard]] std::int64_t default_group(std::int64_t k, int block);

// Throws Error(invalid_argument) that names the value and the legal set.
void validate(const LayerFormat& format);

// A quantized matrix somebody else owns, in the stored layout.
struct PackedView {
  LayerFormat format;
  const std::uint8_t* indices = nullptr;
  const std::uint16_t* scales = nullptr;
  const std::uint16_t* column_scale = nullptr;  // null: all ones
};

}  // namespace higgs
