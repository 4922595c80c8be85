// Bit fields of the stored layout.
#pragma once

#include <cstdint>

namespace higgs::cuda {

// `count` (at most 16) bits from bit `position` of a row of `row_bytes` bytes.
__device__ __forceinline__ uint32_t read_bits(const uint8_t* row, int64_t row_bytes, int64_t position, int count) {
  const int64_t byte = position / 8;
  const int shift = static_cast<int>(position % 8);
  uint32_t v = row[byte];
  if (byte + 1 < row_bytes && shift + count > 8) v |= static_cast<uint32_t>(row[byte + 1]) << 8;
  if (byte + 2 < row_bytes && shift + count > 16) v |= static_cast<uint32_t>(row[byte + 2]) << 16;
  return (v >> shift) & ((1u << count) - 1);
}

}  // namespace higgs::cuda
