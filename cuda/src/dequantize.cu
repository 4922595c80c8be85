// dequantize, dequantize_rotated from the stored layout. One warp per chunk (at most 1024 columns) of a row; the
// arithmetic and its order are those of FORMAT.md, "From bytes to weights".
#include "bits.cuh"
#include "checks.h"
#include "grid_points.h"
#include "higgs/cuda/ops.h"
#include "launch.h"
#include "numeric.cuh"
#include "transform.cuh"
#include "trellis_run.cuh"
#include "trellis_table.h"

namespace higgs::cuda {
namespace {

constexpr int kWarps = 4;

struct StoredLayer {
  const uint8_t* indices;
  const uint16_t* scales;
  const uint16_t* column_scale;
  int64_t n;
  int64_t k;
  int64_t row_bytes;
  int64_t row_groups;
  int64_t group;
  uint64_t seed;
};

// The values of a grid in shared memory and what a stored row says about a column, without its scale, and about 32.
template <int Capacity>
__device__ __forceinline__ void fill_table(const GridPoints<Capacity>& points, uint16_t* table) {
  for (int i = threadIdx.x; i < points.p << points.value_bits; i += blockDim.x) table[i] = points.values[i];
}
template <int Capacity>
__device__ __forceinline__ float stored_value(const GridPoints<Capacity>& points, const uint16_t* table,
                                              const StoredLayer& layer, const uint8_t* bytes, int64_t column) {
  const int64_t index = column / points.p;  // one read of an index per value: cheap next to the rest
  const uint32_t which = read_bits(bytes, layer.row_bytes, index * points.index_bits, points.index_bits);
  return point_value(points, table, which, static_cast<int>(column % points.p));
}
__device__ __forceinline__ void fill_table(const TrellisTable& trellis, uint16_t* table) {
  for (int i = threadIdx.x; i < 256; i += blockDim.x) reinterpret_cast<uint32_t*>(table)[i] = trellis.entries[i];
}
__device__ __forceinline__ float stored_value(const TrellisTable& trellis, const uint16_t* table,
                                              const StoredLayer& layer, const uint8_t* bytes, int64_t column) {
  const int in_group = static_cast<int>(column % kRunGroup);
  const StoredRun run(bytes, layer.k, column / kRunGroup, in_group / 4 % 4, trellis.bits);
  const int step = in_group / 16 * 2 + in_group % 4 / 2;
  const auto* entries = reinterpret_cast<const int8_t*>(table) + in_group % 2;
  const int lo = entries[run.window(step * trellis.bits) * 4 + 2];
  const int hi = entries[run.window((step + trellis.shift) * trellis.bits) * 4];
  return static_cast<float>(lo + hi) * kTrellisStep;
}

template <typename Points>
__device__ __forceinline__ void stored_values(const Points& points, const uint16_t* table, const StoredLayer& layer,
                                              const uint8_t* bytes, int64_t column, float scale, float (&v)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) v[i] = __fmul_rn(scale, stored_value(points, table, layer, bytes, column + i));
}
__device__ __forceinline__ void fill_table(const HashedTrellis& trellis, uint16_t* table) {
  for (int i = threadIdx.x; i < trellis.p * trellis.rows; i += blockDim.x) table[i] = trellis.values[i];
}
// One window, one multiplication and p / 2 look-ups of two weights a step.
__device__ __forceinline__ void stored_values(const HashedTrellis& trellis, const uint16_t* table,
                                              const StoredLayer& layer, const uint8_t* bytes, int64_t column,
                                              float scale, float (&v)[32]) {
  LongRun run(bytes, layer.k, column, trellis.p, trellis.bits);
  const auto* pairs = reinterpret_cast<const uint32_t*>(table);
  const int pairs_per_step = trellis.p / 2;
  uint32_t hash = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int c = i & (pairs_per_step - 1);
    if (c == 0) hash = run.next() * trellis.multiplier;
    const uint32_t signs = (hash << c) & 0x80008000u;
    const uint32_t pair = pairs[(hash >> 16 & (trellis.rows - 1)) * pairs_per_step + c] ^ signs;
    v[2 * i] = __fmul_rn(scale, __half2float(__ushort_as_half(static_cast<uint16_t>(pair))));
    v[2 * i + 1] = __fmul_rn(scale, __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> 16))));
  }
}

