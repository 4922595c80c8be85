#include "higgs/packed_format.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "checks.h"
#include "higgs/error.h"
#include "higgs/numeric.h"

namespace higgs {
namespace {

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, message); }

void check_k(std::int64_t k) {
  if (k <= 0 || k % kColumnAlignment != 0) {
    fail("k = " + std::to_string(k) + " is not supported; in_features must be a positive multiple of 64");
  }
}

void check_block(int block) {
  if (!is_block(block)) {
    fail("block " + std::to_string(block) + " is not supported; use a multiple of 64 in 64..1024");
  }
}

}  // namespace

int default_block(std::int64_t k) {
  check_k(k);
  constexpr std::int64_t kGoodPowerOfTwo = 256;
  const std::int64_t power = std::min<std::int64_t>(kMaxBlock, k & -k);
  if (power >= kGoodPowerOfTwo) return static_cast<int>(power);
  int block = kMaxBlock;
  while (k % block != 0) block -= kMinBlock;
  return block;
}

std::int64_t default_group(std::int64_t k, int block) {
  constexpr std::int64_t kShortest = 512;
  constexpr std::int64_t kLongest = 2048;
  check_k(k);
  check_block(block);
  const std::int64_t shortest = (std::max<std::int64_t>(kShortest, block) + block - 1) / block * block;
  for (std::int64_t group = shortest; group <= std::min(k, kLongest); group += block) {
    if (k % group == 0) return group;
  }
  return std::min(k, shortest);
}

void validate(const LayerFormat& f) {
  if (f.grid == nullptr) fail("format: no grid");
  const auto is_this = [&](const Grid& g) { return &g == f.grid; };
  if (std::ranges::none_of(grids(), is_this)) fail("format: grid is a copy; use the address that find_grid returns");
  if (f.n < 0) fail("n = " + std::to_string(f.n) + " is negative");
  check_k(f.k);
  constexpr std::int64_t kMaxWeights = std::int64_t{1} << 56;  // so that no size in bits or bytes overflows
  if (f.n > kMaxWeights / f.k) {
    fail("n = " + std::to_string(f.n) + " times k = " + std::to_string(f.k) + " is more than 2^56 weights");
  }
  check_block(f.block);
  if (f.k % f.block != 0) {
    fail("block " + std::to_string(f.block) + " does not divide k = " + std::to_string(f.k) + "; the default is " +
         std::to_string(default_block(f.k)));
  }
  if (f.group <= 0 || f.group % f.block != 0 || f.group > f.k) {
    fail("group " + std::to_string(f.group) + " is not supported; use a multiple of block " + std::to_string(f.block) +
         " that is at most k = " + std::to_string(f.k));
  }
}

namespace detail {

std::vector<float> load_column_scale(const std::uint16_t* column_scale, std::int64_t k) {
  std::vector<float> s;
  if (column_scale == nullptr) return s;
  s.resize(static_cast<std::size_t>(k));
  for (std::int64_t j = 0; j < k; ++j) {
    s[j] = f16_to_f32(column_scale[j]);
    if (!(s[j] > 0.0f) || !std::isfinite(s[j])) {
      throw Error(ErrorCode::invalid_argument, "column_scale[" + std::to_string(j) + "] is " + std::to_string(s[j]) +
                                                   "; column scales are positive and finite");
    }
  }
  return s;
}

}  // namespace detail
}  // namespace higgs
