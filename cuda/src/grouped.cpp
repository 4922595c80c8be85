#include "higgs/cuda/grouped.h"

#include <algorithm>

#include "checks.h"
#include "decoder_ops.h"
#include "grouped_params.h"
#include "pack_x.h"

namespace higgs::cuda {
namespace {

constexpr int kTableBytes = 65536;  // of every decoder (decode.cuh)
constexpr int kMaxWarps = 16;
constexpr int kMaxExperts = 1024;
constexpr std::int64_t kMaxRows = 16384;
// Items of an expert from which on it takes less time to decode all weights and multiply them by a GEMM. Measured on an
// H200 with bf16 and 4 bits: the kernel takes a time for each item, the GEMM (up to here) one for each expert, that of
// 5 to 9 items.
constexpr std::int64_t kDecodedFromItems = 5;

template <typename T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

void check_problem(const GroupedProblem& p) {
  validate(p.weights);
  if (p.dtype == DType::f32) throw Error(ErrorCode::type, "grouped_linear: x is float32; use float16 or bfloat16");
  if (p.experts < 1 || p.weights.n % p.experts != 0) {
    throw Error(ErrorCode::invalid_argument, "grouped_linear: " + std::to_string(p.experts) +
                                                 " experts cannot share n = " + std::to_string(p.weights.n) + " rows");
  }
  if (p.rows < 1 || p.rows > kMaxRows) {
    throw Error(ErrorCode::invalid_argument,
                "grouped_linear: " + std::to_string(p.rows) + " rows of x; use 1.." + std::to_string(kMaxRows));
  }
}

[[noreturn]] void unsupported(const std::string& what) {
  throw Error(ErrorCode::unsupported, "grouped_linear: " + what + "; use rotate, dequantize_rotated and a GEMM");
}

// Cuts k among the warps of a CTA: into many parts, as those are the short ones, of which few warps stay without.
void split_k(GroupedPlan& p, int slices) {
  int most = 0;
  for (int each = 1; each <= slices; ++each) {
    const int parts = ceil_div(slices, each);
    if (parts > kMaxWarps) continue;
    const int groups = kMaxWarps / parts;
    const int busy = 100 * groups * slices / each;  // warps in work, the last part of k being shorter
    if (busy <= most) continue;
    p.slices_per_warp = each;
    p.k_warps = parts;
    p.row_groups = groups;
    if (busy >= 1400) return;
    most = busy;
  }
}

int shared_bytes(const GroupedPlan& p, const GroupedProblem& problem) {
  const int k = static_cast<int>(problem.weights.k);
  return kTableBytes + grouped_item_bytes(p.max_items, problem.experts) +
         2 * grouped_partial_bytes(p.k_warps * p.row_groups, p.tokens) + p.tokens * grouped_x_stride(k) * 2;
}

}  // namespace

GroupedPlan plan_grouped(const GroupedProblem& problem, const DeviceProperties& device) {
  check_problem(problem);
  const TiledFormat t = tiled_format(problem.weights);
  const std::int64_t n = problem.weights.n / problem.experts;
  if (t.field.trellis()) unsupported("no kernel for trellis grids");
  if (n % kTileRows != 0) unsupported("experts of " + std::to_string(n) + " rows, no multiple of 16");
  if (problem.experts > kMaxExperts) unsupported(std::to_string(problem.experts) + " experts, more than 1024");
  GroupedPlan p;
  p.field = t.field;
  p.dtype = problem.dtype;
  split_k(p, t.slices);
  const auto row_tiles = static_cast<int>(n / kTileRows);
  p.rounds = ceil_div(row_tiles, p.row_groups);
  const std::int64_t active = std::min<std::int64_t>(problem.rows, problem.experts);
  // Two tiles of 8 tokens cost loads of x: only where experts have more than 8 rows on average.
  for (p.tokens = problem.rows > 8 * active ? 16 : 8; p.tokens > 0; --p.tokens) {
    p.max_items = static_cast<int>(active + (problem.rows - active) / p.tokens);
    p.shared_bytes = shared_bytes(p, problem);
    if (p.shared_bytes <= device.shared_bytes_per_block) break;
  }
  if (p.tokens == 0) unsupported("k = " + std::to_string(problem.weights.k) + " does not fit in shared memory");
  p.token_tiles = p.tokens > 8 ? 2 : 1;
  p.ctas = static_cast<int>(std::min<std::int64_t>(device.multiprocessors, std::int64_t{p.max_items} * p.rounds));
  return p;
}

std::string GroupedPlan::to_string() const {
  std::string s = "field " + std::to_string(field.bits) + "b/" + std::to_string(field.weights) + "w " + name_of(dtype);
  const auto add = [&](const char* name, int value) { s += std::string(" ") + name + "=" + std::to_string(value); };
  add("tokens", tokens);
  add("ctas", ctas);
  add("threads", threads());
  add("slices_per_warp", slices_per_warp);
  add("k_warps", k_warps);
  add("row_groups", row_groups);
  add("rounds", rounds);
  add("max_items", max_items);
  add("shared", shared_bytes);
  return s;
}

void grouped_linear(const GroupedProblem& problem, const std::byte* tiled, const void* x, const float* d,
                    const std::int32_t* offsets, void* y, void* workspace, Stream stream,
                    const DeviceProperties& device) {
  const GroupedPlan plan = plan_grouped(problem, device);
  check_pointer("grouped_linear", "weights", tiled);
  check_pointer("grouped_linear", "x", x);
  check_pointer("grouped_linear", "d", d);
  check_pointer("grouped_linear", "offsets", offsets);
  check_pointer("grouped_linear", "y", y);
  check_pointer("grouped_linear", "workspace", workspace);
  const LayerFormat& f = problem.weights;
  const auto rows = static_cast<int>(problem.rows);
  const auto k = static_cast<int>(f.k);
  pack_x({.x = x, .d = d, .out = workspace, .m = rows, .padded_m = rows, .k = k, .block = f.block}, problem.dtype,
         stream);
  const TiledFormat t = tiled_format(f);
  GroupedParams p;
  static_cast<SliceParams&>(p) = slice_params(t);
  p.x = workspace;
  p.offsets = offsets;
  p.data = reinterpret_cast<const std::uint8_t*>(tiled);
  p.y = y;
  p.weights_offset = static_cast<std::uint32_t>(t.weights / kTiledAlignment);
  p.experts = problem.experts;
  p.rows = rows;
  p.n = static_cast<int>(f.n / problem.experts);
  p.row_tiles = p.n / kTileRows;
  p.k = k;
  p.group_halves = static_cast<int>(f.group / kColumnAlignment);
  p.tokens = plan.tokens;
  p.slices_per_warp = plan.slices_per_warp;
  p.k_warps = plan.k_warps;
  p.row_groups = plan.row_groups;
  p.rounds = plan.rounds;
  p.max_items = plan.max_items;
  decoder_ops(plan.field).grouped(plan, p, stream);
}

std::int64_t grouped_linear_max_rows(const LayerFormat& weights, int experts, DType dtype,
                                     const DeviceProperties& device) {
  if (dtype == DType::f32) return 0;
  for (std::int64_t rows = kMaxRows; rows > 0; rows /= 2) {
    try {
      const GroupedPlan p = plan_grouped({weights, experts, rows, dtype}, device);
      return std::min(rows, kDecodedFromItems * p.tokens * experts);
    } catch (const Error& e) {
      if (e.code() != ErrorCode::unsupported) throw;  // as the list of items of so many rows takes shared memory
    }
  }
  return 0;
}

}  // namespace higgs::cuda
