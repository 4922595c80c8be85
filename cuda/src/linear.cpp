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
#include "pack_x.h"
#include "prepare_x.h"
#include "trellis_table.h"

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

// Plans a launch by `make` (plan or plan_gemm).
auto plan_group(auto make, std::int64_t m, DType dtype, std::span<const LinearPart> parts,
                const DeviceProperties& device) {
  std::array<LayerFormat, kMaxParts> formats;
  for (std::size_t i = 0; i < parts.size(); ++i) formats[i] = parts[i].weights.format;
  return make({m, dtype, {formats.data(), parts.size()}}, device);
}

void check_parts(const void* x, DType dtype, std::int64_t m, const float* d, std::span<const LinearPart> parts) {
  if (dtype == DType::f32) throw Error(ErrorCode::type, "linear: x is float32; use float16 or bfloat16");
  if (m < 0 || m > kMaxLinearRows) {
    throw Error(ErrorCode::invalid_argument,
                "linear: m = " + std::to_string(m) + " rows of x; use 0.." + std::to_string(kMaxLinearRows));
  }
  if (parts.empty()) throw Error(ErrorCode::invalid_argument, "linear: no matrices");
  for (const LinearPart& part : parts) {
    const LayerFormat& f = part.weights.format;
    validate(f);
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
  p.inverse_m = inverse_of(rows);
  p.inverse_row_groups = inverse_of(plan.row_groups);
  p.row_groups_of_scales = static_cast<std::uint16_t>(t.row_groups);
  p.norm = remaining_norm(f.block) * (t.field.trellis() ? kTrellisStep : plan.bytes() ? kQuadStep : 1.0f);
  p.layout_units = static_cast<std::uint8_t>(tiled_format(f).units_per_slice / 2);
  p.iterations = static_cast<std::uint8_t>(plan.paired ? t.units_per_slice / plan.units_of_iteration() : 1);
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
                         p.iterations * plan.loads_of_iteration() * 16 * kLanes;
    part.scales_step = static_cast<int>(per_round * block_tiles(t.field, plan.paired) * t.row_groups * kTileRows);
    const std::int64_t blocks = row_blocks(plan, layout);
    part.rounds = static_cast<int>((blocks + per_round - 1) / per_round);
    part.partial = workspace;
    if (workspace != nullptr) workspace += rows * from.weights.format.n;
  }
  return p;
}

// The largest layer, in weights, of which the decode kernel multiplies 9 to 16 rows of x in less time than the GEMM, by
// bench/results/h200.md: more than 8 rows cost it twice the loads of x, or twice the rounds. Larger ones if all of x
// fits into the registers of a CTA; from 13 rows on that takes wide loops, and fields whose words leave room.
std::int64_t most_decoded(int rows, std::span<const LinearPart> parts) {
  constexpr std::int64_t kLeast = std::int64_t{1} << 25;
  constexpr std::int64_t kMostHeld = 4096;  // columns of 16 rows: 16 warps of 256, wide 8 of 512
  constexpr int kLongUnit = 8;              // words
  const LayerFormat& f = parts[0].weights.format;
  if (f.grid->trellis != nullptr) return kLeast;
  // Against products of integers in the GEMM it is up to nine rows that fit, if bytes are points without signs.
  constexpr int kFewRows = 9;
  const bool bytes = std::ranges::all_of(parts, [](const LinearPart& part) {
    const TiledFormat t = tiled_format(part.weights.format);
    return t.regular(part.weights.format) && gemm_byte_tokens(t.field) >= kMaxDecodeRows;
  });
  const bool signs = tiled_format(f).field.sign_bits() > 0;
  if (bytes) return rows <= kFewRows && f.k <= kMostHeld && !signs ? 4 * kLeast : kLeast;
  const bool few = rows <= 12;
  bool held = true;
  bool wide = true;
  bool short_units = true;
  for (const LinearPart& part : parts) {
    const TiledFormat t = tiled_format(part.weights.format);
    held = held && t.regular(part.weights.format) && prepares_x(t.field, rows);
    wide = wide && wide_loop(t.field, rows);
    short_units = short_units && t.field.unit_words() < kLongUnit;
  }
  if (!few && !(held && wide)) return kLeast;
  return held && f.k <= kMostHeld && (few || short_units) ? 4 * kLeast : 2 * kLeast;
}

