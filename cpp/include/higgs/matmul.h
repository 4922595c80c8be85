// y[m, n] = x[m, k] @ W^T (+ bias) on packed weights. W is never rebuilt: x is multiplied by d = sign / column_scale,
// rotated, and meets the grid points by table look-up inside the loop. The CPU reads the stored layout as it is: the
// look-up kernels unpack it as fast as any other order, so there is no second copy of the weights and no load-time
// work.
#pragma once

#include <cstdint>
#include <span>

#include "higgs/packed_format.h"
#include "higgs/tensor_view.h"

namespace higgs {

// x: [m, k]; y: [m, n] in x's dtype or fp32; bias: n values in y's dtype, or null. m = 0 is allowed. fp32 accumulation,
// deterministic: row i of y has the same bits whatever m and the number of threads.
void matmul(ConstMatrixView x, const PackedView& w, const void* bias, MatrixView y);

// The experts of a mixture: w holds offsets.size() matrices of n rows each, one below the other (w.format.n rows in
// all). Rows offsets[e - 1] .. offsets[e] - 1 of x (from 0 for e = 0) meet matrix e: offsets do not fall, the last one
// is x.rows. y: [x.rows, n]; a row has the bits that matmul gives it.
void grouped_matmul(ConstMatrixView x, std::span<const std::int32_t> offsets, const PackedView& w, MatrixView y);

}  // namespace higgs
