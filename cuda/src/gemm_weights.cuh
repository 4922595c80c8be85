// What the GEMM kernels share in how they read W: the places of its parts, the scales, the table.
#pragma once

#include <type_traits>
#include <utility>

#include "decode.cuh"
#include "gemm_schedule.cuh"
#include "ptx.cuh"

namespace higgs::cuda {

// On sm_90 the table begins at this address of the shared window, so that the upper half of a look-up address is a
// constant that the decoders' byte permutation puts in: no addition.
inline constexpr int kTableAddress = 0x10000;
inline constexpr float kLeastScale = 0x1p-60f;

// Where a matrix keeps its parts, and how a slice's words come.
template <typename Decoder_, typename T_>
struct GemmWeights {
  using Decoder = Decoder_;
  using T = T_;
  using Table = Decoder_;  // what is looked up
  static constexpr FieldShape kShape = Decoder_::kShape;
  static constexpr int kTableOffset = std::is_same_v<T_, __half> ? 0 : kShape.value_table_bytes();
  static constexpr int kScalesOffset = 2 * kShape.value_table_bytes() + kShape.byte_tables_bytes();
  static constexpr int kJoined = kShape.joined_units();  // units of the layout that make one of the decoder
  static constexpr int kUnits = kShape.max_units() / kJoined;
  static constexpr int kUnitWords = kShape.unit_words() * kJoined;
  static constexpr int kUnitBlocks = 2 * kJoined;               // k blocks of a unit
  static constexpr int kLoads = (kUnits * kUnitWords + 3) / 4;  // of 16 bytes, per slice and row tile
};

// Multiplies the accumulators of a row tile: rows g and g + 8.
template <int Registers>
__device__ __forceinline__ void scale_rows(float* acc, float2 by) {
#pragma unroll
  for (int i = 0; i < Registers; ++i) acc[i] *= (i & 2) == 0 ? by.x : by.y;
}

// The scales of a warp's row tiles along k; a lane needs those of rows g and g + 8. Accumulators hold sums of plain
// grid points in units of the scale of the group: a change of group rescales them.
template <int Tiles>
class RowScales {
 public:
  int boundary = 0;  // k block where the next group begins

  RowScales() = default;
  __device__ __forceinline__ RowScales(const GemmParams& p, const uint8_t* scales, int row_tile, int row_tiles,
                                       int block, int lane)
      : boundary((block / p.group_blocks + 1) * p.group_blocks), left_(p.scale_groups - 1 - block / p.group_blocks) {
    const int first = min(row_tile, row_tiles - 1);
    at_ = reinterpret_cast<const uint16_t*>(scales) +
          (static_cast<long long>(first) * p.scale_groups + block / p.group_blocks) * kTileRows + lane / 4;
    to_second_ = first + 1 < row_tiles ? p.scale_groups * kTileRows : 0;
    load_next();
  }
  // Enters the first group.
  __device__ __forceinline__ void begin() { take(); }
  // Enters the next group.
  template <int Registers>
  __device__ __forceinline__ void next_group(const GemmParams& p, float (&acc)[Registers]) {
    float2 before[Tiles];
#pragma unroll
    for (int i = 0; i < Tiles; ++i) before[i] = scale(i);
    take();
    boundary += p.group_blocks;
#pragma unroll
    for (int i = 0; i < Tiles; ++i) {
      const float2 now = scale(i);
      scale_rows<Registers / Tiles>(acc + i * (Registers / Tiles),
                                    {__fdividef(before[i].x, now.x), __fdividef(before[i].y, now.y)});
    }
  }
  template <int Registers>
  __device__ __forceinline__ void finish(float (&acc)[Registers]) const {
#pragma unroll
    for (int i = 0; i < Tiles; ++i) scale_rows<Registers / Tiles>(acc + i * (Registers / Tiles), last(i));
  }
  // What the accumulators of row tile i are multiplied by in the end. unit: of the grid points, if not 1
  __device__ __forceinline__ float2 last(int i, float unit = 1.0f) const {
    const float2 now = scale(i);
    const float2 greatest = __half22float2(greatest_[i]);
    return {greatest.x == 0 ? 0.0f : now.x * unit, greatest.y == 0 ? 0.0f : now.y * unit};
  }

 private:
  __device__ __forceinline__ float2 scale(int i) const {
    const float2 v = __half22float2(now_[i]);
    return {fmaxf(v.x, kLeastScale), fmaxf(v.y, kLeastScale)};
  }
  __device__ __forceinline__ void load_next() {
#pragma unroll
    for (int i = 0; i < Tiles; ++i) {
      next_[i][0] = __ldg(at_ + i * to_second_);
      next_[i][1] = __ldg(at_ + i * to_second_ + 8);
    }
    at_ += kTileRows;
  }
  __device__ __forceinline__ void take() {
#pragma unroll
    for (int i = 0; i < Tiles; ++i) {
      now_[i] = __halves2half2(__ushort_as_half(next_[i][0]), __ushort_as_half(next_[i][1]));
      greatest_[i] = __hmax2(greatest_[i], now_[i]);
    }
    if (--left_ >= 0) load_next();
  }

  const uint16_t* at_ = nullptr;  // of the next scale group
  int to_second_ = 0;             // values to the second row tile
  int left_ = 0;                  // groups after this one
  __half2 now_[Tiles] = {};
  __half2 greatest_[Tiles] = {};
  uint16_t next_[Tiles][2] = {};
};

// Calls body(integral_constant<int, 0>) .. body(integral_constant<int, Count - 1>) while it returns true.
template <int Count, typename Body>
__device__ __forceinline__ void unrolled(const Body& body) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    (body(std::integral_constant<int, kIndex>{}) && ...);
  }(std::make_integer_sequence<int, Count>{});
}

// The table of another matrix, by all `Threads` threads that decode. `id`: a named barrier of theirs.
template <typename Config, int Threads>
__device__ __forceinline__ void change_table(const GemmPart& part, uint8_t* table, int id) {
  named_barrier(id, Threads);  // nobody reads the table before
  TableFill<typename Config::Table>(part.data + Config::kTableOffset, threadIdx.x, Threads).store(table);
  named_barrier(id, Threads);
}

}  // namespace higgs::cuda
