// Rotation of x for the decode kernel's prepared loops, a warp per chunk of 1024 columns: on few multiprocessors, those
// that the decode kernels before and after it leave free.
#include "prepare_x.h"

#include <algorithm>

#include "launch.h"
#include "rotate_x.cuh"
#include "trellis.cuh"

namespace higgs::cuda {
namespace {

constexpr int kMostWarps = 64;
constexpr int kPieceBytes = 8 * 64;

std::int64_t chunks_of(std::int64_t k) { return (k + kChunk - 1) / kChunk; }

template <typename T, bool kDigits, int kHalfParts>
__global__ void __launch_bounds__(kLanes) prepare_x_kernel(const __grid_constant__ PrepareParams p) {
  constexpr int kChunkPieces = kChunk / (kDigits ? 64 : 32);
  constexpr int kTileRows = kDigits ? 4 : 8;  // of x
  launch_dependents();
  const int lane = threadIdx.x;
  const int chunks = (p.k + kChunk - 1) / kChunk;
  const int chunk = blockIdx.x % chunks;
  const int row_step = gridDim.x / chunks;
  const int column = chunk * kChunk;
  const Rotation<T> rotation(p.block, lane);
  float4 d[8];
  rotation.load_d(p.d + column, p.k - column, lane, d);
  auto* const out = static_cast<uint8_t*>(p.out) + chunk * kChunkPieces * kPieceBytes;
  const int tile_bytes = chunks * kChunkPieces * kPieceBytes;
  const int tiles = (p.m + kTileRows - 1) / kTileRows;
  wait_for_primary();
#pragma unroll 1
  for (int row = blockIdx.x / chunks; row < p.m; row += row_step) {
    uint2 raw[8];
    rotation.load_x(static_cast<const T*>(p.x) + static_cast<long long>(row) * p.k + column, p.k - column, lane, raw);
    uint2 b[8];
    rotation.multiply(raw, d, b);
    auto* const tile = out + row / kTileRows * tile_bytes;
    if constexpr (kDigits) {
      float y[4][2][4];
      rotation.rotate(b, y);
      uint8_t* const hi = tile + row % kTileRows * 128;
      auto* const scales = reinterpret_cast<float*>(static_cast<uint8_t*>(p.out) + tiles * tile_bytes);
      const int entry = kHalfParts > 0 ? chunk * kHalfParts * p.m + row : row * chunks + chunk;
      store_digits<kPieceBytes, kHalfParts>(y, hi, hi + 64, scales, entry, p.m, lane);
    } else {
      rotation.template rotate<kPieceBytes / 2>(b, reinterpret_cast<T*>(tile + row % kTileRows * 64), lane);
    }
  }
}

template <typename T>
void launch(const PrepareParams& p, Stream stream) {
  const auto chunks = static_cast<int>(chunks_of(p.k));
  const LaunchShape shape{chunks * std::min(p.m, std::max(1, kMostWarps / chunks)), kLanes};
  if (p.half_parts == 2) return launch_dependent<prepare_x_kernel<T, true, 2>>(shape, stream, p);
  if (p.half_parts == 4) return launch_dependent<prepare_x_kernel<T, true, 4>>(shape, stream, p);
  p.digits ? launch_dependent<prepare_x_kernel<T, true, 0>>(shape, stream, p)
           : launch_dependent<prepare_x_kernel<T, false, 0>>(shape, stream, p);
}

}  // namespace

void prepare_x(const PrepareParams& params, DType dtype, Stream stream) {
  dtype == DType::f16 ? launch<__half>(params, stream) : launch<__nv_bfloat16>(params, stream);
}

std::int64_t prepared_x_bytes(std::int64_t m, std::int64_t k, bool digits, int half_parts) {
  const std::int64_t rows = digits ? 2 * m : m;
  const std::int64_t tile = chunks_of(k) * kChunk * 8 * (digits ? 1 : 2);
  return (rows + 7) / 8 * tile + (digits ? (m * chunks_of(k) * digit_scale_floats(half_parts) + 3) / 4 * 16 : 0);
}

}  // namespace higgs::cuda
