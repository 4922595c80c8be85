#include "higgs/allocate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "helpers.h"

namespace higgs {
namespace {

using test::expect_error;
using test::Rng;

std::int64_t cost_of(const AllocationProblem& p, const std::vector<int>& choice) {
  std::int64_t cost = 0;
  for (std::size_t i = 0; i < choice.size(); ++i) cost += p.items[i][static_cast<std::size_t>(choice[i])].cost;
  return cost;
}

double loss_of(const AllocationProblem& p, const std::vector<int>& choice) {
  double loss = 0;
  for (std::size_t i = 0; i < choice.size(); ++i) loss += p.items[i][static_cast<std::size_t>(choice[i])].loss;
  return loss;
}

bool allowed(const AllocationProblem& p, const std::vector<int>& choice) {
  for (std::size_t i = 0; i < choice.size(); ++i) {
    if (!p.fixed.empty() && p.fixed[i] != kFree && p.fixed[i] != choice[i]) return false;
    for (std::size_t j = 0; j < i && !p.group.empty(); ++j) {
      if (p.group[i] == p.group[j] && choice[i] != choice[j]) return false;
    }
  }
  return cost_of(p, choice) <= p.budget;
}

// The least loss by trying everything; infinity if nothing fits.
double brute_force(const AllocationProblem& p) {
  std::vector<int> choice(p.items.size(), 0);
  double best = std::numeric_limits<double>::infinity();
  for (;;) {
    if (allowed(p, choice)) best = std::min(best, loss_of(p, choice));
    std::size_t i = 0;
    while (i < choice.size() && ++choice[i] == static_cast<int>(p.items[i].size())) choice[i++] = 0;
    if (i == choice.size()) return best;
  }
}

enum class Kind { lattice, any_cost, proportional, noise };
constexpr Kind kKinds[] = {Kind::lattice, Kind::any_cost, Kind::proportional, Kind::noise};

// Few shapes and rates in steps of 1/2 (as for grids); arbitrary costs; all layers equally sensitive per weight; costs
// and losses that have nothing to do with each other, negative losses and equal choices among them.
AllocationProblem random_problem(Rng& rng, Kind kind, int items, int choices) {
  std::uniform_real_distribution<double> unit(0.0, 1.0);
  AllocationProblem p;
  for (int i = 0; i < items; ++i) {
    const auto weights = static_cast<std::int64_t>(kind == Kind::lattice ? 64 << rng() % 3 : 50 + rng() % 200);
    const double alpha = kind == Kind::proportional ? static_cast<double>(weights) : std::exp(4 * unit(rng) - 2);
    std::vector<Choice>& item = p.items.emplace_back();
    for (int j = 0; j < choices; ++j) {
      const std::int64_t cost = weights * (3 + j) / 2;
      const double loss = alpha * std::pow(4.0, -(3 + j) / 2.0);
      if (kind == Kind::noise) {
        item.push_back({static_cast<std::int64_t>(rng() % 20), std::floor(10 * unit(rng)) - 2});
      } else {
        item.push_back({cost, loss});
      }
    }
  }
  return p;
}

std::int64_t cheapest(const AllocationProblem& p) {
  std::int64_t cost = 0;
  for (const auto& item : p.items) cost += std::ranges::min(item, {}, &Choice::cost).cost;
  return cost;
}

std::int64_t dearest(const AllocationProblem& p) {
  std::int64_t cost = 0;
  for (const auto& item : p.items) cost += std::ranges::max(item, {}, &Choice::cost).cost;
  return cost;
}

// Every promise of an Allocation.
void expect_consistent(const AllocationProblem& p, const Allocation& a) {
  ASSERT_EQ(a.choice.size(), p.items.size());
  EXPECT_TRUE(allowed(p, a.choice));
  EXPECT_EQ(a.cost, cost_of(p, a.choice));
  EXPECT_LE(a.cost, p.budget);
  EXPECT_DOUBLE_EQ(a.loss, loss_of(p, a.choice));
  EXPECT_GE(a.gap, 0.0);
}

TEST(Allocate, EqualsBruteForce) {
  Rng rng(1);
  for (const Kind kind : kKinds) {
    for (int trial = 0; trial < 150; ++trial) {
      AllocationProblem p = random_problem(rng, kind, 1 + static_cast<int>(rng() % 6), 1 + static_cast<int>(rng() % 4));
      const std::int64_t low = cheapest(p);
      p.budget = low + static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(dearest(p) - low + 2));
      const Allocation a = allocate(p);
      expect_consistent(p, a);
      EXPECT_EQ(a.gap, 0.0);
      EXPECT_NEAR(a.loss, brute_force(p), 1e-12 * std::abs(a.loss)) << static_cast<int>(kind) << " " << trial;
    }
  }
}

TEST(Allocate, EqualsBruteForceWithGroupsAndFixedItems) {
  Rng rng(2);
  int compared = 0;
  for (int trial = 0; trial < 400; ++trial) {
    AllocationProblem p = random_problem(rng, kKinds[trial % 4], 6, 3);
    for (std::size_t i = 0; i < p.items.size(); ++i) {
      p.group.push_back(static_cast<int>(rng() % 4));
      p.fixed.push_back(i == 2 ? static_cast<int>(rng() % 3) : kFree);
    }
    p.budget = dearest(p) - static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(dearest(p) - cheapest(p) + 1));
    const double best = brute_force(p);
    if (std::isinf(best)) {
      EXPECT_THROW((void)allocate(p), Error);
      continue;
    }
    ++compared;
    const Allocation a = allocate(p);
    expect_consistent(p, a);
    EXPECT_NEAR(a.loss, best, 1e-12 * std::abs(best));
  }
  EXPECT_GT(compared, 200);
}

