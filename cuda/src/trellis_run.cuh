// Runs of trellis grids in the stored layout (FORMAT.md, "Trellis grids").
#pragma once

#include <cstdint>

namespace higgs::cuda {

inline constexpr int kRunGroup = 256;  // Trellis::run_group of additive grids
inline constexpr int kLongRun = 512;   // and of hashed ones

// Of an additive grid: a row is cut into groups of 256 columns, the last one may be shorter; run t of a group is its
// columns c with (c / 4) % 4 == t.
struct StoredRun {
  const uint8_t* bytes;
  int count;  // of bytes
  int steps;  // of two weights

  // Run t of the group from column 256 `group` on, of a row of k columns.
  __device__ __forceinline__ StoredRun(const uint8_t* row, int64_t k, int64_t group, int t, int bits) {
    const int blocks = static_cast<int>(min(int64_t{kRunGroup}, k - group * kRunGroup) / 64);
    count = blocks * bits;
    steps = blocks * 8;
    bytes = row + group * (16 * bits) + t * count;
  }
  // 8 bits from bit `position` on, which may lie beyond the end: the run is circular.
  __device__ __forceinline__ uint32_t window(int position) const {
    const int byte = position / 8 % count;
    const int next = byte + 1 < count ? byte + 1 : 0;
    return (bytes[byte] | static_cast<uint32_t>(bytes[next]) << 8) >> (position % 8) & 0xff;
  }
};

// Of a hashed grid: 512 consecutive columns; the last run of a row takes the rest too.
struct LongRun {
  const uint8_t* bytes;
  int count;          // of bytes
  int64_t first = 0;  // column

  // The run of a column of a row of k columns, of which `columns` take `bits` bits.
  __device__ __forceinline__ LongRun(const uint8_t* row, int64_t k, int64_t column, int columns, int bits) {
    const int64_t last = max(k / kLongRun, int64_t{1}) - 1;
    const int64_t run = min(column / kLongRun, last);
    first = run * kLongRun;
    count = static_cast<int>(run < last ? kLongRun : k - first) / columns * bits / 8;
    bytes = row + first / columns * bits / 8;
  }
  // 16 bits from bit `position` of the run on, around its end.
  __device__ __forceinline__ uint32_t window(int position) const {
    const int byte = position / 8;
    const auto at = [&](int i) { return static_cast<uint32_t>(bytes[i < count ? i : i - count]); };
    return (at(byte) | at(byte + 1) << 8 | at(byte + 2) << 16) >> (position % 8) & 0xffff;
  }
};

}  // namespace higgs::cuda
