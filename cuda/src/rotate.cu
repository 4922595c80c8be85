// rotate: out = T (vector * in), and the vectors. One warp per chunk (at most 1024 columns) of a row.
#include "checks.h"
#include "higgs/cuda/ops.h"
#include "launch.h"
#include "numeric.cuh"
#include "pack_x.h"
#include "ptx.cuh"
#include "transform.cuh"

namespace higgs::cuda {
namespace {

constexpr int kWarps = 8;

// v[j] = vector[32 lane + j] * in[32 lane + j] of a chunk with `count` columns (0 beyond); vector may be null. Loads
// are coalesced, the products change lanes through scratch (kChunkScratch words of this warp).
template <typename In>
__device__ __forceinline__ void load_chunk(const In* in, const float* vector, int64_t count, float* scratch, int lane,
                                           float (&v)[32]) {
  constexpr int kPieces = 4;  // of 8 values per lane
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int column = 8 * (lane + kLanes * i);
    float x[8] = {};
    if (column < count) {
      load_values(in + column, x);
      if (vector != nullptr) {
        float d[8];
        load_values(vector + column, d);
#pragma unroll
        for (int j = 0; j < 8; ++j) x[j] = __fmul_rn(d[j], x[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) scratch[column / 32 * 33 + column % 32 + j] = x[j];
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 32; ++j) v[j] = scratch[lane * 33 + j];
  __syncwarp();
}

template <typename In, typename Out>
__global__ void __launch_bounds__(kWarps * 32)
    rotate_kernel(const In* in, int64_t rows, int64_t k, const __grid_constant__ BlockTransform transform,
                  const float* vector, Out* out) {
  __shared__ float scratch[kWarps][kChunkScratch];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t chunks = chunks_of(transform, k);
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (item >= rows * chunks) return;
  const int64_t chunk = item % chunks * transform.columns;
  const int64_t row = item / chunks * k;
  const int64_t count = min(k - chunk, static_cast<int64_t>(transform.columns));
  float v[32];
  load_chunk(in + row + chunk, vector == nullptr ? nullptr : vector + chunk, count, scratch[warp], lane, v);
  warp_transform(v, transform, scratch[warp], lane);
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    if (j * 32 < count) out[row + chunk + j * 32 + lane] = from_float<Out>(v[j]);
  }
}

// Where column c of 64 goes in a row of packed x: the k order of decode.cuh within 16 columns.
__device__ __forceinline__ int packed_slot(int c) {
  const int t = c % 16 / 4;
  return c / 16 * 16 + c % 4 / 2 * 8 + 2 * t + c % 2;
}

template <typename T>
__global__ void __launch_bounds__(kWarps * 32)
    pack_x_kernel(const __grid_constant__ PackParams p, const __grid_constant__ BlockTransform transform) {
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
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < p.flag_count; i += blockDim.x) p.flags[i] = 0;
  }
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

__global__ void vector_kernel(VectorKind kind, uint64_t seed, const uint16_t* column_scale, int64_t k, float* out) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (j >= k) return;
  const float sign = sign_of_column(seed, j);
  const float scale = column_scale == nullptr ? 1.0f : __half2float(__ushort_as_half(column_scale[j]));
  out[j] = kind == VectorKind::input ? __fdiv_rn(sign, scale) : __fmul_rn(sign, scale);
}

}  // namespace

void rotation_vector(VectorKind kind, std::uint64_t seed, const std::uint16_t* column_scale, std::int64_t k, float* out,
                     Stream stream) {
  if (k <= 0 || k % kColumnAlignment != 0) {
    throw Error(ErrorCode::invalid_argument,
                "rotation_vector: k = " + std::to_string(k) + "; use a positive multiple of 64");
  }
  check_pointer("rotation_vector", "out", out);
  vector_kernel<<<static_cast<unsigned>((k + 255) / 256), 256, 0, to_stream(stream)>>>(kind, seed, column_scale, k,
                                                                                       out);
  check(cudaGetLastError(), "rotation_vector");
}

void rotate(const void* in, DType in_dtype, std::int64_t rows, std::int64_t k, int block, const float* vector,
            void* out, DType out_dtype, Stream stream) {
  validate(LayerFormat{&grids()[0], rows, k, block, block, 0});
  if (rows == 0) return;
  check_pointer("rotate", "in", in);
  check_pointer("rotate", "out", out);
  if (vector != nullptr) check_pointer("rotate", "vector", vector);
  const BlockTransform transform = block_transform(block);
  const std::int64_t items = rows * chunks_of(transform, k);
  const auto blocks = static_cast<unsigned>((items + kWarps - 1) / kWarps);
  dispatch(in_dtype, [&]<typename In>() {
    dispatch(out_dtype, [&]<typename Out>() {
      rotate_kernel<<<blocks, kWarps * 32, 0, to_stream(stream)>>>(static_cast<const In*>(in), rows, k, transform,
                                                                   vector, static_cast<Out*>(out));
    });
  });
  check(cudaGetLastError(), "rotate");
}

void pack_x(const PackParams& params, DType dtype, Stream stream) {
  const BlockTransform transform = block_transform(params.block);
  const std::int64_t items = params.m * chunks_of(transform, params.k);
  const int warps = items < 8 * current_device().multiprocessors ? 1 : kWarps;  // few items: on as many SMs as possible
  const LaunchShape shape{static_cast<int>((items + warps - 1) / warps), warps * kLanes,
                          warps * kChunkScratch * static_cast<int>(sizeof(float))};
  if (dtype == DType::f16) {
    launch_dependent<pack_x_kernel<__half>>(shape, stream, params, transform);
  } else {
    launch_dependent<pack_x_kernel<__nv_bfloat16>>(shape, stream, params, transform);
  }
}

}  // namespace higgs::cuda
