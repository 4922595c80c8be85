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

// Reads the windows of a hashed grid step by step. A run is 512 consecutive columns; the last one of a row takes what
// is left, too. Runs begin and end at multiples of 16 bits.
class LongRun {
 public:
  // From a column (a multiple of 32) of a row of k columns on, of which `columns` take `bits` bits.
  __device__ __forceinline__ LongRun(const uint8_t* row, int64_t k, int64_t column, int columns, int bits)
      : bits_(bits) {
    const int64_t last = max(k / kLongRun, int64_t{1}) - 1;
    const int64_t run = min(column / kLongRun, last);
    const int64_t first = run * kLongRun;
    halves_ = reinterpret_cast<const uint16_t*>(row + first / columns * bits / 8);
    count_ = static_cast<int>(run < last ? kLongRun : k - first) / columns * bits / 16;
    at_ = static_cast<int>(column - first) / columns * bits / 16;
  }
  // 16 bits from the next step on, around the end of the run.
  __device__ __forceinline__ uint32_t next() {
    while (filled_ < 16) {
      buffer_ |= static_cast<uint32_t>(halves_[at_]) << filled_;
      filled_ += 16;
      if (++at_ == count_) at_ = 0;
    }
    const uint32_t window = buffer_ & 0xffff;
    buffer_ >>= bits_;
    filled_ -= bits_;
    return window;
  }

 private:
  const uint16_t* halves_;
  int count_;  // of 16 bits, in the run
  int at_;
  int bits_;
  uint32_t buffer_ = 0;
  int filled_ = 0;  // bits in the buffer
};

}  // namespace higgs::cuda