bool uses_gemm(std::int64_t m, std::span<const LinearPart> parts, const DeviceProperties& device) {
  const LayerFormat& f = parts[0].weights.format;
  if (m > kMaxDecodeRows || !supports_block(f.block)) return true;
  if (m <= kMaxDecodeRows / 2 || !has_wgmma(device)) return false;
  std::int64_t rows = 0;
  for (const LinearPart& part : parts) rows += part.weights.format.n;
  return rows * f.k > most_decoded(static_cast<int>(m), parts);
}

GemmParams make_gemm_params(const GemmPlan& plan, std::int64_t m, std::span<const LinearPart> parts) {
  const LayerFormat& f = parts[0].weights.format;
  GemmParams p;
  static_cast<SliceParams&>(p) = slice_params(tiled_format(f));
  p.m = static_cast<int>(m);
  p.k_blocks = static_cast<int>(f.k / kColumnAlignment);
  p.group_blocks = static_cast<int>(f.group / kColumnAlignment);
  p.tiles = plan.tiles;
  p.split_tiles = plan.split_tiles;
  p.clusters = plan.clusters;
  p.k_split_log = plan.k_split_log;
  p.slices_per_cluster = plan.slices_per_cluster();
  p.longer_clusters = plan.longer_clusters();
  p.part_count = static_cast<int>(parts.size());
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const TiledFormat layout = tiled_format(parts[i].weights.format);
    GemmPart& part = p.parts[i];
    part.data = reinterpret_cast<const std::uint8_t*>(parts[i].weights.data);
    part.weights_offset = static_cast<std::uint32_t>(layout.weights / kTiledAlignment);
    part.bias = parts[i].bias;
    part.y = parts[i].y;
    part.n = static_cast<int>(parts[i].weights.format.n);
    part.row_tiles = static_cast<int>(layout.row_tiles);
    part.first_row_block = p.row_blocks;
    part.mapped = plan.kernel == GemmKernel::wgmma && plan.k_split_log == 0 &&
                  map_output(p.y[i], part.y, plan.dtype, m, part.n, plan.tokens);
    p.row_blocks += plan.row_blocks[i];
  }
  return p;
}

// Workspace: packed x | partial sums of the largest launch | flags of all launches.
struct GemmWorkspace {
  std::int64_t x_bytes = 0;
  std::int64_t partial_bytes = 0;
  std::int64_t flag_bytes = 0;
  int padded_m = 0;  // rows of packed x: the most that the tiles of a launch cover

  void add(const GemmPlan& plan) {
    x_bytes = std::max(x_bytes, plan.x_bytes);
    padded_m = std::max(padded_m, plan.padded_m);
    partial_bytes = std::max(partial_bytes, plan.partial_bytes);
    flag_bytes += plan.flag_bytes;
  }
  [[nodiscard]] std::int64_t bytes() const { return x_bytes + partial_bytes + flag_bytes; }
};

void run_gemm(const void* x, DType dtype, std::int64_t m, const float* d, std::span<const LinearPart> parts,
              void* workspace, Stream stream, const DeviceProperties& device) {
  check_pointer("linear", "workspace", workspace);
  const auto groups = launch_groups(parts);
  std::vector<GemmPlan> plans;
  GemmWorkspace sizes;
  for (const auto& group : groups) {
    plans.push_back(plan_group(plan_gemm, m, dtype, group, device));
    sizes.add(plans.back());
  }
  // Launches share packed x.
  const bool bytes = std::ranges::all_of(
      plans, [&](const GemmPlan& p) { return p.bytes && p.field.crossed() == plans[0].field.crossed(); });
  auto* const base = static_cast<std::byte*>(workspace);
  auto* flags = reinterpret_cast<std::uint32_t*>(base + sizes.x_bytes + sizes.partial_bytes);
  const LayerFormat& f = parts[0].weights.format;
  pack_x({.x = x,
          .d = d,
          .out = base,
          .flags = flags,
          .flag_count = static_cast<int>(sizes.flag_bytes / 4),
          .m = static_cast<int>(m),
          .padded_m = sizes.padded_m,
          .k = static_cast<int>(f.k),
          .block = f.block,
          .digits = bytes,
          .crossed = plans[0].field.crossed()},
         dtype, stream);
  for (std::size_t i = 0; i < groups.size(); ++i) {
    GemmParams params = make_gemm_params(plans[i], m, groups[i]);
    params.x = base;
    params.padded_m = sizes.padded_m;
    params.partials = reinterpret_cast<float*>(base + sizes.x_bytes);
    params.flags = flags;
    flags += plans[i].flag_bytes / 4;
    plans[i].bytes = bytes;
    decoder_ops(plans[i].field).gemm(plans[i], params, stream);
  }
}

