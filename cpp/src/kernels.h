// The inner loops every instruction set provides. Arguments are checked by the callers.
#pragma once

#include <cstdint>

#include "higgs/hadamard.h"
#include "higgs/isa.h"
#include "higgs/packed_format.h"
#include "nearest.h"
#include "trellis.h"

namespace higgs::detail {

// Columns are handled in chunks of 64 indices = 64 * p columns, the last chunk of a scale group padded. Inside a chunk
// x and decoded weights are in "decode order", the one in which look-ups yield them: column order where a look-up
// fetches a whole point, component-major (index i, component c at c * 64 + i) where one instruction looks up many
// indices in the table of one component. Trellis grids are handled by runs, in column order.
inline constexpr int kChunk = 64;

struct DecodeGeometry {
  std::int64_t groups = 0;
  std::int64_t group_chunks = 0;       // chunks of a full group
  std::int64_t last_group_chunks = 0;  // of the last one
  std::int64_t arranged_cols = 0;      // floats of one row of x, or of decoded weights, in decode order
};
[[nodiscard]] DecodeGeometry decode_geometry(const LayerFormat& format);

struct Kernels {
  // Decode order is component-major for grids of up to 2^this many table_points.
  int component_major_bits;

  // The orthonormal transform of `count` consecutive blocks (hadamard.h), in place.
  void (*fwht)(float* data, std::int64_t count, int block);

  // Indices of the nearest points g to values[0, count) * inverse_scale, and the two sums the least-squares scale
  // needs: sum v g and sum g g, in the summation order of FORMAT.md. count is a multiple of 64.
  void (*nearest)(const NearestTable& table, const float* values, std::int64_t count, float inverse_scale,
                  std::uint16_t* indices, double* vg, double* gg);

  // sum a b in the summation order of FORMAT.md. count is a multiple of 64.
  double (*sum_products)(const float* a, const float* b, std::int64_t count);

  // Finds the streams of kTrellisRuns runs of `columns` values at once (FORMAT.md, "Trellis grids"): their indices
  // [columns / p] and points [columns]. costs is scratch of trellis_costs() floats.
  void (*encode_runs)(const TrellisTable& table, const float* const* values, int columns, float* costs,
                      std::uint16_t* const* indices, float* const* points);

  // y[i] = sum over groups of scale * (sum over the group of x * point), rows [begin, end) of w, one row of x in decode
  // order.
  void (*dot_rows)(const PackedView& w, const float* x, std::int64_t begin, std::int64_t end, float* y);

  // The same for m rows of x at once: y[r * y_stride + i - begin], end - begin <= kTileRows. scratch holds
  // kTileRows * max(group_chunks) * 64 * p floats. Bitwise equal to dot_rows on each row of x.
  void (*dot_tile)(const PackedView& w, const float* x, std::int64_t m, std::int64_t begin, std::int64_t end,
                   float* scratch, float* y, std::int64_t y_stride);
};
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
