// Where a kernel finds the slices and scales of a row tile: what it needs of TiledFormat.
#pragma once

#include "higgs/cuda/tiled_format.h"

namespace higgs::cuda {

struct SliceParams {
  int scale_groups = 0;  // of a row
  int slices = 0;
  int units_per_slice = 0;
  int last_units = 0;
  int slice_bytes = 0;
  int tile_bytes = 0;
};

inline SliceParams slice_params(const TiledFormat& t) {
  return {.scale_groups = static_cast<int>(t.row_groups),
          .slices = t.slices,
          .units_per_slice = t.units_per_slice,
          .last_units = t.last_units,
          .slice_bytes = static_cast<int>(t.slice_bytes),
          .tile_bytes = static_cast<int>(t.tile_bytes)};
}

}  // namespace higgs::cuda
