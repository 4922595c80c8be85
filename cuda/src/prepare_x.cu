// Rotation of x for the decode kernel's prepared loops: on few multiprocessors, those that the decode kernels before
// and after it leave free, so that what all warps issue takes longer than what each of them waits for. A warp takes a
// chunk of columns, which is fewer instructions than two take for its halves, or, of digits, half of one where that was
// as fast.
#include "prepare_x.h"

#include <algorithm>
#include <type_traits>

#include "launch.h"
#include "rotate_x.cuh"
#include "trellis.cuh"

namespace higgs::cuda {
namespace {

constexpr int kMultiprocessors = 4;  // do the work
// CTAs of one warp that a multiprocessor must find room for, by their registers. More than that find room beside decode
// CTAs of 14 warps, or where these are few.
constexpr int resident_warps(int pairs) { return pairs == 2 ? 28 : 16; }
constexpr int kMostChunks = 128;  // at once
// CTAs that are one for each multiprocessor: warps at most, by 96 registers.
constexpr int kCtaWarps = 20;
constexpr int kPieceBytes = 8 * 64;

std::int64_t chunks_of(std::int64_t k) { return (k + kChunk - 1) / kChunk; }

// A warp takes columns of every row_step-th row. It begins with a rehearsal, on no row: while the kernel before runs,
// it brings the instructions into the caches.
template <typename T, bool kDigits, int kHalfParts, int kPairs, int kMostWarps>
__global__ void __launch_bounds__(kLanes* kMostWarps, kMostWarps == 1 ? resident_warps(kPairs) : 1)
    prepare_x_kernel(const __grid_constant__ PrepareParams p) {
  constexpr int kColumns = Rotation<T, kPairs>::kColumns;
  constexpr int kPieces = kColumns / (kDigits ? 64 : 32);
  constexpr int kOfChunk = kChunk / kColumns;
  constexpr int kTileRows = kDigits ? 4 : 8;  // of x
  launch_dependents();
  // Written as timed: it decides on the registers of all that follows, and halves of chunks were 3 % slower like
  // chunks.
  constexpr bool kChunks = kPairs == 4 && (kHalfParts > 0 || !kDigits);
  using Index = std::conditional_t<kChunks, int, unsigned>;
  const int lane = kChunks ? threadIdx.x % kLanes : threadIdx.x;
  const int parts = (p.k + kChunk - 1) / kChunk * kOfChunk;
  Index warp = blockIdx.x;
  Index warps = gridDim.x;
  if constexpr (kMostWarps > 1) {
    warp = warp * (blockDim.x / kLanes) + __shfl_sync(~0u, threadIdx.x / kLanes, 0);
    warps *= blockDim.x / kLanes;
    if (warp >= parts * p.m) return;
  }
  const int part = warp % parts;
  const int row_step = warps / parts;
  const int column = part * kColumns;
  const bool upper = part % 2 != 0;
  const Rotation<T, kPairs> rotation(p.block, lane);
  float4 d[8];
  rotation.load_d(p.d + column, p.k - column, upper, lane, d);
  auto* const out = static_cast<uint8_t*>(p.out) + part * kPieces * kPieceBytes;
  const int tile_bytes = parts * kPieces * kPieceBytes;
  const int tiles = (p.m + kTileRows - 1) / kTileRows;
#pragma unroll 1
  for (int row = static_cast<int>(warp) / parts - row_step; row < p.m; row += row_step) {
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
      if constexpr (kHalfParts > 0 && kPairs == 4) {  // the halves have scales of their own
        constexpr int kSums = kHalfParts / 2;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float half[2][2][4];
#pragma unroll
          for (int i = 0; i < 16; ++i) half[i / 8][i / 4 % 2][i % 4] = y[2 * h + i / 8][i / 4 % 2][i % 4];
          uint8_t* const to = hi + h * kPieces / 2 * kPieceBytes;
          store_digits<kPieceBytes, kSums>(half, to, to + 64, scales, (2 * part + h) * kSums * p.m + row, p.m, lane);
        }
      } else {
        constexpr int kSums = kHalfParts / kOfChunk;
        const int entry = kSums > 0 ? part * kSums * p.m + row : row * parts + part;
        store_digits<kPieceBytes, kSums>(y, hi, hi + 64, scales, entry, p.m, lane);
      }
    } else {
      rotation.template store<kPieceBytes / 2>(y, reinterpret_cast<T*>(tile + row % kTileRows * 64), lane);
    }
  }
}

// CTAs of one warp; rows that `most` warps leave follow in turn.
template <typename T, bool kDigits, int kHalfParts, int kPairs>
void launch(const PrepareParams& p, int most, Stream stream) {
  const int parts = static_cast<int>(chunks_of(p.k)) * (4 / kPairs);
  const LaunchShape shape{parts * std::min(p.m, std::max(1, most / parts)), kLanes};
  launch_dependent<prepare_x_kernel<T, kDigits, kHalfParts, kPairs, 1>>(shape, stream, p);
}

// A CTA for each of few multiprocessors, all of as many warps, where CTAs of one warp would fill one multiprocessor
// before the next. Shared memory, of which it uses none, keeps two of them from sharing one.
template <typename T, bool kDigits, int kHalfParts>
void launch_evenly(const PrepareParams& p, int warps, Stream stream) {
  const int shared = current_device().shared_bytes_per_block / 2 + 1024;
  const LaunchShape shape{kMultiprocessors, kLanes * ((warps + kMultiprocessors - 1) / kMultiprocessors), shared};
  launch_dependent<prepare_x_kernel<T, kDigits, kHalfParts, 4, kCtaWarps>>(shape, stream, p);
}

template <typename T>
void launch(const PrepareParams& p, Stream stream) {
  constexpr int kMostHalves = kMultiprocessors * resident_warps(2);
  if (p.chunks) return launch<T, true, 0, 4>(p, kMultiprocessors * resident_warps(4), stream);
  if (p.half_parts == 4) return launch<T, true, 4, 2>(p, kMostHalves, stream);
  if (p.digits && p.half_parts == 0) return launch<T, true, 0, 2>(p, kMostHalves, stream);
  const int warps = static_cast<int>(chunks_of(p.k)) * p.m;
  const int free = p.free_multiprocessors;
  if (free >= kMultiprocessors && 2 * free < current_device().multiprocessors &&
      warps <= kMultiprocessors * kCtaWarps) {
    return p.digits ? launch_evenly<T, true, 2>(p, warps, stream) : launch_evenly<T, false, 0>(p, warps, stream);
  }
  p.digits ? launch<T, true, 2, 4>(p, kMostChunks, stream) : launch<T, false, 0, 4>(p, kMostChunks, stream);
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
