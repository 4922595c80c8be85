// Stored <-> tiled index words, and tiled -> scale * point, for one decoder. Units are those of the decoder: two of the
// layout for a trellis.
#pragma once

#include "bits.cuh"
#include "decode.cuh"
#include "decoder_ops.h"
#include "gemm_config.cuh"
#include "numeric.cuh"

namespace higgs::cuda {

// Which words a thread of the repack kernels owns: lane `lane` of unit `unit` of slice `slice` of row tile `tile`.
struct UnitPlace {
  int lane;
  int unit;   // within the slice
  int units;  // of the slice
  int64_t tile;
  int64_t slice;
  int64_t first_word;  // 32-bit words from the start of the weights to word 0 of the lane's slice
};

__device__ __forceinline__ UnitPlace unit_place(const TiledFormat& t, int64_t thread) {
  UnitPlace p;
  p.lane = static_cast<int>(thread % kLanes);
  int64_t rest = thread / kLanes;
  const int joined = t.field.joined_units();
  p.unit = static_cast<int>(rest % (t.units_per_slice / joined));
  rest /= t.units_per_slice / joined;
  p.slice = rest % t.slices;
  p.tile = rest / t.slices;
  p.units = (p.slice == t.slices - 1 ? t.last_units : t.units_per_slice) / joined;
  p.first_word = (p.tile * t.tile_bytes + p.slice * t.slice_bytes) / 4 + p.lane * 4;
  return p;
}
__host__ __device__ inline int64_t unit_threads(const TiledFormat& t) {
  return t.row_tiles * t.slices * (t.units_per_slice / t.field.joined_units()) * kLanes;
}
// Word i of the lane's slice.
__device__ __forceinline__ int64_t word_place(const UnitPlace& p, int i) {
  return p.first_word + i / 4 * 4 * kLanes + i % 4;
}

// Row and first column of field f of a lane's unit.
__device__ __forceinline__ int64_t field_row_of(const UnitPlace& p, int weights, int f) {
  return p.tile * kTileRows + p.lane / 4 + 8 * field_row(weights, f % (8 / weights));
}
__device__ __forceinline__ int64_t field_column_of(const UnitPlace& p, const TiledFormat& t, int weights, int f) {
  const int step = f / (8 / weights);
  return (p.slice * t.units_per_slice + p.unit) * kUnitColumns + step * 16 + p.lane % 4 * 4 +
         field_column(weights, f % (8 / weights));
}

template <typename Decoder>
__global__ void repack_kernel(const TiledLayer layer, const uint8_t* indices, uint32_t* weights) {
  constexpr FieldShape kShape = Decoder::kShape;
  constexpr int kWords = kShape.unit_words();
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (thread >= unit_threads(layer.tiled)) return;
  const UnitPlace p = unit_place(layer.tiled, thread);
  if (p.unit >= p.units) return;
  uint32_t words[kWords] = {};
#pragma unroll
  for (int f = 0; f < 64 / kShape.weights; ++f) {
    const int64_t row = field_row_of(p, kShape.weights, f);
    const int64_t column = field_column_of(p, layer.tiled, kShape.weights, f);
    if (row >= layer.n || column >= layer.k) continue;
    const uint32_t field =
        read_bits(indices + row * layer.row_bytes, layer.row_bytes, column / kShape.weights * kShape.bits, kShape.bits);
#pragma unroll
    for (int b = 0; b < kShape.bits; ++b) {
      const int position = bit_position(kShape, f, b);
      words[position / 32] |= (field >> b & 1u) << (position % 32);
    }
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i) weights[word_place(p, p.unit * kWords + i)] = words[i];
  if (p.unit == p.units - 1) {  // the slice ends with a whole 16-byte piece
    for (int i = p.units * kWords; i % 4 != 0; ++i) weights[word_place(p, i)] = 0;
  }
}

// One thread per 64 columns of a row: a whole number of stored bytes.
template <typename Decoder>
__global__ void unrepack_kernel(const TiledLayer layer, const uint32_t* weights, uint8_t* indices) {
  constexpr FieldShape kShape = Decoder::kShape;
  constexpr int kStepFields = 8 / kShape.weights;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t runs = layer.k / kColumnAlignment;
  if (thread >= layer.n * runs) return;
  const int64_t row = thread / runs;
  const int64_t first = thread % runs * kColumnAlignment;
  const TiledFormat& t = layer.tiled;
  const int64_t unit = first / kUnitColumns;
  uint8_t* out = indices + row * layer.row_bytes + first / kShape.weights * kShape.bits / 8;
  uint32_t pending = 0;
  int pending_bits = 0;
  for (int column = 0; column < kColumnAlignment; column += kShape.weights) {
    const int in_unit = static_cast<int>(first % kUnitColumns) + column;
    const int lane = static_cast<int>(row % 8) * 4 + in_unit % 16 / 4;
    const UnitPlace p = unit_place(
        t, (((row / kTileRows) * t.slices + unit / t.units_per_slice) * t.units_per_slice + unit % t.units_per_slice) *
                   kLanes +
               lane);
    int in_step = 0;
    while (field_row(kShape.weights, in_step) != row / 8 % 2 || field_column(kShape.weights, in_step) != in_unit % 4)
      ++in_step;
    const int f = in_unit / 16 * kStepFields + in_step;
    uint32_t field = 0;
    for (int b = 0; b < kShape.bits; ++b) {
      const int position = bit_position(kShape, f, b);
      const uint32_t word = weights[word_place(p, p.unit * kShape.unit_words() + position / 32)];
      field |= (word >> (position % 32) & 1u) << b;
    }
    pending |= field << pending_bits;
    for (pending_bits += kShape.bits; pending_bits >= 8; pending_bits -= 8, pending >>= 8) {
      *out++ = static_cast<uint8_t>(pending);
    }
  }
}

// out[n, k] = scale * point. A block fills its table once and walks over units; a warp decodes 16 rows of one.
template <typename Decoder, typename T>
__global__ void __launch_bounds__(512, 1)
    dequantize_tiled_kernel(const TiledLayer layer, const uint8_t* tiled, T* out) {
  extern __shared__ __align__(1024) uint8_t table[];
  constexpr FieldShape kShape = Decoder::kShape;
  constexpr int kJoined = kShape.joined_units();
  constexpr int kWords = kShape.unit_words() * kJoined;
  using Looked = GemmTable<Decoder, __half>;
  TableFill<typename Looked::Table>(tiled + Looked::kTableOffset, threadIdx.x, blockDim.x).store(table);
  __syncthreads();
  const auto* weights = reinterpret_cast<const uint32_t*>(tiled + layer.tiled.weights);
  const auto* scales = reinterpret_cast<const __half*>(tiled + layer.tiled.scales);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < unit_threads(layer.tiled);
       i += step) {
    const UnitPlace p = unit_place(layer.tiled, i);
    if (p.unit >= p.units) continue;
    uint32_t w[kWords];
#pragma unroll
    for (int j = 0; j < kWords; ++j) w[j] = weights[word_place(p, slice_word(kShape, p.unit, j))];
    Decoder decoder(w);
    const uint32_t offset = Decoder::lane_offset(p.lane);
    const int64_t column = (p.slice * layer.tiled.units_per_slice + p.unit * kJoined) * kUnitColumns + p.lane % 4 * 4;
    float row_scales[2];
#pragma unroll
    for (int s = 0; s < kSteps * kJoined; ++s) {
      uint32_t a[4];
      decoder.fragment(s, table, offset, a);
      const int64_t c = column + s * 16;
      if (c >= layer.k) continue;
      if (s % (kMinBlock / 16) == 0) {  // a scale group is a number of blocks; a division of 64 bits would take longer
        const uint32_t group = static_cast<uint32_t>(c) / static_cast<uint32_t>(layer.group);
        const __half* from = scales + (p.tile * layer.tiled.row_groups + group) * kTileRows + p.lane / 4;
        row_scales[0] = __half2float(from[0]) * Looked::kUnit;
        row_scales[1] = __half2float(from[8]) * Looked::kUnit;
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = p.lane / 4 + 8 * r;
        if (p.tile * kTileRows + row >= layer.n) continue;
        const float scale = row_scales[r];
        const __half2 lo = *reinterpret_cast<const __half2*>(&a[r]);
        const __half2 hi = *reinterpret_cast<const __half2*>(&a[2 + r]);
        alignas(4 * sizeof(T)) T v[4] = {
            from_float<T>(__fmul_rn(scale, __low2float(lo))), from_float<T>(__fmul_rn(scale, __high2float(lo))),
            from_float<T>(__fmul_rn(scale, __low2float(hi))), from_float<T>(__fmul_rn(scale, __high2float(hi)))};
        T* at = out + (p.tile * kTileRows + row) * layer.k + c;
        if constexpr (sizeof(T) == 4) {
          *reinterpret_cast<float4*>(at) = *reinterpret_cast<const float4*>(v);
        } else {
          *reinterpret_cast<uint2*>(at) = *reinterpret_cast<const uint2*>(v);
        }
      }
    }
  }
}

}  // namespace higgs::cuda
