#include "higgs/pack.h"

#include <gtest/gtest.h>

#include "helpers.h"

namespace higgs {
namespace {

using test::expect_error;
using test::Rng;

std::vector<std::uint16_t> random_indices(Rng& rng, std::size_t count, int index_bits) {
  std::vector<std::uint16_t> indices(count);
  for (std::uint16_t& i : indices) i = static_cast<std::uint16_t>(rng() & ((1u << index_bits) - 1));
  return indices;
}

class PackEveryWidth : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(All, PackEveryWidth, testing::Range(kMinIndexBits, kMaxIndexBits + 1),
                         testing::PrintToStringParamName());

TEST_P(PackEveryWidth, BitJOfIndexIIsWhereTheFormatSays) {
  const int width = GetParam();
  Rng rng(static_cast<std::uint64_t>(width));
  for (const std::size_t count : {std::size_t{0}, std::size_t{8}, std::size_t{16}, std::size_t{1000}}) {
    std::vector<std::uint16_t> indices = random_indices(rng, count, width);
    if (count > 8) {
      indices.front() = static_cast<std::uint16_t>((1u << width) - 1);
      indices.back() = static_cast<std::uint16_t>((1u << width) - 1);
      indices[1] = 0;
    }
    std::vector<std::uint8_t> bytes(count * static_cast<std::size_t>(width) / 8, 0xaa);
    pack(indices, width, bytes);
    for (std::size_t i = 0; i < count; ++i) {
      ASSERT_EQ(test::spec::index_at(bytes, 0, static_cast<std::int64_t>(i), width), indices[i]) << i;
    }
    std::vector<std::uint16_t> back(count, 0xffff);
    unpack(bytes, width, back);
    EXPECT_EQ(back, indices);
  }
}

TEST_P(PackEveryWidth, AnyBytesUnpackAndPackToThemselves) {
  const int width = GetParam();
  Rng rng(99);
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(width) * 33);
  for (std::uint8_t& b : bytes) b = static_cast<std::uint8_t>(rng());
  std::vector<std::uint16_t> indices(33 * 8);
  unpack(bytes, width, indices);
  for (const std::uint16_t i : indices) ASSERT_LT(i, 1u << width);
  std::vector<std::uint8_t> back(bytes.size());
  pack(indices, width, back);
  EXPECT_EQ(back, bytes);
}

TEST_P(PackEveryWidth, TooLargeAnIndexIsNamed) {
  const int width = GetParam();
  for (std::size_t at = 0; at < 8; ++at) {
    std::vector<std::uint16_t> indices(8);
    indices[at] = static_cast<std::uint16_t>(1u << width);
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(width));
    expect_error(ErrorCode::invalid_argument, {std::to_string(1u << width), std::to_string(width) + " bits"},
                 [&] { pack(indices, width, bytes); });
  }
}

TEST(Pack, IllegalWidthsNameTheLegalOnes) {
  std::vector<std::uint16_t> indices(64);
  std::vector<std::uint8_t> bytes(64);
  for (const int width : {-1, 0, 1, 13, 16}) {
    expect_error(ErrorCode::invalid_argument, {std::to_string(width), "2 to 12"}, [&] { pack(indices, width, bytes); });
    expect_error(ErrorCode::invalid_argument, {std::to_string(width), "2 to 12"},
                 [&] { unpack(bytes, width, indices); });
  }
}

TEST(Pack, SizesThatDoNotMatchNameBothSides) {
  std::vector<std::uint16_t> indices(16);
  std::vector<std::uint8_t> bytes(12);
  std::vector<std::uint8_t> longer(13);
  std::vector<std::uint8_t> shorter(11);
  EXPECT_NO_THROW(pack(indices, 6, bytes));
  for (std::vector<std::uint8_t>* wrong : {&longer, &shorter}) {
    const std::vector<std::string> words = {"16 indices", "6 bits", std::to_string(wrong->size()) + " bytes"};
    expect_error(ErrorCode::invalid_argument, words, [&] { pack(indices, 6, *wrong); });
    expect_error(ErrorCode::invalid_argument, words, [&] { unpack(*wrong, 6, indices); });
  }
  std::vector<std::uint16_t> odd(3);
  std::vector<std::uint8_t> two(2);
  expect_error(ErrorCode::invalid_argument, {"3 indices"}, [&] { pack(odd, 5, two); });
}

}  // namespace
}  // namespace higgs
