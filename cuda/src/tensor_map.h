// Tensor maps for the bulk copies of sm_90.
#pragma once

#include <cstdint>

#include "higgs/numeric.h"

namespace higgs::cuda {

// A CUtensorMap.
struct alignas(64) TensorMap {
  std::uint64_t words[16] = {};
};

// Describes y[m, n], f16 or bf16, in boxes of 64 columns by `rows` (at most 256) rows, whose rows of 128 bytes are
// swizzled in shared memory. False where a map cannot describe it, or the driver knows none.
[[nodiscard]] bool map_output(TensorMap& map, void* y, DType dtype, std::int64_t m, std::int64_t n, int rows);

}  // namespace higgs::cuda
