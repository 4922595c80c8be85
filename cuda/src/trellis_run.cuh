// Runs of a trellis grid in the stored layout (FORMAT.md, "Trellis grids"): a row is cut into groups of 256 columns,
// the last one may be shorter; run t of a group is its columns c with (c / 4) % 4 == t.
#pragma once

#include <cstdint>

namespace higgs::cuda {

inline constexpr int kRunGroup = 256;

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

}  // namespace higgs::cuda
