#include "higgs/allocate.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <map>
#include <numeric>
#include <string>
#include <utility>

#include "higgs/error.h"

namespace higgs {
namespace {

constexpr std::int64_t kMaxCost = std::int64_t{1} << 62;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

[[noreturn]] void fail(const std::string& message) { throw Error(ErrorCode::invalid_argument, "allocate: " + message); }

// A choice of a class; by rising cost and falling loss within it.
struct Option {
  std::int64_t cost;
  double loss;
  int choice;
};

// Items that share one choice, with the options that no other option of it beats.
struct Class {
  std::vector<int> items;
  std::vector<Option> options;
};

void check(const AllocationProblem& p) {
  const auto check_size = [&](const std::vector<int>& v, const char* name) {
    if (!v.empty() && v.size() != p.items.size()) {
      fail(std::string(name) + " has " + std::to_string(v.size()) + " entries, expected one for each of the " +
           std::to_string(p.items.size()) + " items, or none");
    }
  };
  check_size(p.group, "group");
  check_size(p.fixed, "fixed");
  std::int64_t total = 0;
  for (std::size_t i = 0; i < p.items.size(); ++i) {
    const std::string item = "item " + std::to_string(i);
    if (p.items[i].empty()) fail(item + " has no choices");
    std::int64_t dearest = 0;
    for (const Choice& c : p.items[i]) {
      if (c.cost < 0) fail(item + " has cost " + std::to_string(c.cost) + "; costs are at least 0");
      if (!std::isfinite(c.loss)) fail(item + " has loss " + std::to_string(c.loss) + "; losses are finite");
      dearest = std::max(dearest, c.cost);
    }
    if (dearest > kMaxCost - total) fail("the costs add up to more than 2^62");
    total += dearest;
    const int fixed = p.fixed.empty() ? kFree : p.fixed[i];
    if (fixed != kFree && (fixed < 0 || fixed >= static_cast<int>(p.items[i].size()))) {
      fail(item + " is fixed to choice " + std::to_string(fixed) + "; use 0 to " +
           std::to_string(p.items[i].size() - 1) + ", or -1 to leave it free");
    }
  }
}

// The choice that the items of a class are fixed to, or kFree.
int fixed_choice(const AllocationProblem& p, const std::vector<int>& items) {
  int fixed = kFree;
  for (const int i : items) {
    const int wanted = p.fixed.empty() ? kFree : p.fixed[static_cast<std::size_t>(i)];
    if (wanted == kFree) continue;
    if (fixed != kFree && fixed != wanted) {
      fail("item " + std::to_string(i) + " is fixed to choice " + std::to_string(wanted) +
           ", another item of its group to " + std::to_string(fixed));
    }
    fixed = wanted;
  }
  return fixed;
}

// Sorts and keeps the options that are cheaper or better than every other.
void drop_dominated(std::vector<Option>& options) {
  std::ranges::sort(options, [](const Option& a, const Option& b) {
    if (a.cost != b.cost) return a.cost < b.cost;
    return a.loss != b.loss ? a.loss < b.loss : a.choice < b.choice;
  });
  double best = kInfinity;
  std::erase_if(options, [&](const Option& o) {
    const bool dominated = !(o.loss < best);
    best = std::min(best, o.loss);
    return dominated;
  });
}

std::vector<Class> make_classes(const AllocationProblem& p) {
  std::map<int, std::vector<int>> groups;
  for (int i = 0; i < static_cast<int>(p.items.size()); ++i) {
    groups[p.group.empty() ? i : p.group[static_cast<std::size_t>(i)]].push_back(i);
  }
  std::vector<Class> classes;
  for (auto& [number, items] : groups) {
    const std::size_t count = p.items[static_cast<std::size_t>(items.front())].size();
    const int fixed = fixed_choice(p, items);
    std::vector<Option> options;
    for (std::size_t c = 0; c < count; ++c) options.push_back({0, 0.0, static_cast<int>(c)});
    for (const int i : items) {
      const std::vector<Choice>& choices = p.items[static_cast<std::size_t>(i)];
      if (choices.size() != count) {
        fail("items " + std::to_string(items.front()) + " and " + std::to_string(i) + " of group " +
             std::to_string(number) + " have " + std::to_string(count) + " and " + std::to_string(choices.size()) +
             " choices; they share one, so they need as many");
      }
      for (std::size_t c = 0; c < count; ++c) {
        options[c].cost += choices[c].cost;
        options[c].loss += choices[c].loss;
      }
    }
    if (fixed != kFree) options = {options[static_cast<std::size_t>(fixed)]};
    drop_dominated(options);
    classes.push_back({std::move(items), std::move(options)});
  }
  return classes;
}

// Replaces costs by multiples of their greatest common divisor above the cheapest option of each class; returns what is
// left of the budget in the same unit.
std::int64_t scale_costs(std::vector<Class>& classes, std::int64_t budget) {
  std::int64_t cheapest = 0;
  std::int64_t dearest = 0;
  std::int64_t unit = 0;
  for (const Class& c : classes) {
    cheapest += c.options.front().cost;
    dearest += c.options.back().cost;
    for (const Option& o : c.options) unit = std::gcd(unit, o.cost - c.options.front().cost);
  }
  if (budget < cheapest) {
    fail("budget " + std::to_string(budget) + " is too small; the cheapest allocation costs " +
         std::to_string(cheapest) + ", the dearest " + std::to_string(dearest));
  }
  unit = std::max<std::int64_t>(unit, 1);
  for (Class& c : classes) {
    const std::int64_t base = c.options.front().cost;
    for (Option& o : c.options) o.cost = (o.cost - base) / unit;
  }
  return (budget - cheapest) / unit;
}

// What a class saves in loss per unit of cost when it goes from one option to the next of its convex hull.
struct Step {
  double rate;
  int owner;
  int to;
};

// All steps, those that pay most first; a class's own come in order because its hull is convex.
std::vector<Step> hull_steps(const std::vector<Class>& classes) {
  std::vector<Step> steps;
  for (int i = 0; i < static_cast<int>(classes.size()); ++i) {
    const std::vector<Option>& options = classes[static_cast<std::size_t>(i)].options;
    for (std::size_t at = 0; at + 1 < options.size();) {
      std::size_t to = at;
      double rate = -kInfinity;
      for (std::size_t o = at + 1; o < options.size(); ++o) {
        const double r = (options[at].loss - options[o].loss) / static_cast<double>(options[o].cost - options[at].cost);
        if (r >= rate) {
          rate = r;
          to = o;
        }
      }
      steps.push_back({rate, i, static_cast<int>(to)});
      at = to;
    }
  }
  std::ranges::stable_sort(steps, [](const Step& a, const Step& b) { return a.rate > b.rate; });
  return steps;
}

// The option of every class, and the room that this leaves in the budget.
struct Selection {
  std::vector<int> option;
  std::int64_t room;
};

// Cost and loss of an option beyond those of the class's start.
struct Change {
  std::int64_t cost;
  double loss;
};

class Search {
 public:
  Search(std::vector<Class> classes, std::int64_t room, std::int64_t max_states)
      : classes_(std::move(classes)), max_states_(max_states), start_{std::vector<int>(classes_.size(), 0), room} {}

