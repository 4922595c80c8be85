// Accumulators to y, one fragment (16 rows x 8 tokens) at a time.
#pragma once

#include "async_copy.cuh"
#include "gemm_schedule.cuh"
#include "numeric.cuh"
#include "rotate_x.cuh"

namespace higgs::cuda {

// The biases of rows g and g + 8 of the row tile that begins with row `first`.
template <typename T>
__device__ __forceinline__ float2 row_biases(const GemmPart& part, int first, int lane) {
  float2 out = {};
  if (part.bias != nullptr) {
    const int row = first + lane / 4;
    const T* b = static_cast<const T*>(part.bias) + row;
    if (row < part.n) out.x = to_float(b[0]);
    if (row + 8 < part.n) out.y = to_float(b[8]);
  }
  return out;
}

// Where a warp's part of a tile goes.
template <typename Config>
struct TileOutput {
  using T = typename Config::T;
  const GemmPart& part;
  int m;
  int row_tile;  // the first one of the warp
  int token;
  int lane;

  __device__ __forceinline__ TileOutput(const GemmParams& p, const TilePlace& place, int warp, int lane)
      : part(p.parts[place.part]),
        m(p.m),
        row_tile(place.row_tile + warp * Config::kWarpTiles),
        token(place.token),
        lane(lane) {}

  // Those of row tile `tile` of the warp.
  __device__ __forceinline__ float2 bias(int tile) const {
    return row_biases<T>(part, (row_tile + tile) * kTileRows, lane);
  }
  // Fragment `i` of the accumulators: rows g and g + 8 of a row tile, tokens 2 t and 2 t + 1 of eight.
  __device__ __forceinline__ void store(int i, float4 v, float2 bias) const {
    const uint32_t upper = transposed(pack2<T>(v.x + bias.x, v.y + bias.x));  // token g, rows 2 t and 2 t + 1
    const uint32_t lower = transposed(pack2<T>(v.z + bias.y, v.w + bias.y));
    const int row = (row_tile + i / Config::kTileFragments) * kTileRows + lane % 4 * 2;
    const long long to = token + i % Config::kTileFragments * 8 + lane / 4;
    if (to >= m) return;
    uint16_t* y = static_cast<uint16_t*>(part.y) + to * part.n + row;
    store_pair(y, row, upper);
    store_pair(y + 8, row + 8, lower);
  }

 private:
  __device__ __forceinline__ void store_pair(uint16_t* y, int row, uint32_t v) const {
    if (part.n % 2 == 0) {  // both rows exist or none, and y is aligned
      if (row < part.n) *reinterpret_cast<uint32_t*>(y) = v;
    } else {
      if (row < part.n) y[0] = static_cast<uint16_t>(v);
      if (row + 1 < part.n) y[1] = static_cast<uint16_t>(v >> 16);
    }
  }
};

}  // namespace higgs::cuda
