#include "higgs/numeric.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

namespace higgs {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

static_assert(f16_to_f32(0x3c00) == 1.0f && f32_to_f16(1.0f) == 0x3c00);
static_assert(bf16_to_f32(0x3f80) == 1.0f && f32_to_bf16(1.0f) == 0x3f80);
static_assert(size_of(DType::f32) == 4 && size_of(DType::f16) == 2 && size_of(DType::bf16) == 2);

// The value of a small float from its definition.
double value_of(unsigned bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = static_cast<int>(bits) & ((1 << mantissa_bits) - 1);
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, 1 - bias - mantissa_bits)
                                         : std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
  return (bits >> (exponent_bits + mantissa_bits) & 1u) != 0 ? -magnitude : magnitude;
}

TEST(Numeric, EveryHalfConvertsExactlyAndBack) {
  for (unsigned h = 0; h < 0x10000; ++h) {
    const auto bits = static_cast<std::uint16_t>(h);
    const float f = f16_to_f32(bits);
    if ((h & 0x7c00u) == 0x7c00u) {
      ASSERT_EQ(std::isnan(f), (h & 0x3ffu) != 0) << h;
      ASSERT_EQ(std::isinf(f), (h & 0x3ffu) == 0) << h;
    } else {
      ASSERT_EQ(static_cast<double>(f), value_of(h, 5, 10)) << h;
    }
    ASSERT_EQ(std::signbit(f), h >= 0x8000) << h;
    if (std::isnan(f)) {
      ASSERT_TRUE(std::isnan(f16_to_f32(f32_to_f16(f)))) << h;
    } else {
      ASSERT_EQ(f32_to_f16(f), bits);
    }
  }
}

TEST(Numeric, EveryBfloatConvertsExactlyAndBack) {
  for (unsigned h = 0; h < 0x10000; ++h) {
    const auto bits = static_cast<std::uint16_t>(h);
    const float f = bf16_to_f32(bits);
    if ((h & 0x7f80u) == 0x7f80u) {
      ASSERT_EQ(std::isnan(f), (h & 0x7fu) != 0) << h;
    } else {
      ASSERT_EQ(static_cast<double>(f), value_of(h, 8, 7)) << h;
    }
    ASSERT_EQ(std::signbit(f), h >= 0x8000) << h;
    if (std::isnan(f)) {
      ASSERT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(f)))) << h;
    } else {
      ASSERT_EQ(f32_to_bf16(f), bits);
    }
  }
}

// Between every two neighbours: the tie goes to the even one, everything else to the nearer one. The neighbour of the
// largest finite value is the power of two that the next exponent would stand for, written as infinity.
template <typename ToFloat, typename FromFloat>
void check_rounding_between(unsigned lower, double upper_value, ToFloat to_float, FromFloat from_float) {
  const auto low_bits = static_cast<std::uint16_t>(lower);
  const auto high_bits = static_cast<std::uint16_t>(lower + 1);
  const double low = to_float(low_bits);
  const auto tie = static_cast<float>((low + upper_value) / 2);
  const std::uint16_t even = lower % 2 == 0 ? low_bits : high_bits;
  ASSERT_EQ(from_float(tie), even) << lower;
  ASSERT_EQ(from_float(std::nextafter(tie, 0.0f)), low_bits) << lower;
  ASSERT_EQ(from_float(std::nextafter(tie, kInfinity)), high_bits) << lower;
  ASSERT_EQ(from_float(-tie), even | 0x8000u) << lower;
  ASSERT_EQ(from_float(-std::nextafter(tie, 0.0f)), low_bits | 0x8000u) << lower;
  ASSERT_EQ(from_float(-std::nextafter(tie, kInfinity)), high_bits | 0x8000u) << lower;
}

TEST(Numeric, RoundsToHalfBetweenEveryPairOfNeighbours) {
  for (unsigned h = 0; h < 0x7c00; ++h) {
    const double upper = h + 1 == 0x7c00 ? 65536.0 : f16_to_f32(static_cast<std::uint16_t>(h + 1));
    check_rounding_between(h, upper, f16_to_f32, f32_to_f16);
  }
}

TEST(Numeric, RoundsToBfloatBetweenEveryPairOfNeighbours) {
  for (unsigned h = 0; h < 0x7f80; ++h) {
    const double upper = h + 1 == 0x7f80 ? std::ldexp(1.0, 128) : bf16_to_f32(static_cast<std::uint16_t>(h + 1));
    check_rounding_between(h, upper, bf16_to_f32, f32_to_bf16);
  }
}

