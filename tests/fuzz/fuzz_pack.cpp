// unpack of any bytes gives legal indices and pack gives the bytes back; wrong widths, sizes and indices are errors.
#include <vector>

#include "higgs/higgs.h"
#include "input.h"

namespace higgs {
namespace {

void round_trip(fuzz::Input input, int width) {
  const std::size_t groups = input.size() / static_cast<std::size_t>(width);  // of eight indices
  std::vector<std::uint8_t> bytes(groups * static_cast<std::size_t>(width));
  input.fill(bytes.data(), bytes.size());
  std::vector<std::uint16_t> indices(groups * 8);
  unpack(bytes, width, indices);
  for (const std::uint16_t i : indices) fuzz::require(i < 1u << width, "unpacked index is below 2^index_bits");
  std::vector<std::uint8_t> back(bytes.size());
  pack(indices, width, back);
  fuzz::require(back == bytes, "pack(unpack(bytes)) == bytes");
}

void any_arguments(fuzz::Input input) {
  const int width = input.take<std::int8_t>();
  std::vector<std::uint16_t> indices(input.take<std::uint8_t>());
  std::vector<std::uint8_t> bytes(input.take<std::uint8_t>());
  input.fill(indices.data(), 2 * indices.size());
  const bool sizes_agree = width >= kMinIndexBits && width <= kMaxIndexBits &&
                           indices.size() * static_cast<std::size_t>(width) == 8 * bytes.size();
  bool legal = sizes_agree;
  for (const std::uint16_t i : indices) legal = legal && i >> width == 0;
  bool packed = true;
  try {
    pack(indices, width, bytes);
  } catch (const Error& e) {
    packed = false;
    fuzz::require(e.code() == ErrorCode::invalid_argument, "pack throws invalid_argument");
  }
  fuzz::require(packed == legal, "pack accepts exactly the legal arguments");
  bool unpacked = true;
  try {
    std::vector<std::uint16_t> back(indices.size());
    unpack(bytes, width, back);
    if (packed) fuzz::require(back == indices, "unpack(pack(indices)) == indices");
  } catch (const Error&) {
    unpacked = false;
  }
  fuzz::require(unpacked == sizes_agree, "unpack accepts exactly the legal sizes");
}

}  // namespace
}  // namespace higgs

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  higgs::fuzz::Input input(data, size);
  const int width = input.take<std::uint8_t>();
  if (width >= higgs::kMinIndexBits && width <= higgs::kMaxIndexBits) {
    higgs::round_trip(input, width);
  } else {
    higgs::any_arguments(input);
  }
  return 0;
}
