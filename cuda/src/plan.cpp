#include "higgs/cuda/plan.h"

#include <algorithm>
#include <string>

#include "checks.h"
#include "higgs/error.h"

namespace higgs::cuda {
namespace {

constexpr int kTableBytes = 65536;  // of every decoder (decode.cuh)
constexpr int kChunkColumns = 1024;
constexpr int kMaxCluster = 8;  // the portable limit
constexpr int kMaxBatch = 8;
constexpr int kMaxRotations = 32;  // chunks x rows of x a CTA rotates before splitting k further pays

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
    chunks = std::max(chunks, ceil_div<std::int64_t>(end, kChunkColumns) - begin / kChunkColumns);
  }
  return static_cast<int>(chunks);
}

SharedUse shared_use(int chunks, const LaunchPlan& p, std::int64_t rounds, int budget) {
  SharedUse use;
  const int partials = p.slices * p.row_groups * p.rows * 80;  // of one round
  const int outputs = p.row_groups * p.rows * kTileRows;
  const int xs = p.rows * (chunks * kChunkColumns + 16) * 2;
  for (use.batch = static_cast<int>(std::clamp<std::int64_t>(rounds, 1, kMaxBatch)); use.batch > 0; --use.batch) {
    // A cluster's inbox: an output of every CTA for those this CTA owns, rounded up to 32 outputs per CTA.
    use.inbox_floats = p.cluster == 1 ? 0 : ceil_div(use.batch * outputs, 32 * p.cluster) * 32 * p.cluster;
    use.bytes = 16 + 4 * use.inbox_floats + xs + use.batch * partials;
    if (use.bytes <= budget) return use;
  }
  return {};
}

// Rows of x per launch and what follows from them.
void set_rows(LaunchPlan& p, int rows) {
  p.rows = rows;
  p.token_tiles = rows > 8 ? 2 : 1;
  p.halved = p.token_tiles == 2 && p.regular && p.field.max_units() == 4 && p.field.unit_words() % 2 == 0;
}

// Warps of a CTA: 16 with up to 128 registers each, unless the x fragments alone need more than 64.
int max_warps_of(const LaunchPlan& p) {
  const int units = p.halved ? p.field.max_units() / 2 : p.field.max_units();
  return p.token_tiles * units <= 4 ? 16 : 8;
}

// Fills in the partition that cuts k into about `split` pieces. False if it does not fit in shared memory.
bool partition(LaunchPlan& p, const LayerFormat& f, const TiledFormat& stored, std::int64_t row_tiles, int split,
               const DeviceProperties& device) {
  const TiledFormat t = warp_slices(p, stored);
  const int max_warps = max_warps_of(p);
  const int max_cluster = device.has_clusters() ? kMaxCluster : 1;
  p.k_launches = ceil_div(split, max_cluster);
  p.slices = ceil_div(t.slices, ceil_div(split, p.k_launches) * p.k_launches);
  if (p.slices > max_warps) return false;
  p.cluster = ceil_div(ceil_div(t.slices, p.k_launches), p.slices);
  p.k_launches = ceil_div(t.slices, p.slices * p.cluster);
  const int clusters = device.max_clusters(p.cluster);
  p.row_groups =
      static_cast<int>(std::clamp<std::int64_t>(ceil_div<std::int64_t>(row_tiles, clusters), 1, max_warps / p.slices));
  const int budget = device.shared_bytes_per_block - kTableBytes;
  const std::int64_t rounds = ceil_div<std::int64_t>(row_tiles, std::int64_t{clusters} * p.row_groups);
  const int chunks = chunks_of(t, f.k, p.slices);
  const SharedUse use = shared_use(chunks, p, rounds, budget);
  p.batch = use.batch;
  p.rotate_warps = std::min(p.slices * p.row_groups, p.rows * chunks);
  p.inbox_floats = use.inbox_floats;
  p.shared_bytes = kTableBytes + use.bytes;
  return use.bytes > 0;
}