TEST(Numeric, HalfOverflowUnderflowAndSpecials) {
  EXPECT_EQ(f32_to_f16(65504.0f), 0x7bff);
  EXPECT_EQ(f32_to_f16(65519.996f), 0x7bff);
  EXPECT_EQ(f32_to_f16(65520.0f), 0x7c00);
  EXPECT_EQ(f32_to_f16(std::numeric_limits<float>::max()), 0x7c00);
  EXPECT_EQ(f32_to_f16(-kInfinity), 0xfc00);
  EXPECT_EQ(f32_to_f16(0x1p-24f), 0x0001);
  EXPECT_EQ(f32_to_f16(0x1p-25f), 0x0000);
  EXPECT_EQ(f32_to_f16(0x1.000002p-25f), 0x0001);
  EXPECT_EQ(f32_to_f16(std::numeric_limits<float>::denorm_min()), 0x0000);
  EXPECT_EQ(f32_to_f16(-std::numeric_limits<float>::denorm_min()), 0x8000);
  EXPECT_EQ(f32_to_f16(-0.0f), 0x8000);
  EXPECT_EQ(f32_to_f16(0x1.ffcp-15f), 0x03ff + 0x0001);  // the largest subnormal and half a step: the smallest normal
}

TEST(Numeric, NanStaysNanWhateverItsPayload) {
  for (const std::uint32_t bits : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffffffffu, 0x7f80ffffu}) {
    const auto nan = std::bit_cast<float>(bits);
    EXPECT_TRUE(std::isnan(f16_to_f32(f32_to_f16(nan)))) << std::hex << bits;
    EXPECT_TRUE(std::isnan(bf16_to_f32(f32_to_bf16(nan)))) << std::hex << bits;
    EXPECT_EQ(f32_to_f16(nan) >> 15, bits >> 31);
    EXPECT_EQ(f32_to_bf16(nan) >> 15, bits >> 31);
  }
}

TEST(Numeric, RandomFloatsGoToTheNearestValue) {
  std::mt19937_64 rng(1);
  for (int i = 0; i < 500000; ++i) {
    const auto f = std::bit_cast<float>(static_cast<std::uint32_t>(rng()));
    if (!std::isfinite(f)) continue;
    const std::uint16_t b = f32_to_bf16(f);
    if (std::isfinite(bf16_to_f32(b))) {
      const double step = std::fabs(static_cast<double>(bf16_to_f32(b ^ 1u)) - bf16_to_f32(b));
      ASSERT_LE(std::fabs(static_cast<double>(bf16_to_f32(b)) - f), step / 2) << f;
    }
    const std::uint16_t h = f32_to_f16(f);
    if (std::fabs(f) < 65504.0f) {
      const double step = std::max(std::ldexp(1.0, -24), std::ldexp(1.0, std::ilogb(f) - 10));
      ASSERT_LE(std::fabs(static_cast<double>(f16_to_f32(h)) - f), step / 2) << f;
    } else {
      ASSERT_EQ(h & 0x7fffu, std::fabs(f) < 65520.0f ? 0x7bffu : 0x7c00u) << f;
    }
  }
}

TEST(Numeric, LoadAndStoreUseTheDtype) {
  float f[2] = {0, 0};
  std::uint16_t h[2] = {0, 0};
  store_f32(f, DType::f32, 1, 0.1f);
  EXPECT_EQ(f[1], 0.1f);
  EXPECT_EQ(f[0], 0.0f);
  EXPECT_EQ(load_f32(f, DType::f32, 1), 0.1f);
  store_f32(h, DType::f16, 1, 0.1f);
  EXPECT_EQ(h[1], 0x2e66);
  EXPECT_EQ(h[0], 0);
  EXPECT_EQ(load_f32(h, DType::f16, 1), 0x1.998p-4f);
  store_f32(h, DType::bf16, 0, 0.1f);
  EXPECT_EQ(h[0], 0x3dcd);
  EXPECT_EQ(load_f32(h, DType::bf16, 0), 0x1.9ap-4f);
  EXPECT_STREQ(name_of(DType::f32), "float32");
  EXPECT_STREQ(name_of(DType::f16), "float16");
  EXPECT_STREQ(name_of(DType::bf16), "bfloat16");
}

}  // namespace
}  // namespace higgs
