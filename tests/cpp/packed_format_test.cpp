#include "higgs/packed_format.h"

#include <gtest/gtest.h>

#include <limits>

#include "helpers.h"

namespace higgs {
namespace {

using test::expect_error;
using test::make_format;

struct Defaults {
  std::int64_t k;
  int block;
  std::int64_t group;
};

TEST(PackedFormat, DefaultBlockAndGroup) {
  const Defaults table[] = {
      {64, 64, 64},    {128, 128, 128},   {192, 192, 192},     {576, 576, 576},  {640, 640, 640},
      {896, 896, 896}, {1152, 576, 576},  {1024, 1024, 1024},  {1536, 512, 512}, {4096, 1024, 1024},
      {8384, 64, 512}, {11008, 256, 512}, {14336, 1024, 1024},
  };
  for (const Defaults& d : table) {
    EXPECT_EQ(default_block(d.k), d.block) << d.k;
    EXPECT_EQ(default_group(d.k, default_block(d.k)), d.group) << d.k;
  }
}

// The rule of packed_format.h, word for word.
std::int64_t group_of_the_rule(std::int64_t k, int block) {
  std::int64_t shortest = block;
  while (shortest < 512) shortest += block;
  for (std::int64_t g = shortest; g <= k; g += block) {
    if (k % g == 0) return g <= 2048 ? g : shortest;
  }
  return std::min(k, shortest);
}

TEST(PackedFormat, DefaultsAreLegalAndFollowTheRuleForEveryK) {
  for (std::int64_t k = 64; k <= 20480; k += 64) {
    const int block = default_block(k);
    const std::int64_t power = std::min<std::int64_t>(1024, k & -k);
    if (power >= 256) {
      EXPECT_EQ(block, power) << k;
    } else {
      for (int b = block + 64; b <= 1024; b += 64) EXPECT_NE(k % b, 0) << k << " " << b;
    }
    for (int b = 64; b <= 1024; b += 64) {
      if (k % b != 0) continue;
      LayerFormat f = make_format("p2_n256", 1, k, b, default_group(k, b));
      ASSERT_NO_THROW(validate(f)) << k << " " << b;
      ASSERT_EQ(f.group, group_of_the_rule(k, b)) << k << " " << b;
    }
  }
}

TEST(PackedFormat, NarrowLayersPayLittleForScales) {
  for (const std::int64_t k : {576, 640, 896, 1536}) {
    for (const Grid& grid : grids()) {
      const LayerFormat f = make_format(grid.name, 1000, k);
      EXPECT_LE(f.bits(false) - grid.rate(), 0.06) << k << " " << grid.name;
      EXPECT_GT(f.bits(false), grid.rate()) << k << " " << grid.name;
    }
  }
}

TEST(PackedFormat, SizesAreThoseOfTheTensors) {
  const LayerFormat f = make_format("p2_n512", 7, 320, 64, 128);
  EXPECT_EQ(f.row_indices(), 160);
  EXPECT_EQ(f.row_bytes(), 160 * 9 / 8);
  EXPECT_EQ(f.row_groups(), 3);
  EXPECT_EQ(f.group_end(0), 128);
  EXPECT_EQ(f.group_end(2), 320);
  EXPECT_EQ(f.index_bytes(), 7 * 180);
  EXPECT_EQ(f.stored_bytes(false), 7 * 180 + 7 * 3 * 2);
  EXPECT_EQ(f.stored_bytes(true), 7 * 180 + 7 * 3 * 2 + 320 * 2);
  EXPECT_DOUBLE_EQ(f.bits(false), 8.0 * (7 * 180 + 42) / (7 * 320));
  EXPECT_DOUBLE_EQ(f.bits(true), 8.0 * (7 * 180 + 42 + 640) / (7 * 320));
  EXPECT_EQ(make_format("p2_n512", 0, 320).bits(true), 0.0);
}

TEST(PackedFormat, EveryGridHasWholeBytesAtEverySixtyFourColumns) {
  for (const Grid& grid : grids()) {
    EXPECT_EQ(64 / grid.p * grid.index_bits % 8, 0) << grid.name;
    EXPECT_EQ(make_format(grid.name, 1, 64).row_bytes() * 8, 64 / grid.p * grid.index_bits) << grid.name;
  }
}

// The rule of FORMAT.md: helpers.h has it too, in other words.
TEST(PackedFormat, RunsOfATrellisGrid) {
  struct Lengths {
    std::int64_t k;
    std::vector<std::size_t> of_t2;
    std::vector<std::size_t> of_a2;  // every fourth run
  };
  const Lengths table[] = {{64, {64}, {16}},
                           {576, {576}, {64, 64, 16}},
                           {960, {960}, {64, 64, 64, 48}},
                           {1024, {512, 512}, {64, 64, 64, 64}},
                           {1536 + 448, {512, 512, 960}, {64, 64, 64, 64, 64, 64, 64, 48}}};
  for (const Lengths& lengths : table) {
    for (const char* name : {"t2_b4", "a2_b8"}) {
      const LayerFormat f = make_format(name, 1, lengths.k);
      const auto runs = test::spec::runs_of_row(f);
      const auto& expected = name[0] == 't' ? lengths.of_t2 : lengths.of_a2;
      const std::size_t each = name[0] == 't' ? 1 : 4;
      ASSERT_EQ(runs.size(), each * expected.size()) << name << " " << lengths.k;
      std::int64_t first = 0;
      for (std::size_t r = 0; r < runs.size(); ++r) {
        EXPECT_EQ(runs[r].size(), expected[r / each]) << name << " " << lengths.k;
        for (std::size_t i = 0; i < runs[r].size(); ++i) {
          const StreamPlace place = stream_place(*f.grid, f.k, runs[r][i]);
          EXPECT_EQ(place.first, first);
          EXPECT_EQ(place.steps, static_cast<int>(runs[r].size()) / 2);
          EXPECT_EQ(place.step, static_cast<int>(i) / 2);
        }
        first += static_cast<std::int64_t>(runs[r].size()) / 2;
      }
      EXPECT_EQ(first, f.row_indices());
      EXPECT_LE(run_group(*f.grid->trellis, f.k, f.k - 1).run_columns(), kMaxRunColumns);
    }
  }
}

TEST(PackedFormat, IllegalKIsNamed) {
  for (const std::int64_t k :
       {std::int64_t{0}, std::int64_t{-64}, std::int64_t{1}, std::int64_t{63}, std::int64_t{100}}) {
    const std::vector<std::string> words = {"k = " + std::to_string(k), "multiple of 64"};
    expect_error(ErrorCode::invalid_argument, words, [&] { (void)default_block(k); });
    expect_error(ErrorCode::invalid_argument, words, [&] { (void)default_group(k, 64); });
    LayerFormat f = make_format("p1_n16", 1, 64);
    f.k = k;
    expect_error(ErrorCode::invalid_argument, words, [&] { validate(f); });
  }
}

TEST(PackedFormat, GroupsOfIllegalBlocksAreErrors) {
  for (const int block : {0, -64, 63, 96, 1088}) {
    expect_error(ErrorCode::invalid_argument, {"block " + std::to_string(block), "64..1024"},
                 [&] { (void)default_group(1024, block); });
  }
}

TEST(PackedFormat, ValidateNamesTheValueAndTheLegalSet) {
  const LayerFormat good = make_format("p1_n16", 2, 576, 64);
  EXPECT_NO_THROW(validate(good));
  LayerFormat f = good;
  f.grid = nullptr;
  expect_error(ErrorCode::invalid_argument, {"grid"}, [&] { validate(f); });
  f = good;
  f.n = -1;
  expect_error(ErrorCode::invalid_argument, {"-1"}, [&] { validate(f); });
  for (const int block :
       {0, -64, 1, 32, 96, 1088, 2048, std::numeric_limits<int>::min(), std::numeric_limits<int>::max()}) {
    f = good;
    f.block = block;
    expect_error(ErrorCode::invalid_argument, {std::to_string(block), "multiple of 64 in 64..1024"},
                 [&] { validate(f); });
  }
  f = good;
  f.block = 128;
  expect_error(ErrorCode::invalid_argument, {"128", "k = 576", "the default is 576"}, [&] { validate(f); });
  for (const std::int64_t group : {std::int64_t{0}, std::int64_t{-64}, std::int64_t{32}, std::int64_t{100},
                                   std::int64_t{640}, std::numeric_limits<std::int64_t>::max()}) {
    f = good;
    f.group = group;
    expect_error(ErrorCode::invalid_argument, {"group " + std::to_string(group), "block 64", "k = 576"},
                 [&] { validate(f); });
  }
}

// The tables behind a grid are found by its address.
TEST(PackedFormat, ACopyOfAGridIsRefused) {
  const Grid copy = find_grid("p2_n256");
  LayerFormat f = make_format("p2_n256", 2, 576);
  f.grid = &copy;
  expect_error(ErrorCode::invalid_argument, {"grid", "find_grid"}, [&] { validate(f); });
}

TEST(PackedFormat, SizesThatDoNotFitInSixtyFourBitsAreRefused) {
  LayerFormat f = make_format("p1_n16", 0, 64);
  for (const std::int64_t n : {std::numeric_limits<std::int64_t>::max(), std::int64_t{1} << 58}) {
    f.n = n;
    expect_error(ErrorCode::invalid_argument, {std::to_string(n), "k = 64"}, [&] { validate(f); });
  }
  f.n = 1 << 30;
  EXPECT_NO_THROW(validate(f));
}

}  // namespace
}  // namespace higgs
