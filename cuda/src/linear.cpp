#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "checks.h"
#include "decoder_ops.h"
#include "gemv_params.h"
#include "higgs/cuda/ops.h"
#include "higgs/cuda/plan.h"
#include "launch.h"

namespace higgs::cuda {

namespace {

// Matrices that go in one launch: runs of the call's order with the same decoder.
std::vector<std::span<const LinearPart>> launch_groups(std::span<const LinearPart> parts) {
  std::vector<std::span<const LinearPart>> groups;
  std::size_t begin = 0;
  for (std::size_t i = 1; i <= parts.size(); ++i) {
    const bool same = i < parts.size() && i - begin < kMaxParts &&
                      can_share_launch(parts[begin].weights.format, parts[i].weights.format);
    if (!same) {
      groups.push_back(parts.subspan(begin, i - begin));
      begin = i;
    }
  }
  return groups;
}

LaunchPlan plan_group(std::int64_t m, DType dtype, std::span<const LinearPart> parts) {
  std::array<LayerFormat, kMaxParts> formats;
  for (std::size_t i = 0; i < parts.size(); ++i) formats[i] = parts[i].weights.format;
  return plan({m, dtype, {formats.data(), parts.size()}}, current_device());
}

void check_parts(const void* x, DType dtype, std::int64_t m, const float* d, std::span<const LinearPart> parts) {
  if (dtype == DType::f32) throw Error(ErrorCode::type, "linear: x is float32; use float16 or bfloat16");
  if (m < 0 || m > kMaxDecodeRows) {
    throw Error(ErrorCode::invalid_argument, "linear: m = " + std::to_string(m) +
                                                 " rows of x; use 0..16, and rotate + dequantize_rotated + GEMM above");
  }
  if (parts.empty()) throw Error(ErrorCode::invalid_argument, "linear: no matrices");
  for (const LinearPart& part : parts) {
    const LayerFormat& f = part.weights.format;
    validate(f);
    check_block("linear", f.block);
    const LayerFormat& first = parts[0].weights.format;
    if (f.k != first.k || f.block != first.block) {
      throw Error(ErrorCode::invalid_argument,
                  "linear: matrices of one call share x: the same k and block, not k = " + std::to_string(f.k) +
                      ", block = " + std::to_string(f.block) + " next to k = " + std::to_string(first.k) +
                      ", block = " + std::to_string(first.block));
    }
    check_pointer("linear", "weights", part.weights.data);
    if (m > 0 && f.n > 0) check_pointer("linear", "y", part.y);
  }
  if (m > 0) {
    check_pointer("linear", "x", x);
    check_pointer("linear", "d", d);
  }
}

GemvParams make_params(const LaunchPlan& plan, const void* x, const float* d, std::span<const LinearPart> parts,
                       float* workspace, std::int64_t row, int rows) {
  const LayerFormat& f = parts[0].weights.format;
  const TiledFormat t = warp_slices(plan, tiled_format(f));
  GemvParams p;
  p.x = static_cast<const std::uint16_t*>(x) + row * f.k;
  p.d = d;
  p.m = rows;
  p.k = static_cast<int>(f.k);
  p.group = static_cast<int>(f.group);
  p.slice_bytes = static_cast<int>(t.slice_bytes);
  p.tile_bytes = static_cast<int>(t.tile_bytes);
  p.inbox_floats = plan.inbox_floats;
  p.row_groups_of_scales = static_cast<std::uint16_t>(t.row_groups);
  p.norm = remaining_norm(f.block);
  p.iterations = static_cast<std::uint8_t>(plan.paired ? t.units_per_slice / iteration_units(t.field, true) : 1);
  p.slices = static_cast<std::uint16_t>(t.slices);
  p.block = static_cast<std::uint16_t>(f.block);
  p.part_count = static_cast<std::uint8_t>(parts.size());
  p.cluster = static_cast<std::uint8_t>(plan.cluster);
  p.units_per_slice = static_cast<std::uint8_t>(t.units_per_slice);
  p.last_units = static_cast<std::uint8_t>(t.last_units);
  p.cta_slices = static_cast<std::uint8_t>(plan.slices);
  p.cta_row_groups = static_cast<std::uint8_t>(plan.row_groups);
  p.batch = static_cast<std::uint8_t>(plan.batch);
  p.chunks = static_cast<std::uint8_t>(plan.chunks);
  p.rotate_warps = static_cast<std::uint8_t>(plan.rotate_warps);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const LinearPart& from = parts[i];
    const TiledFormat layout = tiled_format(from.weights.format);
    GemvPart& part = p.parts[i];
    part.data = reinterpret_cast<const std::uint8_t*>(from.weights.data);
    part.weights_offset = static_cast<std::uint32_t>(layout.weights / kTiledAlignment);
    part.bias = from.bias;
    part.y = static_cast<std::uint16_t*>(from.y) + row * from.weights.format.n;
    part.n = static_cast<int>(from.weights.format.n);
    part.first_cluster = plan.parts[i].first_cluster;
    part.clusters = plan.parts[i].clusters;
    const int per_round = part.clusters * plan.row_groups;
    part.to_next_block = std::int64_t{per_round} * block_tiles(t.field, plan.paired) * t.tile_bytes -
                         p.iterations * iteration_loads(t.field, plan.paired) * 16 * kLanes;
    part.scales_step = static_cast<int>(per_round * block_tiles(t.field, plan.paired) * t.row_groups * kTileRows);
    const std::int64_t blocks = row_blocks(plan, layout);
    part.rounds = static_cast<int>((blocks + per_round - 1) / per_round);
    part.partial = workspace;
    if (workspace != nullptr) workspace += rows * from.weights.format.n;
  }
  return p;
}

}  // namespace

std::int64_t linear_workspace_bytes(std::int64_t m, DType dtype, std::span<const LinearPart> parts) {
  std::int64_t bytes = 0;
  if (m == 0) return 0;
  for (const auto& group : launch_groups(parts)) {
    const LaunchPlan plan = plan_group(m, dtype, group);
    if (plan.k_launches == 1) continue;
    std::int64_t rows = 0;
    for (const LinearPart& part : group) rows += part.weights.format.n;
    bytes = std::max(bytes, rows * plan.rows * 4);
  }
  return bytes;
}

void linear(const void* x, DType dtype, std::int64_t m, const float* d, std::span<const LinearPart> parts,
            void* workspace, Stream stream) {
  check_parts(x, dtype, m, d, parts);
  if (m == 0) return;
  for (const auto& group : launch_groups(parts)) {
    const LaunchPlan full = plan_group(m, dtype, group);
    if (full.k_launches > 1) check_pointer("linear", "workspace", workspace);
    const DecoderOps& ops = decoder_ops(full.field);
    for (std::int64_t row = 0; row < m; row += full.rows) {
      const int rows = static_cast<int>(std::min<std::int64_t>(full.rows, m - row));
      const LaunchPlan part_plan = rows == full.rows ? full : plan_group(rows, dtype, group);
      float* partial = part_plan.k_launches > 1 ? static_cast<float*>(workspace) : nullptr;
      GemvParams params = make_params(part_plan, x, d, group, partial, row, rows);
      for (int i = 0; i < part_plan.k_launches; ++i) {
        params.first_slice = static_cast<std::uint16_t>(i * part_plan.cluster * part_plan.slices);
        params.add_partial = i > 0;
        params.store_partial = i + 1 < part_plan.k_launches;
        ops.gemv(part_plan, params, stream);
      }
    }
  }
}

}  // namespace higgs::cuda