template <typename Points, typename T, bool Unrotate>
__global__ void __launch_bounds__(kWarps * 32)
    dequantize_kernel(const __grid_constant__ Points points, const __grid_constant__ BlockTransform transform,
                      const StoredLayer layer, T* out) {
  extern __shared__ __align__(16) uint8_t shared[];
  auto* table = reinterpret_cast<uint16_t*>(shared);
  auto* scratch = reinterpret_cast<float*>(shared + Points::kCapacity * 2);
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  fill_table(points, table);
  __syncthreads();

  const int64_t chunks = chunks_of(transform, layer.k);
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + warp; item < layer.n * chunks;
       item += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t chunk = item % chunks * transform.columns;
    const int64_t row = item / chunks;
    const int64_t count = min(layer.k - chunk, static_cast<int64_t>(transform.columns));
    const int64_t column = chunk + lane * 32;
    float v[32] = {};
    if (lane * 32 < count) {
      const uint8_t* bytes = layer.indices + row * layer.row_bytes;
      const uint16_t scale_bits = layer.scales[row * layer.row_groups + column / layer.group];
      const float scale = __half2float(__ushort_as_half(scale_bits));
      stored_values(points, table, layer, bytes, column, scale, v);
    }
    if constexpr (Unrotate) {
      warp_transform(v, transform, scratch + warp * kChunkScratch, lane);
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        const int64_t at = chunk + j * 32 + lane;
        if (j * 32 >= count) continue;
        const float sign = sign_of_column(layer.seed, at);
        const float d = layer.column_scale == nullptr
                            ? sign
                            : __fdiv_rn(sign, __half2float(__ushort_as_half(layer.column_scale[at])));
        out[row * layer.k + at] = from_float<T>(__fmul_rn(d, v[j]));
      }
    } else if (lane * 32 < count) {
      constexpr int kPerStore = 16 / sizeof(T);
#pragma unroll
      for (int i = 0; i < 32 / kPerStore; ++i) {
        alignas(16) T packed[kPerStore];
#pragma unroll
        for (int j = 0; j < kPerStore; ++j) packed[j] = from_float<T>(v[i * kPerStore + j]);
        reinterpret_cast<uint4*>(out + row * layer.k + column)[i] = *reinterpret_cast<const uint4*>(packed);
      }
    }
  }
}

template <bool Unrotate>
void launch_dequantize(const char* op, const PackedView& packed, void* out, DType out_dtype, Stream stream) {
  const LayerFormat& f = packed.format;
  validate(f);
  if (f.n == 0) return;
  check_pointer(op, "indices", packed.indices);
  check_pointer(op, "scales", packed.scales);
  check_pointer(op, "out", out);
  const StoredLayer layer{packed.indices, packed.scales, packed.column_scale, f.n, f.k, f.row_bytes(), f.row_groups(),
                          f.group,        f.seed};
  const BlockTransform transform = block_transform(Unrotate ? f.block : kMaxBlock);
  const std::int64_t items = f.n * chunks_of(transform, f.k);
  const auto blocks = static_cast<unsigned>(std::min<std::int64_t>((items + kWarps - 1) / kWarps, 1 << 16));
  const auto launch = [&](const auto& points) {
    using Points = std::decay_t<decltype(points)>;
    constexpr int kShared = Points::kCapacity * 2 + (Unrotate ? kWarps * kChunkScratch * 4 : 0);
    static_assert(kShared <= 48 * 1024);
    dispatch(out_dtype, [&]<typename T>() {
      dequantize_kernel<Points, T, Unrotate>
          <<<blocks, kWarps * 32, kShared, to_stream(stream)>>>(points, transform, layer, static_cast<T*>(out));
    });
  };
  if (is_additive(*f.grid)) {
    launch(make_trellis_table(*f.grid));
  } else if (f.grid->trellis != nullptr) {
    launch(make_hashed_trellis(*f.grid));
  } else {
    with_points(*f.grid, launch);
  }
  check(cudaGetLastError(), op);
}

}  // namespace

void dequantize(const PackedView& packed, void* out, DType out_dtype, Stream stream) {
  launch_dequantize<true>("dequantize", packed, out, out_dtype, stream);
}

void dequantize_rotated(const PackedView& packed, void* out, DType out_dtype, Stream stream) {
  launch_dequantize<false>("dequantize_rotated", packed, out, out_dtype, stream);
}

}  // namespace higgs::cuda
