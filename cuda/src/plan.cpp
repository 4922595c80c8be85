#include "higgs/cuda/plan.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>

#include "checks.h"
#include "higgs/error.h"

namespace higgs::cuda {
namespace {

constexpr int kTableBytes = 65536;  // of every decoder (decode.cuh)
constexpr int kMaxCluster = 8;      // the portable limit
constexpr int kMaxBatch = 32;
constexpr int kReservedShared = 1024;  // of every CTA

template <typename T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Shared memory of a CTA next to the table.
struct SharedUse {
  int batch = 0;
  int inbox_floats = 0;
  int bytes = 0;
};

// Chunks of x a CTA rotates: those its columns touch, for the CTA that touches most.
int chunks_of(const TiledFormat& t, std::int64_t k, int slices) {
  const std::int64_t columns = std::int64_t{slices} * t.slice_columns();
  std::int64_t chunks = 1;
  for (std::int64_t begin = 0; begin < k; begin += columns) {
    const std::int64_t end = std::min(k, begin + columns);
    chunks = std::max(chunks, ceil_div<std::int64_t>(end, kChunk) - begin / kChunk);
  }
  return static_cast<int>(chunks);
}

// Rotated x in shared memory. Integers, as those of a trellis kernel, have scales (trellis.cuh).
int x_bytes(const LaunchPlan& p) {
  if (p.prepared) return 0;
  const int columns = p.chunks * kChunk;
  return p.rows * 2 * (p.field.trellis() || p.bytes() ? columns + 64 : columns + 32);
}
int x_scales_bytes(const LaunchPlan& p) {
  const int floats = p.rows * p.chunks * digit_scale_floats(p.field, p.half_parts());
  return p.field.trellis() || p.bytes() ? ceil_div(floats, 4) * 16 : 0;
}

SharedUse shared_use(const LaunchPlan& p, int budget) {
  SharedUse use;
  const int rows = kTileRows * block_tiles(p.field, p.paired);             // of a row block
  const int partials = p.slices * p.row_groups * p.rows * (rows + 4) * 4;  // of one round
  const int outputs = p.row_groups * p.rows * rows;
  const int xs = x_bytes(p);
  for (use.batch = std::min(p.rounds, kMaxBatch); use.batch > 0; --use.batch) {
    // A cluster's inbox: a sum of every CTA for the outputs this CTA owns, 4 for each of 32 threads in turn.
    use.inbox_floats = p.cluster == 1 ? 0 : ceil_div(use.batch * outputs, 128 * p.cluster) * 128 * p.cluster;
    use.bytes = 16 + 4 * use.inbox_floats + x_scales_bytes(p) + xs + use.batch * partials;
    if (p.field.trellis()) use.bytes -= std::min(xs, use.batch * partials);  // partial sums take the place of x
    if (use.bytes <= budget) return use;
  }
  return {};
}

// Splits the clusters among the matrices (numbers of row blocks) so that as few rounds as possible do, and all have
// one.
void split_clusters(LaunchPlan& p, const std::vector<std::int64_t>& blocks, int clusters) {
  const auto wanted = [&](std::int64_t b) {
    return std::max<std::int64_t>(1, ceil_div<std::int64_t>(b, std::int64_t{p.rounds} * p.row_groups));
  };
  std::int64_t all = 0;
  for (const std::int64_t b : blocks) all += b;
  p.rounds =
      static_cast<int>(std::max<std::int64_t>(1, ceil_div<std::int64_t>(all, std::int64_t{clusters} * p.row_groups)));
  std::int64_t sum = 0;
  for (;; ++p.rounds) {
    sum = 0;
    for (const std::int64_t b : blocks) sum += wanted(b);
    if (sum <= clusters || sum == static_cast<std::int64_t>(blocks.size())) break;
  }
  p.parts.clear();
  int next = 0;
  for (const std::int64_t b : blocks) {
    p.parts.push_back({next, static_cast<int>(wanted(b))});
    next += p.parts.back().clusters;
  }
  // Multiprocessors that have no CTA prepare the next x.
  if (!p.prepared) p.parts.back().clusters += std::max(0, clusters - next);
}

// Fills in the partition that cuts k into slices of `units` units and these into k_launches x cluster pieces. False if
// it does not fit.
bool partition(LaunchPlan& p, const LayerFormat& f, const TiledFormat& stored, const std::vector<std::int64_t>& blocks,
               int units, int cluster, int k_launches, const DeviceProperties& device) {
  const int max_warps = p.max_threads() / 32;
  p.units = units;
  const TiledFormat t = warp_slices(p, stored);
  p.slices = ceil_div(t.slices, cluster * k_launches);
  if (p.slices > max_warps) return false;
  p.cluster = ceil_div(ceil_div(t.slices, k_launches), p.slices);
  p.k_launches = ceil_div(t.slices, p.slices * p.cluster);
  const int clusters = device.max_clusters(p.cluster);
  std::int64_t all = 0;
  for (const std::int64_t b : blocks) all += b;
  p.row_groups =
      static_cast<int>(std::clamp<std::int64_t>(ceil_div<std::int64_t>(all, clusters), 1, max_warps / p.slices));
  split_clusters(p, blocks, clusters);
  p.chunks = p.prepared && !p.field.trellis() ? 0 : chunks_of(t, f.k, p.slices);
  const int budget = p.whole ? device.shared_bytes_per_block : (device.shared_bytes_per_block - kReservedShared) / 2;
  const SharedUse use = shared_use(p, budget - kTableBytes);
  p.batch = use.batch;
  p.rotate_warps = std::min(p.slices * p.row_groups, p.rows * p.chunks * (kChunk / rotated_columns(p.field)));
  p.inbox_floats = use.inbox_floats;
  p.shared_bytes = kTableBytes + use.bytes;
  return use.bytes > 0;
}

// Cycles of a launch, roughly; what the partitions differ in. The constants are a fit to about 700 partitions of 8
// shapes on an H200 (14 % rms; the cheapest partition is 0.7 % slower than the fastest, on average), and with bytes to
// 79 of 4 shapes (10 %; 0.9 %).
double cost(const LaunchPlan& p) {
  const int tiles = block_tiles(p.field, p.paired);
  const int warps = p.slices * p.row_groups;
  // Main loop: cycles of the load unit for an MMA step (16 x 16 weights): look-ups, x, and 8 for 16 bytes a lane of
  // weights; a warp alone waits for latencies. Larger clusters come to share multiprocessors where that is possible.
  const double lookups = p.bytes() ? 2 : p.field.weights == 1 ? 8 : 4;
  const double x = p.paired || !p.regular ? (p.bytes() ? 1.0 : 2.0) * p.token_tiles / tiles : 0;
  const double weights = p.field.unit_words() / 4.0;
  const double products = p.bytes() ? 0.1 * (p.token_tiles - 1) : 0;
  const double step =
      std::max(1.14 * warps * (lookups + x + weights + products), 58.0) * (!p.whole && p.cluster > 2 ? 1.16 : 1);
  const double main = step * 8 * p.units * tiles * p.rounds;
  // Half a chunk of columns is one piece to rotate, by a warp; fitted at k = 4096, m = 8 only.
  const bool half = p.paired && p.rows > 4 && p.rows <= 8 && p.cluster == kMaxCluster &&
                    2 * p.slices * p.units * kUnitColumns == kChunk;
  const int chunks = half ? (p.rows + 1) / 2 : p.chunks * p.rows;
  // Prepared: most of it while the table is filled. In clusters bytes then lose more than the other terms account for.
  const double prepared = 1800.0 + (p.bytes() && p.cluster > 1 && !p.wide() ? 5000.0 : 0.0);
  // To bytes it takes more instructions, which the warps of a scheduler issue in turn.
  const double rotation = p.prepared  ? prepared
                          : p.bytes() ? 500.0 * ceil_div(chunks, warps) + 220.0 * chunks
                                      : 920.0 * ceil_div(chunks, warps) + 115.0 * chunks;
  // Partial sums go through shared memory; each batch waits for its slowest warp.
  const double sums = p.rounds * (375 + warps * tiles * p.rows * (p.cluster > 1 ? 1.2 : 0.6));
  const double batches = std::ceil(static_cast<double>(p.rounds) / p.batch) * (p.cluster > 1 ? 2220 : 1060);
  // The warps of half a multiprocessor take longer for iterations whose words come from memory only while they run, the
  // third and further ones; fitted to 3 and 4 rows of 6144 x 4096 only.
  const bool fitted = p.paired && !p.whole && !p.bytes() && p.field.max_units() == 4 && p.rows > 2;
  const double further = fitted ? 1300.0 * std::max(0, p.rounds * p.units / p.units_of_iteration() - 2) : 0;
  return p.k_launches * (main + rotation + sums + batches + further + (!p.whole ? 0 : p.bytes() ? 2700 : 1770));
}

// The cheapest partition of the launches' kind (rows, paired) into `launches` launches; cost 0 if none fits.
double best_of_kind(LaunchPlan& p, const LinearProblem& problem, const TiledFormat& t, int launches,
                    const DeviceProperties& device) {
  const LayerFormat& format = problem.matrices[0];
  const int slice =
      p.field.trellis() ? std::min(t.units_per_slice, 2 * trellis_slice_units(p.rows, p.regular)) : t.units_per_slice;
  const std::int64_t step = p.paired || p.prepared ? p.units_of_iteration() : slice;
  const std::int64_t most = p.prepared ? step : p.paired ? std::gcd(format.k, format.group) / kUnitColumns : slice;
  std::vector<std::int64_t> blocks;
  for (const LayerFormat& f : problem.matrices) blocks.push_back(row_blocks(p, tiled_format(f)));
  const int max_cluster = device.has_clusters() ? kMaxCluster : 1;
  double least = 0;
  LaunchPlan best;
  for (std::int64_t units = step; units <= most; units += step) {
    if (most % units != 0) continue;
    // Paired CTAs in clusters: alone, two of a launch may come to share a multiprocessor while others have none.
    for (int cluster = p.paired ? std::min(2, max_cluster) : 1; cluster <= max_cluster; cluster *= 2) {
      for (const bool whole : {false, true}) {
        LaunchPlan candidate = p;
        candidate.whole = whole;
        if (!whole && (candidate.max_threads() > 256 || candidate.wide())) continue;  // fills a multiprocessor anyway
        if (!partition(candidate, format, t, blocks, static_cast<int>(units), cluster, launches, device)) continue;
        const double c = cost(candidate);
        if (least == 0 || c < least) {
          least = c;
          best = candidate;
        }
      }
    }
  }
  if (least > 0) p = best;
  return least;
}

// The cheapest partition; several launches, or fewer rows of x, where even one slice per CTA does not fit.
LaunchPlan best_partition(LaunchPlan p, const LinearProblem& problem, const TiledFormat& t,
                          const DeviceProperties& device) {
  for (p.rows = static_cast<int>(problem.m); p.rows > 0; p.rows /= 2) {
    p.token_tiles = (p.rows > 8 ? 2 : 1) * (p.bytes() && p.rows > 4 ? 2 : 1);
    const bool trellis = p.field.trellis();
    const bool pairs = p.regular && !trellis;
    const bool prepares = p.regular && (trellis || has_wgmma(device)) && prepares_x(p.field, p.rows);
    const bool holds = trellis ? !prepares : !pairs || (p.rows <= 8 && holds_x(p.field));
    for (int launches = 1; launches <= t.slices * t.units_per_slice; ++launches) {
      LaunchPlan best;
      double least = 0;
      const auto consider = [&](bool possible, bool paired, bool prepared) {
        LaunchPlan candidate = p;
        candidate.paired = paired;
        candidate.prepared = prepared;
        const double c = possible ? best_of_kind(candidate, problem, t, launches, device) : 0;
        if (c == 0 || (least > 0 && c >= least)) return;
        least = c;
        best = candidate;
      };
      consider(pairs, true, false);
      consider(holds, false, false);
      consider(prepares, false, true);
      if (least > 0) return best;
    }
  }
  throw Error(ErrorCode::unsupported, "linear: " + device.name + " has " +
                                          std::to_string(device.shared_bytes_per_block) +
                                          " bytes of shared memory per block; about 99 KB are needed");
}

}  // namespace

TiledFormat warp_slices(const LaunchPlan& plan, TiledFormat t) {
  if (t.field.trellis()) {
    const int units = (t.slices - 1) * t.units_per_slice + t.last_units;
    t.slices = ceil_div(units, plan.units);
    t.units_per_slice = plan.units;
    t.last_units = units - (t.slices - 1) * plan.units;
    return t;
  }
  if (!plan.regular) return t;  // regular: all slices are full, so their units follow each other in memory
  const int units = t.slices * t.units_per_slice;
  t.slice_bytes = t.slice_bytes * plan.units / t.units_per_slice;
  t.slices = units / plan.units;
  t.units_per_slice = t.last_units = plan.units;
  return t;
}

std::int64_t row_blocks(const LaunchPlan& plan, const TiledFormat& tiled) noexcept {
  return ceil_div<std::int64_t>(tiled.row_tiles, block_tiles(plan.field, plan.paired));
}

bool can_share_launch(const LayerFormat& a, const LayerFormat& b) {
  return a.k == b.k && a.block == b.block && a.group == b.group && field_shape(*a.grid) == field_shape(*b.grid);
}

void check_matrices(const LinearProblem& p) {
  if (p.dtype == DType::f32) throw Error(ErrorCode::type, "linear: x is float32; use float16 or bfloat16");
  if (p.matrices.empty() || p.matrices.size() > kMaxParts) {
    throw Error(ErrorCode::invalid_argument,
                "linear: " + std::to_string(p.matrices.size()) + " matrices in one launch; use 1..4");
  }
  for (const LayerFormat& f : p.matrices) {
    if (!can_share_launch(p.matrices[0], f)) {
      throw Error(ErrorCode::invalid_argument,
                  "linear: matrices of one launch need the same k, block, group and decoder");
    }
  }
}

LaunchPlan plan(const LinearProblem& problem, const DeviceProperties& device) {
  if (problem.m < 1 || problem.m > kMaxDecodeRows) {
    throw Error(ErrorCode::invalid_argument,
                "linear: m = " + std::to_string(problem.m) + " rows of x; the decode kernel takes 1..16");
  }
  check_matrices(problem);
  check_block("linear", problem.matrices[0].block);
  const TiledFormat t = tiled_format(problem.matrices[0]);
  LaunchPlan p;
  p.field = t.field;
  p.dtype = problem.dtype;
  p.regular = t.regular(problem.matrices[0]);
  return best_partition(p, problem, t, device);
}

std::string LaunchPlan::to_string() const {
  std::string s = "field " + std::to_string(field.bits) + "b/" + std::to_string(field.weights) + "w " + name_of(dtype);
  const auto add = [&](const char* name, int value) { s += std::string(" ") + name + "=" + std::to_string(value); };
  add("token_tiles", token_tiles);
  add("regular", regular ? 1 : 0);
  add("paired", paired ? 1 : 0);
  add("prepared", prepared ? 1 : 0);
  add("whole", whole ? 1 : 0);
  add("units", units);
  add("ctas", ctas());
  add("threads", threads());
  add("slices", slices);
  add("row_groups", row_groups);
  add("cluster", cluster);
  add("k_launches", k_launches);
  add("rounds", rounds);
  add("batch", batch);
  add("rotate_warps", rotate_warps);
  add("rows", rows);
  add("shared", shared_bytes);
  s += " parts";
  for (const PartPlan& part : parts)
    s += " " + std::to_string(part.first_cluster) + "+" + std::to_string(part.clusters);
  return s;
}

}  // namespace higgs::cuda
