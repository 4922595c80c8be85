// quantize: float weights -> stored layout; FORMAT.md, "From weights to bytes", bit for bit. One block per row:
//   1. rotate the row into shared memory, one warp per chunk (at most 1024 columns)
//   2. per scale group: energy -> first scale
//   3. nearest point of every run of p values by trying all points, four runs per thread so that one shared-memory
//      broadcast of a point serves them all
//   4. per scale group: least-squares scale; then pack
// Shared memory: the row (4 k bytes; during rotation also a scratch per warp), indices (at most k bytes), group results
// (24 bytes each), 256 points at a time.
#include "checks.h"
#include "grid_points.h"
#include "higgs/cuda/ops.h"
#include "launch.h"
#include "quantize_row.cuh"
#include "quantize_trellis.h"

namespace higgs::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kPointsAtOnce = 256;
constexpr int kRuns = 4;  // runs of p values per thread and pass over the points

template <int P>
struct alignas(P == 1   ? 8
               : P == 2 ? 16
                        : 32) ScoredPoint {
  float half_norm;
  float g[P];
};

template <int P, typename Points>
__device__ __forceinline__ void load_points(const Points& points, int first, ScoredPoint<P>* out) {
  for (int i = threadIdx.x; i < min(kPointsAtOnce, (1 << points.value_bits) - first); i += kThreads) {
    ScoredPoint<P> s;
    double norm = 0;
    for (int c = 0; c < P; ++c) {
      s.g[c] = __half2float(__ushort_as_half(points.values[(first + i) * P + c]));
      norm = __dadd_rn(norm, __dmul_rn(s.g[c], s.g[c]));  // products of fp16 values are exact
    }
    s.half_norm = __double2float_rn(norm / 2);
    out[i] = s;
  }
}

// Index of the nearest point for runs base, base + kThreads, ..., to indices (uint8 or uint16). In a sign-symmetric
// grid that is the nearest magnitude to the absolute values, and their signs.
template <int P, typename Points, typename Index>
__device__ void find_nearest(const QuantizeLayer& layer, const Points& points, const float* row,
                             const GroupState* groups, ScoredPoint<P>* shared_points, Index* indices) {
  const int runs = layer.k / P;
  const int n_points = 1 << points.value_bits;
  const bool with_signs = points.index_bits > points.value_bits;
  for (int base = 0; base < runs; base += kThreads * kRuns) {
    float u[kRuns][P];
    float best[kRuns];
    int at[kRuns] = {};
    int signs[kRuns] = {};
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const int run = min(base + r * kThreads + static_cast<int>(threadIdx.x), runs - 1);
      const float inverse = groups[run * P / layer.group].inverse;
      for (int c = 0; c < P; ++c) {
        u[r][c] = -__fmul_rn(row[run * P + c], inverse);
        if (!with_signs) continue;
        signs[r] |= (u[r][c] > 0 ? n_points : 0) << c;
        u[r][c] = -fabsf(u[r][c]);
      }
      best[r] = __int_as_float(0x7f800000);
    }
    for (int first = 0; first < n_points; first += kPointsAtOnce) {
      if (n_points > kPointsAtOnce) {
        __syncthreads();
        load_points<P>(points, first, shared_points);
        __syncthreads();
      }
      const int count = min(kPointsAtOnce, n_points - first);
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const ScoredPoint<P> s = shared_points[i];
#pragma unroll
        for (int r = 0; r < kRuns; ++r) {
          float t = s.half_norm;
#pragma unroll
          for (int c = 0; c < P; ++c) t = __fmaf_rn(u[r][c], s.g[c], t);
          const bool less = t < best[r];
          best[r] = less ? t : best[r];
          at[r] = less ? first + i : at[r];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const int run = base + r * kThreads + static_cast<int>(threadIdx.x);
      if (run < runs) indices[run] = static_cast<Index>(at[r] | signs[r]);
    }
  }
}

template <typename Index>
__device__ __forceinline__ void pack_row(int count, int index_bits, const Index* indices, uint8_t* out) {
  for (int i = static_cast<int>(threadIdx.x) * 8; i < count; i += kThreads * 8) {  // 8 indices make index_bits bytes
    uint8_t* at = out + i / 8 * index_bits;
    uint32_t pending = 0;
    int bits = 0;
    for (int j = 0; j < 8; ++j) {
      pending |= static_cast<uint32_t>(indices[i + j]) << bits;
      for (bits += index_bits; bits >= 8; bits -= 8, pending >>= 8) *at++ = static_cast<uint8_t>(pending);
    }
  }
}

