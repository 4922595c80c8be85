// Grid points as a kernel argument: launchers need no device copy of the grids and stay CUDA-graph safe.
#pragma once

#include <cuda_fp16.h>

#include <bit>
#include <cstdint>

#include "higgs/grid.h"
#include "higgs/numeric.h"

namespace higgs::cuda {

// fp16 values of [n_points, p]; exact, as grid points are representable in fp16. Of a sign-symmetric grid the
// magnitudes: the other bits of an index, above value_bits, say which coordinates are negative.
template <int Capacity>
struct GridPoints {
  static constexpr int kCapacity = Capacity;
  int p = 0;
  int index_bits = 0;
  int value_bits = 0;  // of an index: they choose a point here
  alignas(16) std::uint16_t values[Capacity] = {};
};

template <int Capacity>
GridPoints<Capacity> make_points(const Grid& grid) {
  GridPoints<Capacity> out;
  out.p = grid.p;
  out.index_bits = grid.index_bits;
  out.value_bits = std::countr_zero(static_cast<unsigned>(grid.table_points()));
  for (int i = 0; i < grid.table_points() * grid.p; ++i) out.values[i] = f32_to_f16(grid.points[i]);
  return out;
}

// Value c of a point, from a table that holds `values`.
template <int Capacity>
__device__ __forceinline__ float point_value(const GridPoints<Capacity>& points, const std::uint16_t* table,
                                             std::uint32_t index, int c) {
  const std::uint32_t entry = index & ((1u << points.value_bits) - 1);
  const std::uint32_t negative = index >> points.value_bits >> c & 1;
  return __half2float(__ushort_as_half(table[entry * points.p + c] ^ negative << 15));
}

// Calls body(points) with the smaller of two argument sizes that fits (2 KB for up to 1024 values, else 16 KB).
template <typename Body>
void with_points(const Grid& grid, const Body& body) {
  constexpr int kSmall = 1024;
  constexpr int kLarge = 8192;
  if (grid.table_points() * grid.p <= kSmall) {
    body(make_points<kSmall>(grid));
  } else {
    body(make_points<kLarge>(grid));
  }
}

}  // namespace higgs::cuda