  // The option of every class; sets gap.
  std::vector<int> run(double& gap) {
    const Selection greedy = relax();
    best_ = greedy_loss(greedy);
    order_classes();
    gap = explore();
    return best_node_ < 0 ? greedy.option : options_of(best_node_);
  }

 private:
  // A set of changes to the start: their cost and loss, the latest in the tree of nodes; `option` is that of the class
  // being added, -1 for none.
  struct State {
    std::int64_t cost;
    double loss;
    int node;
    int option;
  };
  struct Node {
    int parent;
    int owner;
    int option;
  };
  // The best rate at which any of the classes still to come turns cost into loss, and the least loss per cost saved.
  struct Rates {
    double up = 0;
    double down = kInfinity;
  };

  [[nodiscard]] const Class& class_at(int i) const { return classes_[static_cast<std::size_t>(i)]; }

  [[nodiscard]] Change change(int owner, int option) const {
    const std::vector<Option>& options = class_at(owner).options;
    const Option& from = options[static_cast<std::size_t>(start_.option[static_cast<std::size_t>(owner)])];
    const Option& to = options[static_cast<std::size_t>(option)];
    return {to.cost - from.cost, to.loss - from.loss};
  }

  // Solves the linear relaxation up to the step that no longer fits: the start. Going on with the steps that do fit
  // gives a first allocation, which is returned.
  Selection relax() {
    Selection now = start_;
    bool fits = true;
    for (const Step& step : hull_steps(classes_)) {
      int& at = now.option[static_cast<std::size_t>(step.owner)];
      const std::vector<Option>& options = class_at(step.owner).options;
      const std::int64_t cost =
          options[static_cast<std::size_t>(step.to)].cost - options[static_cast<std::size_t>(at)].cost;
      if (cost <= now.room) {
        at = step.to;
        now.room -= cost;
      } else if (fits) {
        fits = false;
        start_ = now;
      }
    }
    if (fits) start_ = now;
    return now;
  }

