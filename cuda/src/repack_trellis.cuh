// Stored <-> tiled words of a trellis grid.
#pragma once

#include "repack.cuh"
#include "trellis.cuh"
#include "trellis_run.cuh"

namespace higgs::cuda {

// Step of the run whose bits are those of step s of a unit. A run that ends early goes on with its first step, for the
// odd window before; its last steps are those of the unit too, as decoders begin with these.
__device__ __forceinline__ int step_of_unit(int s, int steps) {
  if (s < steps) return s;
  if (s == steps) return 0;
  return s > kRunSteps - 4 ? steps - (kRunSteps - s) : 0;
}

// One thread per lane and unit: the runs of rows g and g + 8.
template <int Bits>
__global__ void repack_trellis_kernel(const TiledLayer layer, const uint8_t* indices, uint32_t* weights) {
  constexpr FieldShape kShape = TrellisDecoder<Bits>::kShape;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= unit_threads(layer.tiled)) return;
  const UnitPlace p = unit_place(layer.tiled, thread);
  if (p.unit >= p.units) return;
  const int64_t group = p.slice * (layer.tiled.units_per_slice / 2) + p.unit;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    uint32_t words[Bits] = {};
    const int64_t row = p.tile * kTileRows + p.lane / 4 + 8 * r;
    if (row < layer.n && group * kRunGroup < layer.k) {
      const StoredRun run(indices + row * layer.row_bytes, layer.k, group, p.lane % 4, Bits);
#pragma unroll
      for (int s = 0; s < kRunSteps; ++s) {
        const int position = (2 * step_of_unit(s, run.steps / 2) + kShape.shift) * Bits;
        const uint32_t window = run.window(position);
#pragma unroll
        for (int b = 0; b < 8; ++b) words[s / 4] |= (window >> b & 1u) << (s % 4 * 8 + window_bit(Bits, b));
        const uint32_t rest = Bits > 4 ? run.window(position + 8) : 0;
#pragma unroll
        for (int b = 0; b < 2 * Bits - 8; ++b) {
          const RestPlace place = rest_place<Bits>(s / 4, b);
          words[kRunWords + place.word] |= (rest >> b & 1u) << (s % 4 * 8 + place.bit);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < Bits; ++i) weights[word_place(p, slice_word(kShape, p.unit, 2 * i + r))] = words[i];
  }
  // An odd number of 8-byte halves: the slice ends with a whole 16-byte piece.
  if (Bits % 2 != 0 && p.units == 1) {
    weights[word_place(p, 2 * Bits)] = 0;
    weights[word_place(p, 2 * Bits + 1)] = 0;
  }
}

// One thread per run.
template <int Bits>
__global__ void unrepack_trellis_kernel(const TiledLayer layer, const uint32_t* weights, uint8_t* indices) {
  constexpr FieldShape kShape = TrellisDecoder<Bits>::kShape;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t groups = (layer.k + kRunGroup - 1) / kRunGroup;
  if (thread >= layer.n * groups * 4) return;
  const int t = static_cast<int>(thread % 4);
  const int64_t group = thread / 4 % groups;
  const int64_t row = thread / 4 / groups;
  const int per_slice = layer.tiled.units_per_slice / 2;
  const UnitPlace p = unit_place(
      layer.tiled,
      (((row / kTileRows) * layer.tiled.slices + group / per_slice) * per_slice + group % per_slice) * kLanes +
          row % 8 * 4 + t);
  uint32_t words[Bits];
#pragma unroll
  for (int i = 0; i < Bits; ++i) {
    words[i] = weights[word_place(p, slice_word(kShape, p.unit, 2 * i + static_cast<int>(row / 8 % 2)))];
  }
  const StoredRun run(indices + row * layer.row_bytes, layer.k, group, t, Bits);
  auto* out = const_cast<uint8_t*>(run.bytes);
  for (int i = 0; i < run.count; ++i) {
    uint32_t byte = 0;
    for (int b = 0; b < 8; ++b) {
      const int position = (8 * i + b + 8 * run.count - kShape.shift * Bits) % (8 * run.count);
      const int s = position / (2 * Bits);
      const int in_step = position % (2 * Bits);
      const RestPlace place =
          in_step < 8 ? RestPlace{s / 4 - kRunWords, window_bit(Bits, in_step)} : rest_place<Bits>(s / 4, in_step - 8);
      byte |= (words[kRunWords + place.word] >> (s % 4 * 8 + place.bit) & 1u) << b;
    }
    out[i] = static_cast<uint8_t>(byte);
  }
}

}  // namespace higgs::cuda
