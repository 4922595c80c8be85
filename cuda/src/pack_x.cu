// Rotated x in the layout of the GEMM kernel's B operand, see pack_x.h.
#include "pack_x.h"

#include <algorithm>

#include "gemm_params.h"
#include "gemv_params.h"
#include "launch.h"
#include "numeric.cuh"
#include "ptx.cuh"
#include "rotate_x.cuh"
#include "transform.cuh"
#include "trellis.cuh"

namespace higgs::cuda {
namespace {

// Where column c of 64 goes in a row of packed x: the k order of decode.cuh within 16 columns.
__device__ __forceinline__ int packed_slot(int c) {
  const int t = c % 16 / 4;
  return c / 16 * 16 + c % 4 / 2 * 8 + 2 * t + c % 2;
}

__device__ __forceinline__ void clear_flags(const PackParams& p) {
  if (blockIdx.x != 0) return;
  for (int i = threadIdx.x; i < p.flag_count; i += blockDim.x) p.flags[i] = 0;
}

// CTAs of one warp wait for x beside the kernel before, in the registers that GemmConfig leaves free: on a
// multiprocessor two, or six beside tiles of 128 tokens. Where one or two are enough, they take so much shared memory
// that they go where there is most room: multiprocessors without a CTA of that kernel would get up to 32.
constexpr int kCtas = 32;  // of one warp: 2048 registers each
constexpr int spread_bytes(int each) { return (each <= 1 ? 34 : each == 2 ? 18 : 0) * 1024; }

// --- blocks of a power of two: a warp takes a chunk of one row or several, on the tensor cores
//
// As rotate_x.cuh does it, with other places for the column bits, so that a warp reads 512 bytes in a row, writes whole
// rows of 128 bytes, 16 bytes a lane, and nothing changes lanes but in the MMAs:
//
//   load       a lane has columns 256 i + 8 lane .. + 7, i = 0..3
//   MMA 1      column bits 0, 3, 4, 1; its rows are bits 0, 1, 4, 3
//   MMA 2      column bits 5-8
//   butterfly  column bits 2 and 9, fp32
//   store      a lane has half a step of 16 columns, piece lane % 8 of row lane / 8 + 4 i of 64 columns
//
// Two roundings to T besides the last, as in the decode kernel.

constexpr int kWarps = 8;

template <typename T>
class PackRotation {
 public:
  __device__ __forceinline__ PackRotation(int block, int lane) : block_(block), norm_(remaining_norm(block)) {
    crossed_hadamard_fragment(lane, kHalves<T> - kExponents<T>, first_);
    const uint32_t exponents = (block >= 1024 ? 2 : block >= 256 ? 1 : 0) * kExponents<T>;
    hadamard_fragment(block == 64 ? 1 : block == 128 ? 2 : block == 256 ? 3 : 4, lane, kHalves<T> - exponents, second_);
  }
  // d and x of a chunk with `count` columns: beyond them d is 0 and x anything.
  __device__ __forceinline__ void load_d(const float* d, int count, int lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float (&to)[8] = d_[i];
#pragma unroll
      for (float& value : to) value = 0;
      if (column(i, lane) < count) load_values(d + column(i, lane), to);
    }
  }
  static __device__ __forceinline__ void load_x(const T* x, int count, int lane, uint4 (&raw)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      raw[i] = load_streaming(reinterpret_cast<const uint4*>(x + min(column(i, lane), count - 8)));
  }
  // raw times d, the B operand of the first MMAs.
  __device__ __forceinline__ void multiply(const uint4 (&raw)[4], uint2 (&b)[8]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
      uint32_t products[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float2 x = unpack2<T>(words[w]);
        products[w] = pack2<T>(x.x * d_[i][2 * w], x.y * d_[i][2 * w + 1]);
      }
      b[i / 2 * 4 + i % 2] = {products[0], products[1]};
      b[i / 2 * 4 + 2 + i % 2] = {products[2], products[3]};
    }
  }
  // out[i] = what the lane stores in row lane / 8 + 4 i.
  __device__ __forceinline__ void rotate(const uint2 (&b)[8], uint4 (&out)[4]) const {
    float y[4][2][4];
    multiply_factors<T>(first_, second_, b, y);
    across_pairs<1>(y);
    if (block_ > 512) across_pairs<2>(y);
    if (norm_ != 1) {
#pragma unroll
      for (int i = 0; i < 32; ++i) y[i / 8][i / 4 % 2][i % 4] *= norm_;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto& even = y[i / 2 * 2];
      const auto& odd = y[i / 2 * 2 + 1];
      const int c = i % 2 * 2;
      out[i] = {pack2<T>(even[0][c], even[0][c + 1]), pack2<T>(odd[0][c], odd[0][c + 1]),
                pack2<T>(even[1][c], even[1][c + 1]), pack2<T>(odd[1][c], odd[1][c + 1])};
    }
  }

 private:
  static __device__ __forceinline__ int column(int i, int lane) { return 256 * i + 8 * lane; }

