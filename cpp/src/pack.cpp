#include "higgs/pack.h"

#include <string>

#include "higgs/error.h"
#include "higgs/packed_format.h"

namespace higgs {
namespace {

void check(std::size_t indices, int index_bits, std::size_t bytes) {
  if (index_bits < kMinIndexBits || index_bits > kMaxIndexBits) {
    throw Error(ErrorCode::invalid_argument,
                "index_bits " + std::to_string(index_bits) + " is not supported; use 2 to 12");
  }
  if (indices * static_cast<std::size_t>(index_bits) != bytes * 8) {
    throw Error(ErrorCode::invalid_argument, std::to_string(indices) + " indices of " + std::to_string(index_bits) +
                                                 " bits do not fill " + std::to_string(bytes) + " bytes exactly");
  }
}

}  // namespace

void pack(std::span<const std::uint16_t> indices, int index_bits, std::span<std::uint8_t> bytes) {
  check(indices.size(), index_bits, bytes.size());
  std::uint32_t window = 0;  // at most 7 + 12 bits
  int filled = 0;
  std::size_t out = 0;
  for (const std::uint16_t index : indices) {
    if (index >> index_bits != 0) {
      throw Error(ErrorCode::invalid_argument,
                  "index " + std::to_string(index) + " does not fit in " + std::to_string(index_bits) + " bits");
    }
    window |= static_cast<std::uint32_t>(index) << filled;
    for (filled += index_bits; filled >= 8; filled -= 8, window >>= 8) bytes[out++] = static_cast<std::uint8_t>(window);
  }
}

void unpack(std::span<const std::uint8_t> bytes, int index_bits, std::span<std::uint16_t> indices) {
  check(indices.size(), index_bits, bytes.size());
  const std::uint32_t mask = (1u << index_bits) - 1;
  std::uint32_t window = 0;
  int filled = 0;
  std::size_t in = 0;
  for (std::uint16_t& index : indices) {
    for (; filled < index_bits; filled += 8) window |= static_cast<std::uint32_t>(bytes[in++]) << filled;
    index = static_cast<std::uint16_t>(window & mask);
    window >>= index_bits;
    filled -= index_bits;
  }
}

}  // namespace higgs
