// Which kernel instance, grid and shared memory a linear layer gets: pure host arithmetic, no CUDA call.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "higgs/cuda/device.h"
#include "higgs/cuda/tiled_format.h"
#include "higgs/numeric.h"

namespace higgs::cuda {

inline constexpr int kMaxDecodeRows = 16;  // of x, in the decode kernel; more rows take the GEMM kernel
inline constexpr int kChunk = 1024;        // columns of x that are rotated together: whole blocks
inline constexpr int kMaxParts = 4;        // weight matrices that share x in one launch

// What a warp multiplies in one iteration of the main loop: `iteration_units` units of `block_tiles` row tiles. Paired
// (see LaunchPlan): two row tiles where the layout allows it.
constexpr int block_tiles(FieldShape s, bool paired) noexcept {
  return paired && s.unit_words() % 2 == 0 && s.unit_words() * s.max_units() % 4 == 0 ? 2 : 1;
}
constexpr int iteration_units(FieldShape s, bool paired) noexcept {
  if (block_tiles(s, paired) == 1) return s.max_units();
  return s.unit_words() <= 4 ? 4 : s.unit_words() <= 8 ? 2 : 1;
}

// 16-byte loads of a lane per iteration and row tile.
constexpr int iteration_loads(FieldShape s, bool paired) noexcept {
  return (iteration_units(s, paired) * s.unit_words() + 3) / 4;
}

// Loads in flight of a warp that holds the x fragments of a slice in registers, and whether those suffice for that: x
// takes up to 64 of 128, half a slice of words does not spill.
constexpr int held_window(FieldShape s) noexcept {
  const int loads = iteration_loads(s, false);
  return s.max_units() == 4 && loads > 4 && loads % 2 == 0 ? loads / 2 : loads;
}
constexpr bool holds_x(FieldShape s) noexcept { return 16 * s.max_units() + 4 * held_window(s) <= 80; }

// Units of a warp that holds prepared x (LaunchPlan) of `rows` rows. For more than 8 of half a slice, or wide: of a
// long one, by half the warps with twice the registers (not measured with sign bits). Whether a warp can hold it: these
// units' words are whole 16-byte loads. Few rows are rotated by every CTA in less time than a kernel takes. A trellis
// has such a loop for more than 4 rows.
constexpr bool wide_loop(FieldShape s, int rows) noexcept {
  return rows > 8 && s.max_units() == 4 && !s.trellis() && s.sign_bits() == 0;
}
constexpr int prepared_units(FieldShape s, int rows) noexcept {
  return rows > 8 && !wide_loop(s, rows) ? s.max_units() / 2 : s.max_units();
}
constexpr bool prepares_x(FieldShape s, int rows) noexcept {
  if (s.trellis()) return rows > 4;
  if (!holds_x(s) || rows <= (s.quads() ? 4 : 2)) return false;
  return rows <= 8 || prepared_units(s, rows) * s.unit_words() % 4 == 0;
}

// Units of 256 columns in a warp's slice of a trellis: x for 16 rows takes twice the registers.
constexpr int trellis_slice_units(int rows, bool regular) noexcept { return regular && rows <= 8 ? 2 : 1; }

// Whether look-ups of the decode kernel yield bytes (gemv.cuh): a row of x then takes two of the MMA's eight columns.
constexpr bool uses_bytes(FieldShape s, bool regular) noexcept { return regular && s.quads(); }

// Whether those bytes lack half a step of every weight (kQuadStep), so that half the sum of x is added.
constexpr bool adds_halves(FieldShape s, bool regular) noexcept { return uses_bytes(s, regular) && s.sign_bits() > 0; }
// Columns of x that a warp rotates at a time; digits of theirs share a scale.
constexpr int rotated_columns(FieldShape s) noexcept { return s.trellis() ? kChunk : kChunk / 2; }
// Parts of a chunk, of an iteration's columns each, with a half sum of their own; 0: no halves.
constexpr int half_parts(bool halves, int units) noexcept { return halves ? kChunk / (units * kUnitColumns) : 0; }
// Floats beside the digits of a chunk of a row of x: its scales or, with halves, that and the half sum for each part.
constexpr int digit_scale_floats(FieldShape s, int half_parts) noexcept {
  return half_parts > 0 ? 2 * half_parts : kChunk / rotated_columns(s);
}

struct LinearProblem {
  std::int64_t m = 0;                     // rows of x
  DType dtype = DType::f16;               // of x and y: f16 or bf16
  std::span<const LayerFormat> matrices;  // same k, block, group and field shape
};

// The CTAs (clusters, when k is split) [first, first + clusters) work on one matrix.
struct PartPlan {
  int first_cluster = 0;
  int clusters = 0;
};

// One launch of the decode kernel. A CTA has slices x row_groups warps: warp w multiplies slice w % slices of its k
// range with row blocks w / slices, + row_groups, ... A cluster of `cluster` CTAs shares row blocks and splits k.
struct LaunchPlan {
  FieldShape field;
  DType dtype = DType::f16;
  int token_tiles = 1;   // 8 rows of x each: 1 or 2; with bytes 4 rows: 1, 2 or 4
  bool regular = false;  // all slices full and inside one scale group: the instances without tail code
  bool paired = false;  // regular, and fragments of x come from shared memory, each for two row tiles: m > 8, and small
                        // layers, as the CTAs of the next kernel then find room beside these
  bool prepared = false;  // x rotated by a kernel of its own, and its fragments then held in registers
  bool whole = false;     // a CTA may take all of a multiprocessor; otherwise two of 256 threads find room
  int units = 0;          // of a warp's slice: as in the layout, or a multiple of iteration_units
  int slices = 0;         // per CTA
  int row_groups = 0;     // row blocks in flight per CTA
  int cluster = 1;
  int k_launches = 1;    // > 1: k is too long for one cluster; partial sums go through the workspace
  int rounds = 0;        // row blocks per warp
  int batch = 0;         // rounds between two reductions
  int rotate_warps = 0;  // warps that rotate x
  int chunks = 0;        // of 1024 columns: what a CTA rotates, or needs scales of, of a row of x, at most
  int rows = 0;          // rows of x per launch
  int inbox_floats = 0;  // per CTA, for sums of the other CTAs of the cluster
  int shared_bytes = 0;
  std::vector<PartPlan> parts;

