// Indices <-> bit-packed bytes of the stored layout.
#pragma once

#include <cstdint>
#include <span>

namespace higgs {

// Writes indices of index_bits bits each one after another, least significant bit first. indices.size() * index_bits is
// a multiple of 8 and equals 8 * bytes.size(); every index is below 2^index_bits, else Error(invalid_argument).
void pack(std::span<const std::uint16_t> indices, int index_bits, std::span<std::uint8_t> bytes);

// The inverse of pack.
void unpack(std::span<const std::uint8_t> bytes, int index_bits, std::span<std::uint16_t> indices);

}  // namespace higgs
