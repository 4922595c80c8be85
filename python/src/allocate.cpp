// The allocator for Python.
#include "higgs/allocate.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>
#include <vector>

namespace py = pybind11;

void bind_allocate(py::module_& m) {
  py::class_<higgs::Allocation>(m, "Allocation", "A choice for every item, with its cost, loss and proven gap.")
      .def_readonly("choice", &higgs::Allocation::choice)
      .def_readonly("cost", &higgs::Allocation::cost)
      .def_readonly("loss", &higgs::Allocation::loss)
      .def_readonly("gap", &higgs::Allocation::gap);
  m.def(
      "allocate",
      [](const std::vector<std::vector<std::pair<std::int64_t, double>>>& items, std::int64_t budget,
         std::vector<int> group, std::vector<int> fixed, std::int64_t max_states) {
        higgs::AllocationProblem problem;
        for (const auto& choices : items) {
          std::vector<higgs::Choice>& item = problem.items.emplace_back();
          for (const auto& [cost, loss] : choices) item.push_back({cost, loss});
        }
        problem.group = std::move(group);
        problem.fixed = std::move(fixed);
        problem.budget = budget;
        problem.max_states = max_states;
        const py::gil_scoped_release release;
        return higgs::allocate(problem);
      },
      py::arg("items"), py::arg("budget"), py::kw_only(), py::arg("group") = std::vector<int>{},
      py::arg("fixed") = std::vector<int>{}, py::arg("max_states") = higgs::AllocationProblem{}.max_states,
      "items: for every layer its choices as (cost, loss); see higgs/allocate.h");
}