// Workspace: prepared x | partial sums.
bool prepares_digits(const LaunchPlan& p) { return p.bytes() || p.field.trellis(); }
std::int64_t x_bytes(const LaunchPlan& p, std::int64_t k) {
  if (!p.prepared) return 0;
  return prepared_x_bytes(p.rows, k, prepares_digits(p), digit_scale_floats(p.field, p.half_parts()));
}

void run_decode(const void* x, DType dtype, std::int64_t m, const float* d, std::span<const LinearPart> parts,
                void* workspace, Stream stream, const DeviceProperties& device) {
  for (const auto& group : launch_groups(parts)) {
    const LaunchPlan full = plan_group(plan, std::min<std::int64_t>(m, kMaxDecodeRows), dtype, group, device);
    if (full.k_launches > 1 || full.prepared) check_pointer("linear", "workspace", workspace);
    const DecoderOps& ops = decoder_ops(full.field);
    for (std::int64_t row = 0; row < m; row += full.rows) {
      const int rows = static_cast<int>(std::min<std::int64_t>(full.rows, m - row));
      const LaunchPlan part_plan = rows == full.rows ? full : plan_group(plan, rows, dtype, group, device);
      const LayerFormat& f = group[0].weights.format;
      auto* const partial = reinterpret_cast<float*>(static_cast<std::byte*>(workspace) + x_bytes(part_plan, f.k));
      GemvParams params = make_params(part_plan, x, d, group, part_plan.k_launches > 1 ? partial : nullptr, row, rows);
      if (part_plan.prepared) {
        prepare_x({.x = params.x,
                   .d = d,
                   .out = workspace,
                   .m = rows,
                   .k = static_cast<int>(f.k),
                   .block = f.block,
                   .digits = prepares_digits(part_plan),
                   .chunks = part_plan.field.trellis(),
                   .half_parts = part_plan.half_parts(),
                   .free_multiprocessors = device.multiprocessors - part_plan.ctas()},
                  dtype, stream);
        params.x = workspace;
      }
      for (int i = 0; i < part_plan.k_launches; ++i) {
        params.first_slice = static_cast<std::uint16_t>(i * part_plan.cluster * part_plan.slices);
        params.add_partial = i > 0;
        params.store_partial = i + 1 < part_plan.k_launches;
        ops.gemv(part_plan, params, stream);
      }
    }
  }
}

}  // namespace

std::int64_t linear_max_rows(DType dtype, const LayerFormat& format, const DeviceProperties& device) {
  if (dtype == DType::f32 || !supports_grid(*format.grid)) return 0;
  if (has_wgmma(device)) return kMaxLinearRows;
  if (format.grid->trellis == nullptr) return kMaxMmaRows;
  return supports_block(format.block) ? kMaxDecodeRows : 0;
}

std::int64_t linear_workspace_bytes(std::int64_t m, DType dtype, std::span<const LinearPart> parts,
                                    const DeviceProperties& device) {
  std::int64_t bytes = 0;
  if (m == 0) return 0;
  if (uses_gemm(m, parts, device)) {
    GemmWorkspace sizes;
    for (const auto& group : launch_groups(parts)) sizes.add(plan_group(plan_gemm, m, dtype, group, device));
    return sizes.bytes();
  }
  for (const auto& group : launch_groups(parts)) {
    const LaunchPlan launch = plan_group(plan, std::min<std::int64_t>(m, kMaxDecodeRows), dtype, group, device);
    std::int64_t sums = 0;
    if (launch.k_launches > 1) {
      for (const LinearPart& part : group) sums += part.weights.format.n * launch.rows;
    }
    bytes = std::max(bytes, x_bytes(launch, parts[0].weights.format.k) + sums * 4);
  }
  return bytes;
}

void linear(const void* x, DType dtype, std::int64_t m, const float* d, std::span<const LinearPart> parts,
            void* workspace, Stream stream, const DeviceProperties& device) {
  check_parts(x, dtype, m, d, parts);
  if (m == 0) return;
  uses_gemm(m, parts, device) ? run_gemm(x, dtype, m, d, parts, workspace, stream, device)
                              : run_decode(x, dtype, m, d, parts, workspace, stream, device);
}

}  // namespace higgs::cuda