  uint32_t first_[4];
  uint32_t second_[4];
  float d_[4][8];
  int block_;
  float norm_;
};

// A CTA has a chunk of kWarps * rows_of_warp rows; one of one warp has one row.
template <typename T, int kWarps>
__global__ void __launch_bounds__(kWarps* kLanes, kWarps == 1 ? kCtas : 2)
    pack_rows_kernel(const __grid_constant__ PackParams p, int rows_of_warp) {
  launch_dependents();
  const int lane = threadIdx.x % kLanes;
  const int chunks = (p.k + kChunk - 1) / kChunk;
  const int group = blockIdx.x / chunks;
  const int chunk = (blockIdx.x - group * chunks) * kChunk;
  const int count = min(p.k - chunk, kChunk);
  PackRotation<T> rotation(p.block, lane);
  rotation.load_d(p.d + chunk, count, lane);
  int row = group * rows_of_warp * kWarps + threadIdx.x / kLanes;
  const int end = min(p.m, (group + 1) * rows_of_warp * kWarps);
  wait_for_primary();
  clear_flags(p);
  if (row >= end) return;
  const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(row) * p.k + chunk;
  auto* const out = static_cast<uint4*>(p.out) + static_cast<int64_t>(chunk / 64 + lane / 8) * p.padded_m * 8;
  uint4 raw[4];
  rotation.load_x(x, count, lane, raw);
#pragma unroll 1
  do {
    uint2 b[8];
    rotation.multiply(raw, b);
    x += kWarps * p.k;
    if (kWarps > 1 && row + kWarps < end) rotation.load_x(x, count, lane, raw);  // under way while this row is rotated
    uint4 pieces[4];
    rotation.rotate(b, pieces);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int block = lane / 8 + 4 * i;  // of 64 columns
      const int piece = lane % 8 ^ row % 8;
      if (block * 64 < count) out[(static_cast<int64_t>(4 * i) * p.padded_m + row) * 8 + piece] = pieces[i];
    }
    row += kWarps;
  } while (kWarps > 1 && row < end);
}

// --- digits: the rotation of rotate_x.cuh

// Of B, for the digits of a row of x: the sums of a token's digits fall to the lane that has those of column `row`
// of 16.
__device__ __forceinline__ int digit_row(int row) { return row / 8 * 16 + row % 2 * 8 + row % 8 / 2 * 2; }

// Words of either digit, of this lane's four columns; the lane with those 16 columns on has exchanged halves with it.
__device__ __forceinline__ uint2 crossed(uint2 digits, int lane) {
  const bool odd = lane / 4 % 2 != 0;
  const uint32_t sent = __byte_perm(digits.x, digits.y, odd ? 0x5410 : 0x7632);
  const uint32_t got = __shfl_xor_sync(~0u, sent, 4);
  return {__byte_perm(digits.x, got, odd ? 0x3254 : 0x5410), __byte_perm(digits.y, got, odd ? 0x3276 : 0x7610)};
}

// A warp per half chunk of a row, with a rehearsal on zeros beside the kernel before, which brings the instructions
// into the caches. unit: of the rotated values, 1 over it.
template <typename T, bool Crossed>
__global__ void __launch_bounds__(kLanes, 65536 / (kLanes * kPackBytesRegisters))
    pack_bytes_kernel(const __grid_constant__ PackParams p, float unit) {
  using HalfChunk = Rotation<T, 2>;
  constexpr int kColumns = HalfChunk::kColumns;
  constexpr int kRow = 128;  // bytes
  launch_dependents();
  const int lane = threadIdx.x;
  const int parts = p.k / kColumns;
  const int token = blockIdx.x / parts;
  const int part = blockIdx.x - token * parts;
  const int column = part * kColumns;
  const bool upper = part % 2 != 0;
  const HalfChunk rotation(p.block, lane);
#pragma unroll 1
  for (int real = 0; real < 2; ++real) {
    float4 d[8];
    rotation.load_d(p.d + column, kColumns, upper, lane, d);
    uint2 raw[8] = {};
    if (real != 0) {
      wait_for_primary();
      clear_flags(p);
      rotation.load_x(static_cast<const T*>(p.x) + static_cast<int64_t>(token) * p.k + column, kColumns, upper, lane,
                      raw);
    }
    uint2 b[4];
    rotation.multiply(raw, d, upper, b);
    float y[2][2][4];
    rotation.rotate(b, y);
    const int row = digit_row(token);
    const int piece = lane / 4 ^ row % 8;     // of 16 bytes; the next row's is another one
    const int stage = 2 * p.padded_m * kRow;  // bytes of 128 columns
    uint8_t* const slice = static_cast<uint8_t*>(p.out) + part * (kColumns / kRow * stage + 8 * p.padded_m);
    uint8_t* const out = slice + row * kRow + piece * 16 + lane % 4 * 4;
    const int to_lo = kRow + (piece ^ 1) * 16 - piece * 16;
    const auto store = [&](int j, uint2 digits) {
      if constexpr (Crossed) digits = crossed(digits, lane);
      if (real == 0) return;
      *reinterpret_cast<uint32_t*>(out + j * stage) = digits.x;
      *reinterpret_cast<uint32_t*>(out + j * stage + to_lo) = digits.y;
    };
    make_digits<1>(y, unit, nullptr, lane, store, [&](int /*part*/, float scale, float half) {
      if (real == 0) return;
      auto* const scales = reinterpret_cast<float*>(slice + kColumns / kRow * stage);
      scales[token] = scale;
      scales[p.padded_m + token] = half;
    });
  }
}