  [[nodiscard]] double greedy_loss(const Selection& greedy) {
    double loss = 0;
    double magnitude = 0;
    for (int i = 0; i < static_cast<int>(classes_.size()); ++i) {
      const int option = greedy.option[static_cast<std::size_t>(i)];
      loss += change(i, option).loss;
      magnitude += std::abs(class_at(i).options[static_cast<std::size_t>(option)].loss);
    }
    rounding_ = 1e-13 * magnitude;
    return loss;
  }

  [[nodiscard]] Rates rates(int owner) const {
    Rates r;
    for (int o = 0; o < static_cast<int>(class_at(owner).options.size()); ++o) {
      const Change c = change(owner, o);
      const double rate = -c.loss / static_cast<double>(c.cost);
      if (c.cost > 0) r.up = std::max(r.up, rate);
      if (c.cost < 0) r.down = std::min(r.down, rate);
    }
    return r;
  }

  // Classes whose change costs least against the relaxation's exchange rate first; rest_[i] bounds those from i on.
  void order_classes() {
    std::vector<Rates> own;
    for (int i = 0; i < static_cast<int>(classes_.size()); ++i) own.push_back(rates(i));
    double rate = 0;
    for (const Rates& r : own) rate = std::max(rate, r.up);
    const auto closeness = [&](int i) {
      const Rates& r = own[static_cast<std::size_t>(i)];
      return rate > 0 ? std::max(r.up / rate, rate / r.down) : 0.0;
    };
    order_.resize(classes_.size());
    std::iota(order_.begin(), order_.end(), 0);
    std::ranges::stable_sort(order_, [&](int a, int b) { return closeness(a) > closeness(b); });
    rest_.assign(classes_.size() + 1, Rates{});
    for (std::size_t i = classes_.size(); i-- > 0;) {
      const Rates& r = own[static_cast<std::size_t>(order_[i])];
      rest_[i] = {std::max(r.up, rest_[i + 1].up), std::min(r.down, rest_[i + 1].down)};
    }
  }

  // No completion of the state has a lower loss.
  [[nodiscard]] double bound(const State& s, const Rates& rest) const {
    const auto room = static_cast<double>(start_.room - s.cost);
    if (room >= 0) return s.loss - room * rest.up;
    return rest.down < kInfinity ? s.loss - room * rest.down : kInfinity;
  }

