#include "higgs/isa.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "helpers.h"

namespace higgs {
namespace {

TEST(Isa, StartsWithTheFastestSupportedOne) {
  const std::vector<Isa> list = supported_isas();
  ASSERT_FALSE(list.empty());
  EXPECT_EQ(list.front(), Isa::portable);
  EXPECT_TRUE(std::is_sorted(list.begin(), list.end()));
  EXPECT_EQ(current_isa(), list.back());
}

TEST(Isa, SetChangesTheCurrentOne) {
  for (const Isa isa : supported_isas()) {
    const test::IsaGuard guard(isa);
    EXPECT_EQ(current_isa(), isa);
  }
}

TEST(Isa, UnsupportedOneNamesTheSupportedOnes) {
  const std::vector<Isa> list = supported_isas();
  const Isa before = current_isa();
  int refused = 0;
  // A value that no CPU has stands for the case that this one has everything.
  for (const Isa isa : {Isa::avx2, Isa::avx512, static_cast<Isa>(99)}) {
    if (std::find(list.begin(), list.end(), isa) != list.end()) continue;
    test::expect_error(ErrorCode::unsupported, {"portable", name_of(isa)}, [&] { set_isa(isa); });
    ++refused;
  }
  EXPECT_GE(refused, 1);
  EXPECT_EQ(current_isa(), before);
}

TEST(Isa, Names) {
  EXPECT_STREQ(name_of(Isa::portable), "portable");
  EXPECT_STREQ(name_of(Isa::avx2), "avx2");
  EXPECT_STREQ(name_of(Isa::avx512), "avx512");
}

}  // namespace
}  // namespace higgs
