// Slow, obvious float64 versions: the oracle of the tests.
#pragma once

#include <span>
#include <vector>

#include "higgs/packed_format.h"
#include "higgs/tensor_view.h"

namespace higgs::reference {

// W^ [n, k] in float64, rotation by an explicit Hadamard matrix.
[[nodiscard]] std::vector<double> dequantize(const PackedView& packed);

// y[m, n] = x @ W^^T (+ bias) in float64; bias: n doubles or empty.
[[nodiscard]] std::vector<double> matmul(ConstMatrixView x, const PackedView& w, std::span<const double> bias);

}  // namespace higgs::reference