  // Returns the proven gap.
  double explore() {
    std::vector<State> states{{0, 0.0, -1, -1}};
    std::int64_t made = 0;
    for (std::size_t i = 0; i < order_.size() && !states.empty(); ++i) {
      const std::size_t options = class_at(order_[i]).options.size();
      made += static_cast<std::int64_t>(states.size() * options);
      if (made > max_states_) return gap_of(states, rest_[i]);
      add_class(order_[i], rest_[i + 1], states);
    }
    return 0;
  }

  [[nodiscard]] double gap_of(const std::vector<State>& states, const Rates& rest) const {
    double lowest = best_;
    for (const State& s : states) lowest = std::min(lowest, bound(s, rest));
    return best_ - lowest;
  }

  void add_class(int owner, const Rates& rest, std::vector<State>& states) {
    std::vector<State> shifted;
    std::vector<State> merged;
    const std::vector<State> before = states;
    for (int o = 0; o < static_cast<int>(class_at(owner).options.size()); ++o) {
      if (o == start_.option[static_cast<std::size_t>(owner)]) continue;
      const Change c = change(owner, o);
      shifted.clear();
      for (const State& s : before) {
        const State next{s.cost + c.cost, s.loss + c.loss, s.node, o};
        if (bound(next, rest) < best_ - rounding_) shifted.push_back(next);
      }
      merge(states, shifted, merged);
      states.swap(merged);
    }
    for (State& s : states) {
      if (s.option >= 0) {
        nodes_.push_back({s.node, owner, s.option});
        s = {s.cost, s.loss, static_cast<int>(nodes_.size()) - 1, -1};
      }
      if (s.cost <= start_.room && s.loss < best_) {
        best_ = s.loss;
        best_node_ = s.node;
      }
    }
    std::erase_if(states, [&](const State& s) { return !(bound(s, rest) < best_ - rounding_); });
  }

  // Both by rising cost and falling loss, and so the result.
  static void merge(const std::vector<State>& a, const std::vector<State>& b, std::vector<State>& out) {
    out.clear();
    double best = kInfinity;
    for (std::size_t i = 0, j = 0; i < a.size() || j < b.size();) {
      const bool from_a =
          j == b.size() ||
          (i < a.size() && (a[i].cost < b[j].cost || (a[i].cost == b[j].cost && a[i].loss <= b[j].loss)));
      const State& s = from_a ? a[i++] : b[j++];
      if (!(s.loss < best)) continue;
      best = s.loss;
      out.push_back(s);
    }
  }

  [[nodiscard]] std::vector<int> options_of(int node) const {
    std::vector<int> options = start_.option;
    for (int at = node; at >= 0; at = nodes_[static_cast<std::size_t>(at)].parent) {
      const Node& n = nodes_[static_cast<std::size_t>(at)];
      options[static_cast<std::size_t>(n.owner)] = n.option;
    }
    return options;
  }

  std::vector<Class> classes_;
  std::int64_t max_states_;
  Selection start_;
  std::vector<int> order_;
  std::vector<Rates> rest_;
  std::vector<Node> nodes_;
  double best_ = 0;  // loss beyond the start's of the best allocation so far: the greedy one until best_node_ >= 0
  int best_node_ = -1;
  double rounding_ = 0;
};

}  // namespace

Allocation allocate(const AllocationProblem& problem) {
  check(problem);
  std::vector<Class> classes = make_classes(problem);
  const std::int64_t room = scale_costs(classes, problem.budget);
  Allocation result;
  const std::vector<int> options = Search(classes, room, problem.max_states).run(result.gap);
  result.choice.assign(problem.items.size(), 0);
  for (std::size_t c = 0; c < classes.size(); ++c) {
    const Option& option = classes[c].options[static_cast<std::size_t>(options[c])];
    for (const int i : classes[c].items) result.choice[static_cast<std::size_t>(i)] = option.choice;
  }
  for (std::size_t i = 0; i < problem.items.size(); ++i) {
    const Choice& c = problem.items[i][static_cast<std::size_t>(result.choice[i])];
    result.cost += c.cost;
    result.loss += c.loss;
  }
  return result;
}

}  // namespace higgs
