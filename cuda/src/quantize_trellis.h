// quantize for trellis grids; the arguments have been checked.
#pragma once

#include <cstdint>

#include "higgs/cuda/device.h"
#include "higgs/grid.h"
#include "higgs/numeric.h"

namespace higgs::cuda {

struct QuantizeLayer;  // quantize_row.cuh

void quantize_trellis(const Grid& grid, int block, const QuantizeLayer& layer, std::int64_t n, const void* w,
                      DType w_dtype, Stream stream);

}  // namespace higgs::cuda