// Splits the clusters among the matrices in proportion to their row tiles, at least one each.
std::vector<PartPlan> split_clusters(const std::vector<std::int64_t>& tiles, int clusters) {
  std::int64_t total = 0;
  for (const std::int64_t t : tiles) total += t;
  std::vector<PartPlan> parts;
  int next = 0;
  std::int64_t seen = 0;
  for (std::size_t i = 0; i < tiles.size(); ++i) {
    seen += tiles[i];
    const int left = static_cast<int>(tiles.size() - i) - 1;
    const int end = total == 0 ? next + 1 : static_cast<int>((seen * clusters + total / 2) / total);
    const int last = std::clamp(end, next + 1, std::max(next + 1, clusters - left));
    parts.push_back({next, last - next});
    next = last;
  }
  return parts;
}

}  // namespace

TiledFormat warp_slices(const LaunchPlan& plan, TiledFormat t) {
  if (!plan.halved) return t;  // regular: all slices are full, so halves follow each other in memory
  t.slices *= 2;
  t.units_per_slice /= 2;
  t.last_units = t.units_per_slice;
  t.slice_bytes /= 2;
  return t;
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
  std::vector<std::int64_t> tiles;
  std::int64_t all_tiles = 0;
  for (const LayerFormat& f : problem.matrices) {
    tiles.push_back(ceil_div<std::int64_t>(f.n, kTileRows));
    all_tiles += tiles.back();
  }

  // The fewest pieces of k that fit; fewer rows of x where even one slice per CTA does not.
  const LayerFormat& format = problem.matrices[0];
  int split = 0;
  for (int rows = static_cast<int>(problem.m); rows > 0 && split == 0; rows /= 2) {
    set_rows(p, rows);
    for (int s = 1; s <= t.slices && split == 0; ++s) split = partition(p, format, t, all_tiles, s, device) ? s : 0;
  }
  if (split == 0) {
    throw Error(ErrorCode::unsupported, "linear: " + device.name + " has " +
                                            std::to_string(device.shared_bytes_per_block) +
                                            " bytes of shared memory per block; about 99 KB are needed");
  }
  // Cut k further where there are too few row tiles for all multiprocessors, or too much x for a CTA to rotate.
  if (device.has_clusters() && p.k_launches == 1) {
    for (int s = 2 * p.cluster; s <= std::min(kMaxCluster, t.slices); s *= 2) {
      const bool idle = all_tiles * s <= device.multiprocessors;
      const bool much_to_rotate = p.rows * ceil_div<std::int64_t>(format.k, kChunkColumns * p.cluster) > kMaxRotations;
      LaunchPlan finer = p;
      if ((idle || much_to_rotate) && partition(finer, format, t, all_tiles, s, device) && finer.k_launches == 1)
        p = finer;
    }
  }
  const int clusters = device.max_clusters(p.cluster);
  const auto wanted = ceil_div<std::int64_t>(all_tiles, p.row_groups);
  p.parts = split_clusters(
      tiles, std::max(static_cast<int>(tiles.size()), static_cast<int>(std::min<std::int64_t>(clusters, wanted))));
  for (std::size_t i = 0; i < tiles.size(); ++i) {
    const std::int64_t per_round = std::int64_t{p.parts[i].clusters} * p.row_groups;
    p.rounds = std::max(p.rounds, static_cast<int>(ceil_div(tiles[i], per_round)));
  }
  return p;
}

std::string LaunchPlan::to_string() const {
  std::string s = "field " + std::to_string(field.bits) + "b/" + std::to_string(field.weights) + "w " + name_of(dtype);
  const auto add = [&](const char* name, int value) { s += std::string(" ") + name + "=" + std::to_string(value); };
  add("token_tiles", token_tiles);
  add("regular", regular ? 1 : 0);
  add("halved", halved ? 1 : 0);
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