TEST(Allocate, LossFallsAsTheBudgetRises) {
  Rng rng(3);
  for (const Kind kind : kKinds) {
    AllocationProblem p = random_problem(rng, kind, 30, 8);
    double before = std::numeric_limits<double>::infinity();
    const std::int64_t low = cheapest(p);
    const std::int64_t step = std::max<std::int64_t>(1, (dearest(p) - low) / 100);
    for (p.budget = low; p.budget <= dearest(p) + step; p.budget += step) {
      const Allocation a = allocate(p);
      expect_consistent(p, a);
      EXPECT_EQ(a.gap, 0.0);
      EXPECT_LE(a.loss, before + 1e-12 * std::abs(a.loss));
      before = a.loss;
    }
  }
}

TEST(Allocate, OrderOfItemsDoesNotMatter) {
  Rng rng(4);
  for (int trial = 0; trial < 40; ++trial) {
    AllocationProblem p = random_problem(rng, kKinds[trial % 4], 40, 6);
    p.budget = (cheapest(p) + dearest(p)) / 2;
    for (int i = 0; i < 40; ++i) p.group.push_back(i / 3);
    const Allocation a = allocate(p);
    std::vector<std::size_t> order(p.items.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::ranges::shuffle(order, rng);
    AllocationProblem q;
    q.budget = p.budget;
    for (const std::size_t i : order) {
      q.items.push_back(p.items[i]);
      q.group.push_back(100 - p.group[i]);
    }
    EXPECT_NEAR(allocate(q).loss, a.loss, 1e-11 * std::abs(a.loss));
  }
}

TEST(Allocate, TheGapOfAnUnfinishedSearchHolds) {
  Rng rng(5);
  int unfinished = 0;
  for (int trial = 0; trial < 300; ++trial) {
    AllocationProblem p = random_problem(rng, kKinds[trial % 4], 12, 4);
    p.budget = (2 * cheapest(p) + dearest(p)) / 3;
    const double best = allocate(p).loss;
    p.max_states = static_cast<std::int64_t>(rng() % 60);
    const Allocation a = allocate(p);
    expect_consistent(p, a);
    unfinished += a.gap > 0 ? 1 : 0;
    EXPECT_GE(best, a.loss - a.gap - 1e-12 * std::abs(best));
    EXPECT_TRUE(a.gap > 0 || std::abs(a.loss - best) <= 1e-12 * std::abs(best));
  }
  EXPECT_GT(unfinished, 50);
}

// Sizes of real models, solved to the end.
TEST(Allocate, ManyLayersAreSolvedExactly) {
  Rng rng(6);
  for (const int layers : {224, 20000}) {
    AllocationProblem p = random_problem(rng, Kind::lattice, layers, 15);
    p.budget = (3 * cheapest(p) + dearest(p)) / 4 + 7;
    const Allocation a = allocate(p);
    expect_consistent(p, a);
    EXPECT_EQ(a.gap, 0.0);
  }
}

TEST(Allocate, BudgetsAtTheEnds) {
  AllocationProblem p;
  p.items = {{{10, 1.0}, {20, 0.5}}, {{10, 8.0}, {20, 2.0}, {20, 3.0}, {30, 2.0}}};
  p.budget = 20;
  EXPECT_EQ(allocate(p).choice, (std::vector<int>{0, 0}));
  p.budget = 30;
  EXPECT_EQ(allocate(p).choice, (std::vector<int>{0, 1}));
  p.budget = std::numeric_limits<std::int64_t>::max();
  EXPECT_EQ(allocate(p).choice, (std::vector<int>{1, 1}));  // the dearest choice is no better
  EXPECT_EQ(allocate(p).cost, 40);
  EXPECT_EQ(allocate(AllocationProblem{}).cost, 0);
}

TEST(Allocate, IllegalProblemsAreNamed) {
  const auto refused = [](const std::vector<std::string>& words, const auto& spoil) {
    AllocationProblem p;
    p.items = {{{10, 1.0}, {20, 0.5}}, {{12, 8.0}, {24, 2.0}}};
    p.budget = 40;
    spoil(p);
    expect_error(ErrorCode::invalid_argument, words, [&] { (void)allocate(p); });
  };
  using P = AllocationProblem;
  refused({"budget 21", "cheapest", "22", "44"}, [](P& p) { p.budget = 21; });
  refused({"budget -5"}, [](P& p) { p.budget = -5; });
  refused({"budget 31", "32"}, [](P& p) { p.fixed = {1, kFree}, p.budget = 31; });
  refused({"item 1", "no choices"}, [](P& p) { p.items[1].clear(); });
  refused({"item 0", "cost -1"}, [](P& p) { p.items[0][1].cost = -1; });
  refused({"item 0", "nan"}, [](P& p) { p.items[0][0].loss = std::nan(""); });
  refused({"2^62"}, [](P& p) { p.items[0][0].cost = p.items[1][0].cost = std::int64_t{3} << 60; });
  refused({"group has 1 entries", "2 items"}, [](P& p) { p.group = {0}; });
  refused({"fixed has 3 entries"}, [](P& p) { p.fixed = {0, 0, 0}; });
  refused({"item 1", "fixed to choice 2", "0 to 1"}, [](P& p) { p.fixed = {0, 2}; });
  refused({"fixed to choice 1", "to 0"}, [](P& p) { p.fixed = {0, 1}, p.group = {5, 5}; });
  refused({"items 0 and 1 of group 5", "2 and 1"}, [](P& p) { p.items[1].pop_back(), p.group = {5, 5}; });
}

}  // namespace
}  // namespace higgs
