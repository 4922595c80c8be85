// The inner loops every instruction set provides. Arguments are checked by the callers.
#pragma once

#include <cstdint>

#include "higgs/hadamard.h"
#include "higgs/isa.h"
#include "higgs/packed_format.h"
#include "nearest.h"
#include "trellis.h"

namespace higgs::detail {

// Columns are handled in chunks of 64 indices = 64 * p columns, or what is left of a scale group, a multiple of 64
// columns. Inside a chunk of n indices x and decoded weights are in "decode order", the one in which look-ups yield
// them: column order where a look-up fetches a whole point, component-major (index i, component c at c * n + i) where
// one instruction looks up many indices in the table of one component. Trellis grids by hash are handled by runs, in
// column order. Of additive ones what a scale group and a group of runs have in common is taken at once, run after run;
// weights are decoded as integers, and x is multiplied by kAdditiveStep, which is exact.
inline constexpr int kChunk = 64;

struct Kernels {
  // Decode order is component-major for grids of up to 2^this many table_points.
  int component_major_bits;
  int vector_lanes;  // floats of a vector

  // The orthonormal transform of `count` consecutive blocks (hadamard.h), in place.
  void (*fwht)(float* data, std::int64_t count, int block);

  // Indices of the nearest points g to values[0, count) * inverse_scale, and the two sums the least-squares scale
  // needs: sum v g and sum g g, in the summation order of FORMAT.md. count is a multiple of 64.
  void (*nearest)(const NearestTable& table, const float* values, std::int64_t count, float inverse_scale,
                  std::uint16_t* indices, double* vg, double* gg);

  // sum a b in the summation order of FORMAT.md. count is a multiple of 64.
  double (*sum_products)(const float* a, const float* b, std::int64_t count);

  // Finds the streams of kTrellisRuns runs of `columns` values at once (FORMAT.md, "Trellis grids"): their indices
  // [columns / p] and points [columns]. table is made for vector_lanes, costs is scratch of trellis_costs() floats.
  void (*encode_runs)(const TrellisTable& table, const float* const* values, int columns, float* costs,
                      std::uint16_t* const* indices, float* const* points);

  // y[t * y_stride + i] = sum over groups of scale * (sum over the group of x * point), rows [begin, end) of w, m rows
  // t of x in decode order, m <= kFewRows. A row of x has the same bits in any number.
  void (*dot_rows)(const PackedView& w, const float* x, std::int64_t m, std::int64_t begin, std::int64_t end, float* y,
                   std::int64_t y_stride);

  // The same for any m, decoding each row once: y[t * y_stride + i - begin], end - begin <= kTileRows. scratch holds
  // kTileRows * group floats. The same bits as dot_rows.
  void (*dot_tile)(const PackedView& w, const float* x, std::int64_t m, std::int64_t begin, std::int64_t end,
                   float* scratch, float* y, std::int64_t y_stride);
};
inline constexpr int kFewRows = 4;
inline constexpr int kTileRows = 16;

[[nodiscard]] const Kernels& kernels() noexcept;  // of current_isa()

// Here, not in the loops: no library function may be instantiated with a newer CPU's instructions.
[[noreturn]] void no_decoder(const Grid& grid);

extern const Kernels kPortableKernels;
#ifdef HIGGS_X86
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace higgs::detail
