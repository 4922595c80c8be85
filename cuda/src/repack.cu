// repack, unrepack and dequantize_rotated of the tiled layout: tables and scales here, index words per decoder.
#include "checks.h"
#include "decoder_ops.h"
#include "grid_points.h"
#include "higgs/cuda/ops.h"
#include "launch.h"
#include "numeric.cuh"
#include "trellis.cuh"
#include "trellis_table.h"

namespace higgs::cuda {
namespace {

// Field value -> `weights` points in fp16 and bf16 (a single one twice), of quads also in bytes. Indices of a field:
// lowest bits first. Of a sign-symmetric grid without the signs.
template <typename Points>
__global__ void table_kernel(const __grid_constant__ Points points, FieldShape field, __half* f16, __nv_bfloat16* bf16,
                             int8_t* bytes) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int values = field.weights == 4 ? 4 : 2;
  if (i >= values * field.entries()) return;
  const int c = field.weights == 1 ? 0 : i % values;
  const int index = (i / values >> (c / points.p * points.index_bits)) & ((1 << points.index_bits) - 1);
  const __half point = __ushort_as_half(points.values[index * points.p + c % points.p]);
  f16[i] = point;
  bf16[i] = __float2bfloat16_rn(__half2float(point));
  if (field.quads()) bytes[i] = static_cast<int8_t>(__float2int_rd(__half2float(point) / kQuadStep));
}

// The tables of a trellis: T1, T2 in signed bytes, and T1 + 128, 128 - T2, in the order of trellis.cuh.
__global__ void trellis_table_kernel(const __grid_constant__ TrellisTable trellis, uint8_t* bytes) {
  const int window = static_cast<int>(threadIdx.x);
  int i = 0;
  for (int b = 0; b < 8; ++b) i |= (window >> b & 1) << window_bit(trellis.bits, b);
  for (int c = 0; c < 4; ++c) {
    const int value = static_cast<int8_t>(trellis.entries[window] >> (8 * c) & 0xff);
    bytes[4 * i + c] = static_cast<uint8_t>(value);
    bytes[1024 + 4 * i + c] = static_cast<uint8_t>(c < 2 ? value + 128 : 128 - value);
  }
}

// stored [n, groups] -> tiled [row tile][group][16]
__global__ void tile_scales_kernel(const TiledLayer layer, const uint16_t* stored, uint16_t* tiled) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t groups = layer.tiled.row_groups;
  if (i >= layer.tiled.row_tiles * groups * kTileRows) return;
  const int64_t row = i / (kTileRows * groups) * kTileRows + i % kTileRows;
  tiled[i] = row < layer.n ? stored[row * groups + i / kTileRows % groups] : 0;
}

__global__ void untile_scales_kernel(const TiledLayer layer, const uint16_t* tiled, uint16_t* stored) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t groups = layer.tiled.row_groups;
  if (i >= layer.n * groups) return;
  const int64_t row = i / groups;
  stored[i] = tiled[((row / kTileRows) * groups + i % groups) * kTileRows + row % kTileRows];
}

constexpr int kThreads = 256;
unsigned blocks_for(std::int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

TiledLayer tiled_layer(const LayerFormat& f) { return {tiled_format(f), f.n, f.k, f.group, f.row_bytes()}; }

// The tensors in a tiled buffer of a grid without a matmul kernel, from row `row` on.
PackedView stored_view(const TiledView& tiled, std::int64_t row) {
  const LayerFormat& f = tiled.format;
  const TiledFormat t = tiled_format(f);
  const auto* data = reinterpret_cast<const std::uint8_t*>(tiled.data);
  return {f, data + t.weights + row * f.row_bytes(),
          reinterpret_cast<const std::uint16_t*>(data + t.scales) + row * f.row_groups()};
}

void copy_stored(const char* op, const PackedView& from, void* indices, void* scales, Stream stream) {
  const auto copy = [&](void* to, const void* source, std::int64_t bytes) {
    check(cudaMemcpyAsync(to, source, static_cast<std::size_t>(bytes), cudaMemcpyDeviceToDevice, to_stream(stream)),
          op);
  };
  copy(indices, from.indices, from.format.index_bytes());
  copy(scales, from.scales, 2 * from.format.n * from.format.row_groups());
}

}  // namespace

