// Float weights -> stored layout and back (arXiv 2411.17525, algorithm 1).
#pragma once

#include <cstdint>

#include "higgs/packed_format.h"
#include "higgs/tensor_view.h"

namespace higgs {

struct QuantizeResult {
  double error = 0;   // sum of (rotated weight - its rounded value)^2; in the column-scaled space if there is one
  double energy = 0;  // sum of (rotated weight)^2
  [[nodiscard]] double t2() const noexcept { return energy > 0 ? error / energy : 0.0; }
};

// Rotates every row of w (times column_scale), divides each scale group by its scale, rounds every run of p values to
// the nearest grid point and packs the indices. The scale starts as the root mean square of the group and is then
// replaced by the least-squares scale for the rounded points (see FORMAT.md). Nearest is exact up to fp32 rounding of
// the score |g|^2 / 2 - x.g; ties go to the lower index. With a trellis grid the points of a run are those of the best
// stream that a tail-biting Viterbi search finds. The result does not depend on the instruction set or threads.
//   w            [n, k] fp32, fp16 or bf16, finite (else Error(invalid_argument) naming the first bad element)
//   column_scale fp16 [k], positive and finite, or null
//   indices      out, format.index_bytes() bytes;  scales: out, fp16 [n, format.row_groups()]
QuantizeResult quantize(ConstMatrixView w, const LayerFormat& format, const std::uint16_t* column_scale,
                        std::uint8_t* indices, std::uint16_t* scales);

// W^ [n, k] in the original space, any dtype. Bit-identical on every instruction set and on the GPU.
void dequantize(const PackedView& packed, MatrixView out);

// The same before the inverse rotation: scale * point, fp32 or rounded to out.dtype. y = rotate(x * d) @ this^T.
void dequantize_rotated(const PackedView& packed, MatrixView out);

}  // namespace higgs