  [[nodiscard]] bool wide() const noexcept { return prepared && wide_loop(field, rows); }
  // Most threads of a CTA, with up to 128 registers each (wide: 255). Paired: 512 only where measured to win.
  [[nodiscard]] int max_threads() const noexcept {
    if (paired) return whole && rows > 8 && !bytes() ? 512 : 256;
    if (wide()) return 256;
    return regular || field.trellis() ? 512 : 256;
  }
  // Of a warp in one iteration of the main loop.
  [[nodiscard]] int units_of_iteration() const noexcept {
    return prepared ? prepared_units(field, rows) : iteration_units(field, paired);
  }
  [[nodiscard]] int loads_of_iteration() const noexcept { return (units_of_iteration() * field.unit_words() + 3) / 4; }
  [[nodiscard]] bool bytes() const noexcept { return uses_bytes(field, regular); }
  [[nodiscard]] int half_parts() const noexcept {
    return cuda::half_parts(adds_halves(field, regular), units_of_iteration());
  }
  [[nodiscard]] int threads() const noexcept { return 32 * slices * row_groups; }
  [[nodiscard]] int ctas() const noexcept {
    return parts.empty() ? 0 : cluster * (parts.back().first_cluster + parts.back().clusters);
  }
  [[nodiscard]] std::string to_string() const;
};

// Whether one launch can serve these matrices together.
[[nodiscard]] bool can_share_launch(const LayerFormat& a, const LayerFormat& b);

// Throws Error unless one launch can take these matrices and this dtype.
void check_matrices(const LinearProblem& problem);

// The slices as the warps of a plan see them: plan.units each. Of a trellis, slice_bytes is that of the layout.
[[nodiscard]] TiledFormat warp_slices(const LaunchPlan& plan, TiledFormat tiled);

// Row blocks of a matrix: block_tiles row tiles each, the last one may have fewer.
[[nodiscard]] std::int64_t row_blocks(const LaunchPlan& plan, const TiledFormat& tiled) noexcept;

// Throws Error(invalid_argument) for m outside 1..16, no or too many matrices, or matrices that cannot share a launch.
[[nodiscard]] LaunchPlan plan(const LinearProblem& problem, const DeviceProperties& device);

enum class GemmKernel {
  wgmma,  // gemm_sm90.cuh
  mma     // gemm_mma.cuh, on every architecture
};

// One launch of a GEMM kernel, for more than kMaxDecodeRows rows of x. A cluster works on tiles of cluster_size *
// `rows` rows of W by `tokens` rows of x, token tile by token tile. `split_tiles` of them are shared out slice by
// slice. With k_split_log > 0 every tile has a cluster, of 2^k_split_log CTAs that take a part of its slices each.
struct GemmPlan {
  GemmKernel kernel = GemmKernel::wgmma;
  FieldShape field;
  DType dtype = DType::f16;
  bool regular = false;  // as in LaunchPlan
  bool bytes = false;    // integer products: x in two 8-bit digits
  int tokens = 0;
  int rows = 0;
  int padded_m = 0;
  int slices = 0;  // of a tile
  int tiles = 0;
  int split_tiles = 0;
  int clusters = 0;
  int cluster_size = 1;
  int k_split_log = 0;
  std::vector<int> row_blocks;  // of each matrix
  std::int64_t x_bytes = 0;     // of the workspace: packed x, partial sums, flags
  std::int64_t partial_bytes = 0;
  std::int64_t flag_bytes = 0;

