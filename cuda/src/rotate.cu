// rotate: out = T (vector * in), and the vectors. One warp per chunk (at most 1024 columns) of a row.
#include "checks.h"
#include "higgs/cuda/ops.h"
#include "launch.h"
#include "numeric.cuh"
#include "transform.cuh"

namespace higgs::cuda {
namespace {

constexpr int kWarps = 8;

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

}  // namespace higgs::cuda