void repack(const PackedView& packed, std::byte* tiled, Stream stream) {
  const LayerFormat& f = packed.format;
  const TiledLayer layer = tiled_layer(f);
  check_pointer("repack", "tiled", tiled);
  if (f.n > 0) {
    check_pointer("repack", "indices", packed.indices);
    check_pointer("repack", "scales", packed.scales);
  }
  auto* out = reinterpret_cast<std::uint8_t*>(tiled);
  if (!supports_grid(*f.grid)) {
    return copy_stored("repack", packed, out + layer.tiled.weights, out + layer.tiled.scales, stream);
  }
  const DecoderOps& ops = decoder_ops(layer.tiled.field);
  if (f.grid->trellis != nullptr) {
    trellis_table_kernel<<<1, 256, 0, to_stream(stream)>>>(make_trellis_table(*f.grid), out + layer.tiled.table_bytes);
  } else {
    auto* f16 = reinterpret_cast<__half*>(out + layer.tiled.table_f16);
    auto* bf16 = reinterpret_cast<__nv_bfloat16*>(out + layer.tiled.table_bf16);
    with_points(*f.grid, [&](const auto& points) {
      table_kernel<<<blocks_for(layer.tiled.field.entries() * 4), kThreads, 0, to_stream(stream)>>>(
          points, layer.tiled.field, f16, bf16, reinterpret_cast<std::int8_t*>(out + layer.tiled.table_bytes));
    });
  }
  check(cudaGetLastError(), "repack");
  if (f.n == 0) return;
  tile_scales_kernel<<<blocks_for(layer.tiled.row_tiles * layer.tiled.row_groups * kTileRows), kThreads, 0,
                       to_stream(stream)>>>(layer, packed.scales,
                                            reinterpret_cast<std::uint16_t*>(out + layer.tiled.scales));
  check(cudaGetLastError(), "repack");
  ops.repack(layer, packed.indices, out + layer.tiled.weights, stream);
}

void unrepack(const TiledView& tiled, std::uint8_t* indices, std::uint16_t* scales, Stream stream) {
  const LayerFormat& f = tiled.format;
  const TiledLayer layer = tiled_layer(f);
  if (f.n == 0) return;
  check_pointer("unrepack", "tiled", tiled.data);
  check_pointer("unrepack", "indices", indices);
  check_pointer("unrepack", "scales", scales);
  if (!supports_grid(*f.grid)) return copy_stored("unrepack", stored_view(tiled, 0), indices, scales, stream);
  const auto* data = reinterpret_cast<const std::uint8_t*>(tiled.data);
  untile_scales_kernel<<<blocks_for(f.n * layer.tiled.row_groups), kThreads, 0, to_stream(stream)>>>(
      layer, reinterpret_cast<const std::uint16_t*>(data + layer.tiled.scales), scales);
  check(cudaGetLastError(), "unrepack");
  decoder_ops(layer.tiled.field).unrepack(layer, data + layer.tiled.weights, indices, stream);
}

void dequantize_rotated(const TiledView& tiled, void* out, DType out_dtype, Stream stream) {
  dequantize_rotated(tiled, 0, tiled.format.n, out, out_dtype, stream);
}

void dequantize_rotated(const TiledView& tiled, std::int64_t first_row, std::int64_t rows, void* out, DType out_dtype,
                        Stream stream) {
  TiledLayer layer = tiled_layer(tiled.format);
  if (first_row < 0 || first_row % kTileRows != 0 || rows < 0 || rows > layer.n - first_row) {
    throw Error(ErrorCode::invalid_argument, "dequantize_rotated: rows " + std::to_string(first_row) + " + " +
                                                 std::to_string(rows) + " of " + std::to_string(layer.n) +
                                                 "; start at a multiple of 16 and stay inside");
  }
  if (rows == 0) return;
  check_pointer("dequantize_rotated", "tiled", tiled.data);
  check_pointer("dequantize_rotated", "out", out);
  if (!supports_grid(*tiled.format.grid)) {
    PackedView stored = stored_view(tiled, first_row);
    stored.format.n = rows;
    dequantize_rotated(stored, out, out_dtype, stream);
    return;
  }
  // The rows as a layer of their own: its tables stay where they are.
  const std::int64_t first_tile = first_row / kTileRows;
  layer.n = rows;
  layer.tiled.row_tiles = (rows + kTileRows - 1) / kTileRows;
  layer.tiled.scales += first_tile * layer.tiled.row_groups * kTileRows * 2;
  layer.tiled.weights += first_tile * layer.tiled.tile_bytes;
  decoder_ops(layer.tiled.field)
      .dequantize_rotated(layer, reinterpret_cast<const std::uint8_t*>(tiled.data), out, out_dtype, stream);
}

}  // namespace higgs::cuda