template <typename T, int P, typename Points>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const __grid_constant__ Points points, const __grid_constant__ BlockTransform transform,
                    const QuantizeLayer layer, const T* w) {
  using Index = std::conditional_t<(P > 1), uint16_t, uint8_t>;
  extern __shared__ __align__(32) uint8_t shared[];
  auto* shared_points = reinterpret_cast<ScoredPoint<P>*>(shared);
  auto* groups = reinterpret_cast<GroupState*>(shared_points + kPointsAtOnce);
  auto* row = reinterpret_cast<float*>(groups + layer.row_groups);
  auto* indices = reinterpret_cast<Index*>(row + layer.k);
  auto* scratch = reinterpret_cast<float*>(indices);  // rotation comes before the indices
  const int64_t n_row = blockIdx.x;

  rotate_row(layer, transform, w + n_row * layer.k, row, scratch);
  load_points<P>(points, 0, shared_points);
  __syncthreads();
  first_scales(layer, row, groups);
  __syncthreads();
  find_nearest<P>(layer, points, row, groups, shared_points, indices);
  __syncthreads();
  refit_scales(layer, row, groups, layer.scales + n_row * layer.row_groups, [&](int column) -> double {
    return point_value(points, points.values, indices[column / P], column % P);
  });
  pack_row(layer.k / P, points.index_bits, indices, layer.indices + n_row * layer.row_bytes);
  store_row_stats(layer, groups, n_row);
}

template <typename T, int P, typename Points>
void launch_quantize(const Points& points, int block, const QuantizeLayer& layer, int64_t n, const void* w,
                     Stream stream) {
  const int after_row = std::max(kWarps * kChunkScratch * 4, P == 1 ? layer.k : layer.k / P * 2);
  const int shared = kPointsAtOnce * static_cast<int>(sizeof(ScoredPoint<P>)) +
                     layer.row_groups * static_cast<int>(sizeof(GroupState)) + layer.k * 4 + after_row;
  const int limit = current_device().shared_bytes_per_block;
  if (shared > limit) {
    throw Error(ErrorCode::unsupported, "quantize: a row of k = " + std::to_string(layer.k) + " needs " +
                                            std::to_string(shared) + " bytes of shared memory; this device has " +
                                            std::to_string(limit));
  }
  allow_shared<quantize_kernel<T, P, Points>>(limit);
  quantize_kernel<T, P, Points>
      <<<static_cast<unsigned>(n), kThreads, static_cast<std::size_t>(shared), to_stream(stream)>>>(
          points, block_transform(block), layer, static_cast<const T*>(w));
}

}  // namespace

void quantize(const void* w, DType w_dtype, const LayerFormat& format, const std::uint16_t* column_scale,
              std::uint8_t* indices, std::uint16_t* scales, double* row_stats, Stream stream) {
  validate(format);
  if (format.n == 0) return;
  if (format.k > kMaxQuantizeColumns) {
    throw Error(ErrorCode::unsupported, "quantize: k = " + std::to_string(format.k) + "; the GPU takes at most " +
                                            std::to_string(kMaxQuantizeColumns));
  }
  check_pointer("quantize", "w", w);
  check_pointer("quantize", "indices", indices);
  check_pointer("quantize", "scales", scales);
  const QuantizeLayer layer{column_scale,
                            indices,
                            scales,
                            row_stats,
                            format.row_bytes(),
                            format.seed,
                            static_cast<int>(format.k),
                            static_cast<int>(format.group),
                            static_cast<int>(format.row_groups())};
  if (format.grid->trellis != nullptr) {
    quantize_trellis(*format.grid, format.block, layer, format.n, w, w_dtype, stream);
    check(cudaGetLastError(), "quantize");
    return;
  }
  with_points(*format.grid, [&](const auto& points) {
    dispatch(w_dtype, [&]<typename T>() {
      switch (format.grid->p) {
        case 1: return launch_quantize<T, 1>(points, format.block, layer, format.n, w, stream);
        case 2: return launch_quantize<T, 2>(points, format.block, layer, format.n, w, stream);
        default: return launch_quantize<T, 4>(points, format.block, layer, format.n, w, stream);
      }
    });
  });
  check(cudaGetLastError(), "quantize");
}

}  // namespace higgs::cuda