// --- blocks with an odd factor: a warp per chunk

template <typename T>
__global__ void __launch_bounds__(kWarps* kLanes)
    pack_warps_kernel(const __grid_constant__ PackParams p, const __grid_constant__ BlockTransform transform) {
  extern __shared__ __align__(16) float scratch[];
  launch_dependents();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int chunks = static_cast<int>(chunks_of(transform, p.k));
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + warp;
  const int64_t row = item / chunks;
  const int chunk = static_cast<int>(item - row * chunks) * transform.columns;
  const int count = min(p.k - chunk, transform.columns);
  wait_for_primary();
  clear_flags(p);
  if (row >= p.m) return;
  float v[32];
  float* own = scratch + warp * kChunkScratch;
  load_chunk(static_cast<const T*>(p.x) + row * p.k + chunk, p.d + chunk, count, own, lane, v);
  warp_transform(v, transform, own, lane);
  T* slots = reinterpret_cast<T*>(own);
  const int slot = packed_slot(lane);
#pragma unroll
  for (int j = 0; j < 32; ++j) slots[j * 32 + slot] = from_float<T>(v[j]);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int piece = lane + 32 * i;  // of 16 bytes; 8 pieces are a row of 64 columns
    const int swizzled = piece % 8 ^ static_cast<int>(row % 8);
    if (piece * 8 < count) {
      uint4* to = static_cast<uint4*>(p.out) + (static_cast<int64_t>(chunk / 64 + piece / 8) * p.padded_m + row) * 8;
      to[swizzled] = reinterpret_cast<const uint4*>(slots)[piece];
    }
  }
}

// each: items of a multiprocessor.
template <typename T>
void pack_rows(const PackParams& p, int chunks, int each, Stream stream) {
  if (each <= (p.padded_m == 128 ? 6 : 2)) {
    const LaunchShape shape{p.m * chunks, kLanes, spread_bytes(each)};
    return launch_dependent<pack_rows_kernel<T, 1>>(shape, stream, p, 1);
  }
  constexpr int kMostRows = 4;  // of a warp; fewer where all CTAs are resident at once
  const int octets = (p.m + kWarps - 1) / kWarps;
  const int groups = std::max(1, 2 * current_device().multiprocessors / chunks);
  const int rows = std::min(kMostRows, (octets + groups - 1) / groups);
  const LaunchShape shape{(octets + rows - 1) / rows * chunks, kWarps * kLanes};
  launch_dependent<pack_rows_kernel<T, kWarps>>(shape, stream, p, rows);
}

template <bool Crossed>
void pack_bytes(const PackParams& p, DType dtype, Stream stream) {
  const LaunchShape shape{static_cast<int>(p.m * (p.k / (kChunk / 2))), kLanes};
  const float unit = 1 / (remaining_norm(p.block) * kQuadStep);
  dtype == DType::f16 ? launch_dependent<pack_bytes_kernel<__half, Crossed>>(shape, stream, p, unit)
                      : launch_dependent<pack_bytes_kernel<__nv_bfloat16, Crossed>>(shape, stream, p, unit);
}

}  // namespace

void pack_x(const PackParams& params, DType dtype, Stream stream) {
  const BlockTransform transform = block_transform(params.block);
  const std::int64_t chunks = chunks_of(transform, params.k);
  const std::int64_t items = params.m * chunks;
  const int multiprocessors = current_device().multiprocessors;
  const auto each = static_cast<int>((items + multiprocessors - 1) / multiprocessors);
  if (params.digits) {
    return params.crossed ? pack_bytes<true>(params, dtype, stream) : pack_bytes<false>(params, dtype, stream);
  }
  if (transform.runs == 1) {
    return dtype == DType::f16 ? pack_rows<__half>(params, static_cast<int>(chunks), each, stream)
                               : pack_rows<__nv_bfloat16>(params, static_cast<int>(chunks), each, stream);
  }
  const int warps = items < 8 * multiprocessors ? 1 : kWarps;  // few items: on as many multiprocessors as possible
  const LaunchShape shape{static_cast<int>((items + warps - 1) / warps), warps * kLanes,
                          warps * kChunkScratch * static_cast<int>(sizeof(float))};
  dtype == DType::f16 ? launch_dependent<pack_warps_kernel<__half>>(shape, stream, params, transform)
                      : launch_dependent<pack_warps_kernel<__nv_bfloat16>>(shape, stream, params, transform);
}

}  // namespace higgs::cuda