  [[nodiscard]] int ctas() const noexcept { return clusters * cluster_size << k_split_log; }
  [[nodiscard]] int slices_per_cluster() const noexcept { return split_tiles * slices / clusters; }
  [[nodiscard]] int longer_clusters() const noexcept { return split_tiles * slices % clusters; }
  [[nodiscard]] std::string to_string() const;
};

// Where there is no wgmma kernel: the rows of x from which on decoding all of W first takes less time. Estimated from
// the rates of the units, not measured.
inline constexpr int kMaxMmaRows = 512;

// The mma kernel: rows of W in a tile, and the most shared memory it takes: the table and two units of x.
inline constexpr int kMmaRows = 256;
inline constexpr int kMmaSharedBytes = 96 * 1024;

// Rows of W in a tile of the wgmma kernel by `tokens` rows of x. Four warpgroups hide more latency than three, but
// leave registers for narrow tiles only (and, for slices of an odd number of loads, did not when words were kept in
// registers).
[[nodiscard]] constexpr int gemm_rows(int tokens, const FieldShape& field) {
  const int loads = (field.max_units() * field.unit_words() + 3) / 4;
  if (tokens <= (field.trellis() ? 16 : 32) && loads % 2 == 0 && field.weights > 1) return 256;
  return tokens <= 64 ? 192 : 128;
}

// The most rows of x of which the wgmma kernel multiplies looked-up bytes (GemmPlan::bytes), where slices are regular.
// With sign bits 32 were faster on the largest layers only.
[[nodiscard]] constexpr int gemm_byte_tokens(const FieldShape& field) {
  if (field.sign_bits() > 0) return 16;
  return field.trellis() || (field.quads() && field.entry_bits() == 8) ? 32 : 0;
}

// CTAs that share the copies of x: where x is what the L2 delivers most of.
[[nodiscard]] constexpr int gemm_cluster_size(int tokens) { return tokens == 256 ? 2 : 1; }

// Whether CTAs of a cluster can share a tile of `tokens` rows of x, each with a part of k; the most parts are
// 2^kMaxSplitLog.
[[nodiscard]] constexpr bool gemm_splits_k(int tokens, bool regular) {
  return regular && tokens >= 32 && tokens <= 128;
}
inline constexpr int kMaxSplitLog = 3;

// Whether several CTAs may add up the sums of a tile of the wgmma kernel that many share.
[[nodiscard]] constexpr bool gemm_adds_in_parts(int tokens) { return tokens == 32; }

// The widest tile. The grids without one of 256 have words that would take too many registers.
[[nodiscard]] constexpr int gemm_max_tokens(const FieldShape& field, bool regular) {
  const int units = field.max_units();
  const int loads = (units * field.unit_words() + 3) / 4;
  return regular && ((loads <= 5 && !field.trellis()) || (loads % 2 == 0 && units % 2 == 0)) ? 256 : 128;
}

// Whether `device` runs the wgmma kernel, for most problems the faster one: sm_90.
[[nodiscard]] bool has_wgmma(const DeviceProperties& device);

// As plan, for m >= 1 and any block. Error(unsupported) where shared memory is too small.
[[nodiscard]] GemmPlan plan_gemm(const LinearProblem& problem, const DeviceProperties& device);

}  // namespace higgs::cuda
