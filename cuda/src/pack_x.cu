// Rotated x in the layout of the GEMM kernel's B operand, see pack_x.h.
#include "pack_x.h"

#include "async_copy.cuh"
#include "launch.h"
#include "numeric.cuh"
#include "ptx.cuh"
#include "rotate_x.cuh"
#include "transform.cuh"
#include "trellis.cuh"
#include "trellis_table.h"

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

// --- few rows and blocks of a power of two: a CTA per chunk of one or two rows, 16 values a thread
//
// A launch starts with a cold instruction cache, at about 10 cycles an instruction: the passes of two strides each are
// one short loop, where a warp per chunk takes 900 instructions in a row. The butterflies and their order are those of
// fwht.cuh. 2048 registers a CTA: two or more fit into what GemmConfig leaves free.

constexpr int kThreads = 64;
constexpr int kQuads = kChunk / 4 / kThreads;  // a thread's, kThreads apart
constexpr int kPaddedChunk = kChunk + kChunk / 32;
constexpr int kCtaBytes = kPaddedChunk * 4 + kChunk * 2;
// CTAs that wait for x beside the kernel before, on a multiprocessor, and the shared memory that each takes where one
// or two are enough: they go where there is most room, and multiprocessors without a CTA of that kernel would get up
// to 32.
constexpr int kResident = 2;
constexpr int kSpreadBytes[kResident + 1] = {0, 34 * 1024, 18 * 1024};

__device__ __forceinline__ float& padded(float* values, int i) { return values[i + i / 32]; }

// Two strides: pairs (0, 1) and (2, 3), then (0, 2) and (1, 3).
__device__ __forceinline__ void two_strides(float (&v)[4], bool second) {
  const float a[4] = {__fadd_rn(v[0], v[1]), __fsub_rn(v[0], v[1]), __fadd_rn(v[2], v[3]), __fsub_rn(v[2], v[3])};
  v[0] = second ? __fadd_rn(a[0], a[2]) : a[0];
  v[1] = second ? __fadd_rn(a[1], a[3]) : a[1];
  v[2] = second ? __fsub_rn(a[0], a[2]) : a[2];
  v[3] = second ? __fsub_rn(a[1], a[3]) : a[3];
}

// values = the chunk after the strides below `block`.
__device__ __forceinline__ void transform_chunk(float* values, int block) {
#pragma unroll 1
  for (int log = 2; 1 << log < block; log += 2) {
    __syncthreads();
#pragma unroll 2
    for (int q = 0; q < kQuads; ++q) {
      const int quad = threadIdx.x + q * kThreads;
      const int first = (quad >> log << (log + 2)) + (quad & ((1 << log) - 1));
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = padded(values, first + (i << log));
      two_strides(v, 2 << log < block);
#pragma unroll
      for (int i = 0; i < 4; ++i) padded(values, first + (i << log)) = v[i];
    }
  }
  __syncthreads();
}

// Where a CTA works: a chunk of columns, the same in all its rows.
struct ChunkPlace {
  int first_row;
  int row_step;
  int chunk;  // first column
  int count;  // of columns from there on

  __device__ __forceinline__ explicit ChunkPlace(const PackParams& p) {
    const int chunks = (p.k + kChunk - 1) / kChunk;
    first_row = blockIdx.x / chunks;
    row_step = gridDim.x / chunks;
    chunk = (blockIdx.x - first_row * chunks) * kChunk;
    count = p.k - chunk;
  }
};

// values = the chunk of a row of x, rotated, without the norm; beyond the columns of x anything.
template <typename T>
__device__ __forceinline__ void rotate_chunk(const PackParams& p, const ChunkPlace& place, int row, float* values) {
  // Through shared memory: registers for both loads at once there are not.
  const auto raw = reinterpret_cast<uint4(*)[kThreads]>(values + kPaddedChunk);  // 8 columns a thread and half
  const int column = 8 * threadIdx.x;
  const T* from = static_cast<const T*>(p.x) + static_cast<int64_t>(row) * p.k + place.chunk + column;
  if (column < place.count) copy_async(shared_address(&raw[0][threadIdx.x]), from);
  if (column + kChunk / 2 < place.count) copy_async(shared_address(&raw[1][threadIdx.x]), from + kChunk / 2);
  commit_copies();
  wait_for_copies<0>();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int first = column + h * kChunk / 2;
    float d[8] = {};
    if (first < place.count) load_values(p.d + place.chunk + first, d);
    const uint4 words = raw[h][threadIdx.x];
    const T* x = reinterpret_cast<const T*>(&words);
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      float v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] = __fmul_rn(d[i + j], to_float(x[i + j]));
      two_strides(v, true);
#pragma unroll
      for (int j = 0; j < 4; ++j) padded(values, first + i + j) = v[j];
    }
  }
  transform_chunk(values, p.block);
}

// The grid is a multiple of the chunks of a row: a CTA keeps its chunk.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2048 / kThreads)
    pack_ctas_kernel(const __grid_constant__ PackParams p, float norm) {
  extern __shared__ __align__(16) float values[];
  launch_dependents();
  const ChunkPlace place(p);
  wait_for_primary();
  clear_flags(p);
#pragma unroll 1
  for (int row = place.first_row; row < p.m; row += place.row_step) {
    rotate_chunk<T>(p, place, row, values);
    auto* const out = static_cast<uint8_t*>(p.out) + (static_cast<int64_t>(place.chunk / 64) * p.padded_m + row) * 128;
#pragma unroll 2
    for (int q = 0; q < kQuads; ++q) {
      const int quad = threadIdx.x + q * kThreads;
      // Slots 4 quad .. + 3 hold columns 4 t + 2 h, + 1, and those of the next t (packed_slot).
      const int first = quad / 4 * 16 + quad % 2 * 8 + quad / 2 % 2 * 2;
      const auto scaled = [&](int i) { return __fmul_rn(padded(values, first + i), norm); };
      const int piece = quad / 2;  // of 16 bytes; 8 pieces are a row of 64 columns
      if (4 * quad >= place.count) break;
      *reinterpret_cast<uint2*>(out + static_cast<int64_t>(piece / 8) * p.padded_m * 128 + (piece % 8 ^ row % 8) * 16 +
                                quad % 2 * 8) = {pack2<T>(scaled(0), scaled(1)), pack2<T>(scaled(4), scaled(5))};
    }
    __syncthreads();  // `values` has been read
  }
}

