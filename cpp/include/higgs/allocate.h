// Which grid for which layer: the linearity theorem, loss(quantized) ~ loss(original) + sum_l alpha_l t2_l (arXiv
// 2411.17525, section 5), makes the best allocation under a budget a multiple-choice knapsack.
#pragma once

#include <cstdint>
#include <vector>

namespace higgs {

// One way to store a layer: what it costs (bits, bytes, nanoseconds: any unit, if it is the budget's) and the loss
// increase it is predicted to cause, alpha * t2.
struct Choice {
  std::int64_t cost = 0;
  double loss = 0;
};

inline constexpr int kFree = -1;

struct AllocationProblem {
  std::vector<std::vector<Choice>> items;  // the choices of every layer, in any order
  std::vector<int> group;  // items with the same number take the same choice; empty: every item is on its own
  std::vector<int> fixed;  // the choice that an item has to take, or kFree; empty: all are free
  std::int64_t budget = 0;
  std::int64_t max_states = std::int64_t{1} << 25;  // made by the search before it gives up: about a second
};

struct Allocation {
  std::vector<int> choice;  // of every item
  std::int64_t cost = 0;    // exact, never more than the budget
  double loss = 0;
  double gap = 0;  // no allocation within the budget has a loss below loss - gap; 0: the optimum (up to fp64 rounding)
};

// Minimizes the sum of losses over all allocations whose cost is within the budget. Costs are integers throughout.
//
// Exact dynamic programming over (cost, loss) around the solution of the linear relaxation: items enter in the order in
// which a change of them can pay, of states only those stay that no other beats in both cost and loss and whose bound
// (Lagrange, with the best exchange rate of the items still to come) is below the best allocation found. If more than
// max_states states would be made, the best allocation so far is returned with the gap that the bounds prove.
//
// Throws Error(invalid_argument) for no choices, a negative cost, a loss that is not finite, sums beyond 2^62, groups
// of items that have different numbers of choices or are fixed differently, and a budget below the cheapest allocation
// (naming the costs of the cheapest and the dearest one).
[[nodiscard]] Allocation allocate(const AllocationProblem& problem);

}  // namespace higgs
