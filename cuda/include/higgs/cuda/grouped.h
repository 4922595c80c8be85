// Experts of a mixture: many matrices of one format, of which every row of x meets one.
#pragma once

#include <cstdint>
#include <string>

#include "higgs/cuda/device.h"
#include "higgs/cuda/tiled_format.h"
#include "higgs/numeric.h"

namespace higgs::cuda {

struct GroupedProblem {
  LayerFormat weights;  // of all experts, one below the other: experts * n rows
  int experts = 0;
  std::int64_t rows = 0;  // of x, sorted by expert
  DType dtype = DType::f16;
};

// One launch of the kernel (grouped.cuh). An item is up to `tokens` rows of x that meet the same expert; how many there
// are is known on the device only. A CTA has row_groups x k_warps warps: a round of it multiplies `row_groups` row
// tiles by the whole of k. The parts of k depend on the format alone, so that a row has the same bits in any batch.
struct GroupedPlan {
  FieldShape field;
  DType dtype = DType::f16;
  int tokens = 0;
  int token_tiles = 1;  // 8 tokens each: 1 or 2
  int slices_per_warp = 0;
  int k_warps = 0;
  int row_groups = 0;
  int rounds = 0;     // of an item
  int max_items = 0;  // that any offsets can give
  int ctas = 0;
  int shared_bytes = 0;

  [[nodiscard]] int threads() const noexcept { return 32 * k_warps * row_groups; }
  [[nodiscard]] std::string to_string() const;
};

// Throws Error(invalid_argument) for experts that do not share the rows, or rows of x outside 1..16384;
// Error(unsupported) for a format without a kernel: trellis grids, rows of an expert no multiple of 16, more than 1024
// experts, k too long.
[[nodiscard]] GroupedPlan plan_grouped(const GroupedProblem& problem, const DeviceProperties& device);

// y[t, n] = x[t, k] @ W_e^T for rows of x sorted by expert e; offsets[e] (on the device, like all pointers) is the end
// of those of expert e, the last one `rows`. x is multiplied by d and rotated, as in linear (ops.h). Nothing is read
// back, so that a captured graph serves any offsets. workspace: as many bytes as x.
void grouped_linear(const GroupedProblem& problem, const std::byte* tiled, const void* x, const float* d,
                    const std::int32_t* offsets, void* y, void* workspace, Stream stream,
                    const DeviceProperties& device = current_device());

// Up to how many rows of x that is the fastest way; 0 for a dtype or format that it does not take. Beyond: rotate,
// dequantize_rotated and any grouped GEMM.
[[nodiscard]] std::int64_t grouped_linear_max_rows(const LayerFormat& weights, int experts, DType dtype,
                                                   const DeviceProperties& device = current_device());

}  // namespace higgs::cuda