// Of B, for the digits of a row of x: the sums of a token's digits fall to the lane that has those of column `row`
// of 16.
__device__ __forceinline__ int digit_row(int row) { return row / 8 * 16 + row % 2 * 8 + row % 8 / 2 * 2; }

template <typename T>
__global__ void __launch_bounds__(kThreads, 2048 / kThreads)
    pack_digits_kernel(const __grid_constant__ PackParams p, float norm) {
  extern __shared__ __align__(16) float values[];
  float* most_of_warp = values + kPaddedChunk;  // where x was
  launch_dependents();
  const ChunkPlace place(p);  // of one row
  wait_for_primary();
  clear_flags(p);
  rotate_chunk<T>(p, place, place.first_row, values);
  float most = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < min(kChunk, place.count); i += kThreads) {
    most = max_or_nan(most, fabsf(padded(values, i)));
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) most = max_or_nan(most, __shfl_xor_sync(~0u, most, step));
  if (threadIdx.x % kLanes == 0) most_of_warp[threadIdx.x / kLanes] = most;
  __syncthreads();
  most = max_or_nan(most_of_warp[0], most_of_warp[1]);
  if (threadIdx.x == 0)
    p.scales[place.chunk / kChunk * 16 + place.first_row] = most * (norm * kTrellisStep / kMostDigits);
  const float inverse = most > 1e-30f ? __fdividef(kMostDigits, most) : 0.0f;
  const int row = digit_row(place.first_row);
#pragma unroll 1
  for (int item = threadIdx.x; item < kChunk / 8 && item * 8 < place.count; item += kThreads) {
    const int piece = item % 8;  // of 16 bytes; 8 are a row of 64 columns
    const int step = item / 2;   // of 16 columns
    const int odd = item % 2;
    const int next = step / 16 * 16 + (step + 1) % 16;  // runs are circular in 256 columns
    uint32_t hi[4];
    uint32_t lo[4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int first = 16 * step + 4 * t + 2 * odd;
      const int second = p.shift == 2 ? 16 * next + 4 * t + 2 * odd : odd == 0 ? first + 2 : 16 * next + 4 * t;
      const uint2 digits = digits_of(
          {padded(values, first), padded(values, first + 1), padded(values, second), padded(values, second + 1)},
          inverse);
      hi[t] = digits.x;
      lo[t] = digits.y;
    }
    auto* const out = static_cast<uint4*>(p.out) + static_cast<int64_t>(place.chunk / 64 + item / 8) * 32 * 8;
    out[row * 8 + (piece ^ row % 8)] = make_uint4(hi[0], hi[1], hi[2], hi[3]);
    out[(row + 1) * 8 + (piece ^ (row + 1) % 8)] = make_uint4(lo[0], lo[1], lo[2], lo[3]);
  }
}

// --- many rows, and blocks with an odd factor: a warp per chunk

constexpr int kWarps = 8;

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

}  // namespace

void pack_x(const PackParams& params, DType dtype, Stream stream) {
  const BlockTransform transform = block_transform(params.block);
  const std::int64_t chunks = chunks_of(transform, params.k);
  const std::int64_t items = params.m * chunks;
  const int multiprocessors = current_device().multiprocessors;
  const auto each = static_cast<int>((items + multiprocessors - 1) / multiprocessors);
  if (params.scales != nullptr) {
    const float norm = hadamard_norm(params.block);
    const LaunchShape shape{static_cast<int>(items), kThreads, kCtaBytes};
    return dtype == DType::f16 ? launch_dependent<pack_digits_kernel<__half>>(shape, stream, params, norm)
                               : launch_dependent<pack_digits_kernel<__nv_bfloat16>>(shape, stream, params, norm);
  }
  if (each <= 2 * kResident && transform.runs == 1) {
    const std::int64_t rows = each <= kResident ? params.m : (params.m + 1) / 2;
    const LaunchShape shape{static_cast<int>(rows * chunks), kThreads,
                            each <= kResident ? kSpreadBytes[each] : kCtaBytes};
    const float norm = hadamard_norm(params.block);
    return dtype == DType::f16 ? launch_dependent<pack_ctas_kernel<__half>>(shape, stream, params, norm)
                               : launch_dependent<pack_ctas_kernel<__nv_bfloat16>>(shape, stream, params, norm);
  }
  const int warps = items < 8 * multiprocessors ? 1 : kWarps;  // few items: on as many multiprocessors as possible
  const LaunchShape shape{static_cast<int>((items + warps - 1) / warps), warps * kLanes,
                          warps * kChunkScratch * static_cast<int>(sizeof(float))};
  dtype == DType::f16 ? launch_dependent<pack_warps_kernel<__half>>(shape, stream, params, transform)
                      : launch_dependent<pack_warps_kernel<__nv_bfloat16>>(shape, stream, params, transform);
}

}  // namespace higgs::cuda
