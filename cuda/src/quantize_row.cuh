// What the quantizers of all grids do with a row: one block per row, the row rotated in shared memory, scales per
// group.
#pragma once

#include "numeric.cuh"
#include "transform.cuh"

namespace higgs::cuda {

struct QuantizeLayer {
  const uint16_t* column_scale;
  uint8_t* indices;
  uint16_t* scales;
  double* row_stats;
  int64_t row_bytes;
  uint64_t seed;
  int k;
  int group;
  int row_groups;
};

struct GroupState {
  double energy;
  float scale;    // fp32 of s0
  float inverse;  // 1 / s0, or 0
  double error;
};

// Sum of 16 partial sums in the order of FORMAT.md; lane j of a half-warp holds sum j. Valid in every lane.
__device__ __forceinline__ double sum_of_parts(double part) {
#pragma unroll
  for (int half = 8; half > 0; half /= 2) part = __dadd_rn(part, __shfl_down_sync(~0u, part, half, 16));
  return __shfl_sync(~0u, part, 0, 16);
}

template <typename T>
__device__ void rotate_row(const QuantizeLayer& layer, const BlockTransform& transform, const T* w, float* row,
                           float* scratch) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  for (int chunk = warp * transform.columns; chunk < layer.k;
       chunk += static_cast<int>(blockDim.x) / 32 * transform.columns) {
    const int count = min(layer.k - chunk, transform.columns);
    const int column = chunk + lane * 32;
    float v[32] = {};
    if (lane * 32 < count) {
      load_values(w + column, v);
      const uint64_t signs = sign_word(layer.seed, static_cast<uint64_t>(column) / 64) >> (column % 64);
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        const float e = (signs >> j & 1) != 0 ? -1.0f : 1.0f;
        const float s =
            layer.column_scale == nullptr ? 1.0f : __half2float(__ushort_as_half(layer.column_scale[column + j]));
        v[j] = __fmul_rn(__fmul_rn(e, s), v[j]);
      }
    }
    warp_transform(v, transform, scratch + warp * kChunkScratch, lane);
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      if (j * 32 < count) row[chunk + j * 32 + lane] = v[j];
    }
  }
}

// Calls body(group, first column, columns, lane of the half-warp) for every scale group, one half-warp per group; all
// lanes of a warp stay together so that body may shuffle.
template <typename Body>
__device__ __forceinline__ void for_each_group(const QuantizeLayer& layer, const Body& body) {
  const int half_warp = threadIdx.x / 16;
  const int at_once = static_cast<int>(blockDim.x) / 16;
  const int rounds = (layer.row_groups + at_once - 1) / at_once;
  for (int r = 0; r < rounds; ++r) {
    const int group = r * at_once + half_warp;
    const int first = min(group * layer.group, layer.k);
    body(group, first, min(layer.k - first, layer.group), static_cast<int>(threadIdx.x % 16));
  }
}

// Energy and first scale of every group.
__device__ __forceinline__ void first_scales(const QuantizeLayer& layer, const float* row, GroupState* groups) {
  for_each_group(layer, [&](int group, int first, int columns, int lane) {
    double part = 0;
    for (int i = lane; i < columns; i += 16) {
      const double v = row[first + i];
      part = __fma_rn(v, v, part);
    }
    const double energy = sum_of_parts(part);
    if (lane != 0 || group >= layer.row_groups) return;
    const float rms = __double2float_rn(__dsqrt_rn(__ddiv_rn(energy, static_cast<double>(columns))));
    const float scale = __half2float(__float2half_rn(rms));
    groups[group] = {energy, scale, scale > 0.0f ? __frcp_rn(scale) : 0.0f, 0.0};
  });
}

// The least-squares scale of every group, its error, and the stored scale.
// `value(column)` is what its index means.
template <typename Value>
__device__ void refit_scales(const QuantizeLayer& layer, const float* row, GroupState* groups, uint16_t* scales,
                             const Value& value_of) {
  for_each_group(layer, [&](int group, int first, int columns, int lane) {
    double vg_part = 0;
    double gg_part = 0;
    for (int i = lane; i < columns; i += 16) {
      const double g = value_of(first + i);
      vg_part = __fma_rn(static_cast<double>(row[first + i]), g, vg_part);
      gg_part = __fma_rn(g, g, gg_part);
    }
    const double vg = sum_of_parts(vg_part);
    const double gg = sum_of_parts(gg_part);
    if (lane != 0 || group >= layer.row_groups) return;
    GroupState& state = groups[group];
    const auto error = [&](double s) {
      return __dadd_rn(__dsub_rn(state.energy, __dmul_rn(__dmul_rn(2, s), vg)), __dmul_rn(__dmul_rn(s, s), gg));
    };
    const __half refit = __float2half_rn(__double2float_rn(__ddiv_rn(vg, gg)));
    const float value = __half2float(refit);
    const bool better = value > 0.0f && isfinite(value) && error(value) < error(state.scale);
    state.error = error(better ? value : state.scale);
    scales[group] = __half_as_ushort(better ? refit : __float2half_rn(state.scale));
  });
}

// After all groups have an error.
__device__ __forceinline__ void store_row_stats(const QuantizeLayer& layer, const GroupState* groups, int64_t n_row) {
  if (layer.row_stats == nullptr) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    double error = 0;
    double energy = 0;
    for (int g = 0; g < layer.row_groups; ++g) {
      error += groups[g].error;
      energy += groups[g].energy;
    }
    layer.row_stats[2 * n_row] = error;
    layer.row_stats[2 * n_row + 1] = energy;
  }
}

}  // namespace higgs::cuda
