// Launchers. All pointers are device pointers (16-byte aligned), all work goes to `stream`; nothing allocates,
// synchronizes or copies from the host, so every call can be captured in a CUDA graph. Arguments are checked once here
// and throw higgs::Error; a failed launch throws Error(cuda). Any legal Hadamard block, except where said otherwise.
#pragma once

#include <cstdint>
#include <span>

#include "higgs/cuda/device.h"
#include "higgs/cuda/plan.h"
#include "higgs/cuda/tiled_format.h"
#include "higgs/packed_format.h"

namespace higgs::cuda {

// Which vector multiplies the columns before the rotation: that of x (sign / column_scale) or of weights
// (sign * column_scale).
enum class VectorKind { input, weight };

// out[k] fp32; column_scale fp16[k] or null (ones). Same bits as higgs::input_vector.
void rotation_vector(VectorKind kind, std::uint64_t seed, const std::uint16_t* column_scale, std::int64_t k, float* out,
                     Stream stream);

// out[i, :] = T (vector * in[i, :]) in fp32 with the orthonormal transform T of hadamard.h, rounded once to out_dtype.
// in, out: [rows, k], may be the same buffer if the dtypes have the same size; vector: fp32[k] or null (ones). Same
// bits as higgs::rotate.
void rotate(const void* in, DType in_dtype, std::int64_t rows, std::int64_t k, int block, const float* vector,
            void* out, DType out_dtype, Stream stream);

// Stored layout -> W^ [n, k]. Same bits as higgs::dequantize.
void dequantize(const PackedView& packed, void* out, DType out_dtype, Stream stream);

// The same before the inverse rotation: scale * point. y = rotate(x) @ this^T.
void dequantize_rotated(const PackedView& packed, void* out, DType out_dtype, Stream stream);

// From the tiled layout, so that a layer needs no second copy of its weights for large m: all rows, or `rows` of them
// from first_row, a multiple of kTileRows, so that `out` can be small.
void dequantize_rotated(const TiledView& tiled, void* out, DType out_dtype, Stream stream);
void dequantize_rotated(const TiledView& tiled, std::int64_t first_row, std::int64_t rows, void* out, DType out_dtype,
                        Stream stream);

// Float weights -> stored layout; same bits as higgs::quantize. w: [n, k] fp32, fp16 or bf16.
//   row_stats  fp64 [n, 2]: squared error and energy of each row (QuantizeResult before the sum), or null. A row with
//              a value that is not finite, or a scale beyond fp16, has a statistic that is not finite.
// k is at most kMaxQuantizeColumns (a row is held in shared memory), else Error(unsupported).
inline constexpr std::int64_t kMaxQuantizeColumns = 32768;
void quantize(const void* w, DType w_dtype, const LayerFormat& format, const std::uint16_t* column_scale,
              std::uint8_t* indices, std::uint16_t* scales, double* row_stats, Stream stream);

// Stored -> tiled (tiled_format(packed.format).bytes bytes) and back.
void repack(const PackedView& packed, std::byte* tiled, Stream stream);
void unrepack(const TiledView& tiled, std::uint8_t* indices, std::uint16_t* scales, Stream stream);

// y[m, n] = x[m, k] @ W^T (+ bias), m <= kMaxLinearRows; x is multiplied by d and rotated. fp32 accumulation in a fixed
// order: the same input gives the same bits, and rows do not influence each other. Up to kMaxParts matrices that
// share x (same k, block, group) go in one call; those with the same decoder go in one launch.
//
// Up to kMaxDecodeRows rows (on the largest layers half as many) one kernel does all, or two, the second of which
// starts while the first rotates x. More rows, and blocks with an odd factor, take two kernels: one that rotates x,
// then a GEMM. x * d is rounded to x's type and rotated in two steps with a rounding in between (where the block has an
// odd factor, in fp32): with fp16, |x * d| must stay below about 32000. With bf16 the error is about 1.5 times that of
// a bf16 matmul on dequantized weights.
//
// Weights and d are read while the kernel launched before may still run, if that one lets its dependents start early:
// they must not be results of such a kernel.
//
// Beyond linear_max_rows it is faster to rotate x (VectorKind::input), dequantize_rotated into a [n, k] buffer of x's
// dtype, and multiply by any GEMM. Rounding scale * point to the dtype is what makes that differ.
inline constexpr std::int64_t kMaxLinearRows = 1 << 20;
struct LinearPart {
  TiledView weights;
  const void* bias = nullptr;  // n values of y's dtype, or null
  void* y = nullptr;           // [m, n]
};
// d: fp32[k] from rotation_vector(VectorKind::input). workspace: linear_workspace_bytes(...) bytes, or null if 0.
// device: what the launches are planned for; another one than the current (an older one) only to test or time its
// kernels.
void linear(const void* x, DType dtype, std::int64_t m, const float* d, std::span<const LinearPart> parts,
            void* workspace, Stream stream, const DeviceProperties& device = current_device());
[[nodiscard]] std::int64_t linear_workspace_bytes(std::int64_t m, DType dtype, std::span<const LinearPart> parts,
                                                  const DeviceProperties& device = current_device());

// Up to how many rows of x `linear` is the fastest way; 0 for a dtype or grid it does not take.
[[nodiscard]] std::int64_t linear_max_rows(DType dtype, const LayerFormat& format,
                                           const DeviceProperties& device = current_device());

}  // namespace higgs::cuda
