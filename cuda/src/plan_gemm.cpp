#include <algorithm>
#include <span>
#include <string>

#include "checks.h"
#include "higgs/cuda/plan.h"
#include "higgs/error.h"

namespace higgs::cuda {
namespace {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Tokens per tile: the least padded work. Tiles of 256 keep the tensor cores busier than those of 128, if there are
// enough of them: the sums of shared tiles cost as much as their tokens.
int tokens_of_tile(std::int64_t m, std::span<const LayerFormat> matrices, int most, const DeviceProperties& device) {
  for (const int tokens : {16, 32, 64, 128}) {
    if (m <= tokens) return tokens;
  }
  if (most == 128) return 128;
  const std::int64_t wide = ceil_div(m, 256) * 256;
  const std::int64_t narrow = ceil_div(m, 128) * 128;
  std::int64_t tiles = 0;
  for (const LayerFormat& f : matrices)
    tiles += ceil_div(f.n, gemm_rows(256, tiled_format(f).field) * gemm_cluster_size(256)) * (wide / 256);
  const bool enough = 2 * tiles >= device.max_clusters(gemm_cluster_size(256));
  return enough && 8 * wide <= 9 * narrow ? 256 : 128;
}

void set_wgmma_tile(GemmPlan& p, const LinearProblem& problem, const DeviceProperties& device) {
  p.kernel = GemmKernel::wgmma;
  p.tokens = tokens_of_tile(problem.m, problem.matrices, gemm_max_tokens(p.field, p.regular), device);
  p.rows = gemm_rows(p.tokens, p.field);
  p.cluster_size = gemm_cluster_size(p.tokens);
}

void set_mma_tile(GemmPlan& p, std::int64_t m, const DeviceProperties& device) {
  p.kernel = GemmKernel::mma;
  p.tokens = m <= 32 ? 32 : 64;
  p.rows = kMmaRows;
  if (device.shared_bytes_per_block < kMmaSharedBytes) {
    throw Error(ErrorCode::unsupported, "linear: " + device.name + " has " +
                                            std::to_string(device.shared_bytes_per_block) +
                                            " bytes of shared memory per block; 96 KB are needed");
  }
}

// Shares out the tiles' slices: where a cluster of CTAs for every tile, each with a part of k, fits on the device at
// once and leaves no CTA more slices than even shares would, so; else even shares of contiguous slices.
void share_out(GemmPlan& p, const DeviceProperties& device) {
  const std::int64_t slices = std::int64_t{p.tiles} * p.slices;
  p.clusters = static_cast<int>(std::clamp<std::int64_t>(slices, 1, device.max_clusters(p.cluster_size)));
  const int rounds = p.tiles / p.clusters;
  const int rest = p.tiles % p.clusters;
  // A few tiles among all clusters would be many sums a tile: a round of whole tiles joins them.
  p.split_tiles = rest == 0 || 2 * rest >= p.clusters ? rest : p.tiles - std::max(0, rounds - 1) * p.clusters;
  if (p.kernel != GemmKernel::wgmma || p.tiles == 0) return;
  for (int log = gemm_splits_k(p.tokens, p.regular) ? kMaxSplitLog : 0; log >= 0; --log) {
    const int cluster = p.cluster_size << log;
    if (cluster > 8 || 1 << log > p.slices || p.tiles > device.max_clusters(cluster)) continue;
    if (ceil_div(p.slices, 1 << log) > ceil_div(slices, p.clusters)) return;
    p.k_split_log = log;
    p.clusters = p.tiles;
    p.split_tiles = log > 0 ? p.tiles : 0;
    return;
  }
}

}  // namespace

bool has_wgmma(const DeviceProperties& device) { return device.sm() == 90; }

GemmPlan plan_gemm(const LinearProblem& problem, const DeviceProperties& device) {
  check_matrices(problem);
  if (problem.m < 1) {
    throw Error(ErrorCode::invalid_argument, "linear: m = " + std::to_string(problem.m) + " rows of x; use 1 or more");
  }
  const TiledFormat t = tiled_format(problem.matrices[0]);
  GemmPlan p;
  p.field = t.field;
  p.dtype = problem.dtype;
  p.regular = t.regular(problem.matrices[0]);
  if (p.field.trellis() && !has_wgmma(device)) {
    throw Error(ErrorCode::unsupported, "linear: the GEMM of trellis grids needs sm_90, not sm_" +
                                            std::to_string(device.sm()) +
                                            "; use rotate, dequantize_rotated and a GEMM");
  }
  if (has_wgmma(device)) {
    set_wgmma_tile(p, problem, device);
  } else {
    set_mma_tile(p, problem.m, device);
  }
  p.padded_m = static_cast<int>(ceil_div(problem.m, p.tokens) * p.tokens);
  p.slices = t.slices;
  int row_blocks = 0;
  for (const LayerFormat& f : problem.matrices) {
    p.row_blocks.push_back(static_cast<int>(ceil_div(f.n, p.rows * p.cluster_size)));
    row_blocks += p.row_blocks.back();
  }
  p.tiles = row_blocks * (p.padded_m / p.tokens);
  share_out(p, device);
  const std::int64_t k = problem.matrices[0].k;
  p.bytes = has_wgmma(device) && p.regular && p.tokens <= gemm_byte_tokens(p.field) &&
            supports_block(problem.matrices[0].block);
  p.x_bytes = k * p.padded_m * 2;
  if (p.bytes) p.x_bytes += k / (kChunk / 2) * p.padded_m * 8;  // scales and half sums
  // Sets of partial sums, and one flag per set and warpgroup: of a CTA one for the tile with which it begins, and one
  // for the tile with which it ends, if that is not added up by this CTA alone.
  const int sets_of_cta = p.kernel == GemmKernel::mma || gemm_adds_in_parts(p.tokens) ? 2 : 1;
  const std::int64_t sets = p.split_tiles == 0 || p.k_split_log > 0 ? 0 : sets_of_cta * p.ctas();
  p.partial_bytes = sets * p.rows * p.tokens * 4;
  p.flag_bytes = sets * (p.rows / (p.kernel == GemmKernel::mma ? 128 : 64)) * 4;
  return p;
}

std::string GemmPlan::to_string() const {
  std::string s = std::string("gemm ") + (kernel == GemmKernel::mma ? "mma" : "wgmma") + " field " +
                  std::to_string(field.bits) + "b/" + std::to_string(field.weights) + "w " + name_of(dtype);
  const auto add = [&](const char* name, std::int64_t value) {
    s += std::string(" ") + name + "=" + std::to_string(value);
  };
  add("regular", regular ? 1 : 0);
  add("bytes", bytes ? 1 : 0);
  add("rows", rows);
  add("tokens", tokens);
  add("tiles", tiles);
  add("split_tiles", split_tiles);
  add("slices", slices);
  add("clusters", clusters);
  add("cluster_size", cluster_size);
  add("k_split", 1 << k_split_log);
  add("padded_m", padded_m);
  return s;
}

}  // namespace higgs::cuda
