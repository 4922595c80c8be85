// Rotation of x for the decode kernel's prepared loops, a warp for half a chunk of columns: on few multiprocessors,
// those that the decode kernels before and after it leave free.
#include "prepare_x.h"

#include <algorithm>

#include "launch.h"
#include "rotate_x.cuh"
#include "trellis.cuh"

namespace higgs::cuda {
namespace {

// Of a multiprocessor, by their registers; four of these do the work.
constexpr int resident_warps(int pairs) { return pairs == 2 ? 28 : 16; }
constexpr int kPieceBytes = 8 * 64;

std::int64_t chunks_of(std::int64_t k) { return (k + kChunk - 1) / kChunk; }

// A warp takes columns of every row_step-th row. It begins with a rehearsal, on no row: while the kernel before runs,
// it brings the instructions into the caches.
template <typename T, bool kDigits, int kHalfParts, int kPairs>
__global__ void __launch_bounds__(kLanes, resident_warps(kPairs))
    prepare_x_kernel(const __grid_constant__ PrepareParams p) {
  constexpr int kColumns = Rotation<T, kPairs>::kColumns;
  constexpr int kPieces = kColumns / (kDigits ? 64 : 32);
  constexpr int kOfChunk = kChunk / kColumns;
  constexpr int kTileRows = kDigits ? 4 : 8;  // of x
  launch_dependents();
  const int lane = threadIdx.x;
  const int parts = (p.k + kChunk - 1) / kChunk * kOfChunk;
  const int part = blockIdx.x % parts;
  const int row_step = gridDim.x / parts;
  const int column = part * kColumns;
  const bool upper = part % 2 != 0;
  const Rotation<T, kPairs> rotation(p.block, lane);
  float4 d[8];
  rotation.load_d(p.d + column, p.k - column, upper, lane, d);
  auto* const out = static_cast<uint8_t*>(p.out) + part * kPieces * kPieceBytes;
  const int tile_bytes = parts * kPieces * kPieceBytes;
  const int tiles = (p.m + kTileRows - 1) / kTileRows;
#pragma unroll 1
  for (int row = static_cast<int>(blockIdx.x) / parts - row_step; row < p.m; row += row_step) {
    uint2 raw[8] = {};
    if (row >= 0) {
      wait_for_primary();
      rotation.load_x(static_cast<const T*>(p.x) + static_cast<long long>(row) * p.k + column, p.k - column, upper,
                      lane, raw);
    }
    uint2 b[2 * kPairs];
    rotation.multiply(raw, d, upper, b);
    float y[kPairs][2][4];
    rotation.rotate(b, y);
    if (row < 0) continue;
    auto* const tile = out + row / kTileRows * tile_bytes;
    if constexpr (kDigits) {
      uint8_t* const hi = tile + row % kTileRows * 128;
      auto* const scales = reinterpret_cast<float*>(static_cast<uint8_t*>(p.out) + tiles * tile_bytes);
      constexpr int kSums = kHalfParts / kOfChunk;
      const int entry = kSums > 0 ? part * kSums * p.m + row : row * parts + part;
      store_digits<kPieceBytes, kSums>(y, hi, hi + 64, scales, entry, p.m, lane);
    } else {
      rotation.template store<kPieceBytes / 2>(y, reinterpret_cast<T*>(tile + row % kTileRows * 64), lane);
    }
  }
}

template <typename T, bool kDigits, int kHalfParts, int kPairs>
void launch(const PrepareParams& p, Stream stream) {
  const int parts = static_cast<int>(chunks_of(p.k)) * (4 / kPairs);
  const LaunchShape shape{parts * std::min(p.m, std::max(1, 4 * resident_warps(kPairs) / parts)), kLanes};
  launch_dependent<prepare_x_kernel<T, kDigits, kHalfParts, kPairs>>(shape, stream, p);
}

template <typename T>
void launch(const PrepareParams& p, Stream stream) {
  if (p.chunks) return launch<T, true, 0, 4>(p, stream);
  if (p.half_parts == 2) return launch<T, true, 2, 2>(p, stream);
  if (p.half_parts == 4) return launch<T, true, 4, 2>(p, stream);
  p.digits ? launch<T, true, 0, 2>(p, stream) : launch<T, false, 0, 2>(p, stream);
}

}  // namespace

void prepare_x(const PrepareParams& params, DType dtype, Stream stream) {
  dtype == DType::f16 ? launch<__half>(params, stream) : launch<__nv_bfloat16>(params, stream);
}

std::int64_t prepared_x_bytes(std::int64_t m, std::int64_t k, bool digits, int scale_floats) {
  const std::int64_t rows = digits ? 2 * m : m;
  const std::int64_t tile = chunks_of(k) * kChunk * 8 * (digits ? 1 : 2);
  return (rows + 7) / 8 * tile + (digits ? (m * chunks_of(k) * scale_floats + 3) / 4 * 16 : 0);
}

}  // namespace higgs::cuda
