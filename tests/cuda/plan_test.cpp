// plan() over all grids, many shapes and devices; needs no GPU.
#include "higgs/cuda/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <set>
#include <string>
#include <utility>

#include "decoder_ops.h"
#include "higgs/higgs.h"

namespace higgs::cuda {
namespace {

DeviceProperties device(int major, int minor, int multiprocessors, int shared_kb) {
  return {"sm_" + std::to_string(10 * major + minor), major, minor, multiprocessors, shared_kb * 1024};
}
const DeviceProperties kDevices[] = {device(8, 0, 108, 163), device(8, 6, 84, 99),    device(8, 9, 128, 99),
                                     device(9, 0, 132, 227), device(10, 0, 148, 227), device(12, 0, 170, 99)};

LayerFormat format(const Grid& grid, std::int64_t n, std::int64_t k) {
  const int block = static_cast<int>(std::min<std::int64_t>(1024, k & -k));  // powers of two only on the GPU
  return {&grid, n, k, block, default_group(k, block), 0};
}

void expect_valid(const LaunchPlan& p, std::span<const LayerFormat> matrices, std::int64_t m,
                  const DeviceProperties& d) {
  const TiledFormat t = warp_slices(p, tiled_format(matrices[0]));
  EXPECT_LE(p.threads(), p.max_threads());
  EXPECT_TRUE(p.regular || !p.paired);
  if (p.prepared) {
    EXPECT_TRUE(p.regular && !p.paired && prepares_x(p.field, p.rows));
    EXPECT_TRUE(p.field.trellis() || has_wgmma(d));
    EXPECT_EQ(p.units, prepared_units(p.field, p.rows));
    EXPECT_TRUE(!p.wide() || p.whole);
  } else {
    EXPECT_TRUE(p.paired || !p.regular || p.field.trellis() || (p.rows <= 8 && holds_x(p.field)));
    EXPECT_GE(p.rotate_warps, 1);
  }
  EXPECT_FALSE(p.paired && p.field.trellis());
  EXPECT_GE(p.slices, 1);
  EXPECT_GE(p.row_groups, 1);
  EXPECT_LE(p.shared_bytes, d.shared_bytes_per_block);
  if (!p.whole) {  // two find room on a multiprocessor
    EXPECT_LE(p.threads(), 256);
    EXPECT_LE(2 * p.shared_bytes, d.shared_bytes_per_block - 1024);
  }
  EXPECT_LE(p.cluster, d.has_clusters() ? 8 : 1);
  EXPECT_GE(p.slices * p.cluster * p.k_launches, t.slices) << "some columns have no warp";
  EXPECT_LT(p.slices * p.cluster * (p.k_launches - 1), t.slices) << "a launch without columns";
  EXPECT_GE(p.rows, 1);
  EXPECT_LE(p.rows, m);
  EXPECT_GE(p.token_tiles * (p.bytes() ? 4 : 8), p.rows);
  EXPECT_GE(p.batch, 1);
  ASSERT_EQ(p.parts.size(), matrices.size());
  int next = 0;
  for (std::size_t i = 0; i < matrices.size(); ++i) {
    EXPECT_EQ(p.parts[i].first_cluster, next);
    EXPECT_GE(p.parts[i].clusters, 1);
    next += p.parts[i].clusters;
    const std::int64_t blocks = row_blocks(p, tiled_format(matrices[i]));
    EXPECT_GE(blocks * block_tiles(p.field, p.paired) * kTileRows, matrices[i].n);
    EXPECT_GE(std::int64_t{p.rounds} * p.parts[i].clusters * p.row_groups, blocks);
  }
  EXPECT_LE(p.ctas(), std::max(d.multiprocessors, p.cluster * static_cast<int>(matrices.size())));
  EXPECT_EQ(decoder_ops(p.field).field, t.field);
}

TEST(Plan, EverySupportedProblemHasAnInstance) {
  for (const DeviceProperties& d : kDevices) {
    for (const Grid& grid : grids()) {
      if (!supports_grid(grid)) continue;
      for (const std::int64_t k : {64, 192, 576, 1024, 4096, 5120, 8192, 11008, 14336, 28672, 53248, 64 * 1001}) {
        for (const std::int64_t n : {0, 1, 17, 576, 4096, 28672, 128256}) {
          for (const std::int64_t m : {1, 3, 8, 9, 16}) {
            const LayerFormat f = format(grid, n, k);
            const LaunchPlan p = plan({m, DType::bf16, {&f, 1}}, d);
            SCOPED_TRACE(d.name + " " + std::string(grid.name) + " " + std::to_string(m) + " x " + std::to_string(n) +
                         " x " + std::to_string(k) + ": " + p.to_string());
            expect_valid(p, {&f, 1}, m, d);
          }
        }
      }
    }
  }
}

TEST(Plan, EveryInstanceIsReachable) {
  std::set<std::array<int, 3>> seen;
  for (const Grid& grid : grids()) {
    if (!supports_grid(grid)) continue;
    const FieldShape s = field_shape(grid);
    seen.insert({s.bits, s.weights, s.shift});
  }
  EXPECT_EQ(seen.size(), 18u);
}

TEST(Plan, MatricesThatShareXGetClustersInProportion) {
  const Grid& grid = find_grid("p2_n256");
  const LayerFormat qkv[] = {format(grid, 4096, 4096), format(grid, 1024, 4096), format(grid, 1024, 4096)};
  const LaunchPlan p = plan({1, DType::bf16, qkv}, kDevices[3]);
  expect_valid(p, qkv, 1, kDevices[3]);
  const auto rounds = [&](int i) {
    const std::int64_t per_round = p.parts[i].clusters * p.row_groups;
    return (row_blocks(p, tiled_format(qkv[i])) + per_round - 1) / per_round;
  };
  EXPECT_EQ(std::max({rounds(0), rounds(1), rounds(2)}), p.rounds);
  EXPECT_GE(p.parts[0].clusters, 3 * p.parts[1].clusters);
}

TEST(Plan, FullSlicesInOneScaleGroupUseTheRegularInstance) {
  const Grid& grid = find_grid("p2_n256");
  LayerFormat f = format(grid, 4096, 4096);
  EXPECT_TRUE(plan({1, DType::f16, {&f, 1}}, kDevices[3]).regular);
  f.group = 64;
  f.block = 64;
  EXPECT_FALSE(plan({1, DType::f16, {&f, 1}}, kDevices[3]).regular);
}

TEST(Plan, PreparedXLeavesMultiprocessorsThatRotateIt) {
  DeviceProperties d = kDevices[3];
  d.resident_clusters = {0, 132, 66, 43, 30, 24, 20, 16, 15};
  const LayerFormat f = format(find_grid("p2_n64"), 28672, 4096);
  for (const std::int64_t m : {1, 8, 16}) {
    const LaunchPlan p = plan({m, DType::bf16, {&f, 1}}, d);
    EXPECT_EQ(p.prepared, m > 1) << m;
    EXPECT_EQ(p.ctas(), m > 1 ? 128 : 132) << m;
    EXPECT_EQ(p.chunks == 0, p.prepared) << m;
    EXPECT_FALSE(plan({m, DType::bf16, {&f, 1}}, kDevices[4]).prepared) << m << ", not sm_90";
  }
  const Grid& grid = find_grid("p2_n256");
  const LayerFormat qkv[] = {format(grid, 4096, 4096), format(grid, 1024, 4096), format(grid, 1024, 4096)};
  for (const std::int64_t m : {1, 2, 3, 4}) EXPECT_EQ(plan({m, DType::bf16, qkv}, d).prepared, m > 2) << m;
  const LayerFormat long_rows = format(find_grid("p4_n256"), 4096, 14336);
  EXPECT_FALSE(plan({8, DType::bf16, {&long_rows, 1}}, d).prepared);
}

TEST(Plan, FullSlicesOfQuadsDecodeToBytes) {
  for (const char* name : {"p4_n16", "p4_n64", "p4_n256", "p4_n4096", "p2_n16", "p1_n4"}) {
    LayerFormat f = format(find_grid(name), 4096, 4096);
    for (const auto& [m, tiles] : {std::pair{4, 1}, {5, 2}, {8, 2}, {9, 4}, {16, 4}}) {
      const LaunchPlan p = plan({m, DType::bf16, {&f, 1}}, kDevices[3]);
      EXPECT_TRUE(p.bytes()) << name;
      EXPECT_EQ(p.token_tiles, tiles) << name << " m=" << m;
    }
    f.group = f.block = 64;
    EXPECT_FALSE(plan({4, DType::bf16, {&f, 1}}, kDevices[3]).bytes()) << name;
  }
  const LayerFormat pairs = format(find_grid("p2_n256"), 4096, 4096);
  EXPECT_FALSE(plan({4, DType::bf16, {&pairs, 1}}, kDevices[3]).bytes());
}

void expect_valid(const GemmPlan& p, const LayerFormat& f, std::int64_t m, const DeviceProperties& d) {
  if (p.kernel == GemmKernel::wgmma) {
    EXPECT_TRUE(has_wgmma(d));
    EXPECT_LE(p.tokens, gemm_max_tokens(p.field, p.regular));
  } else {
    EXPECT_TRUE(p.tokens == 32 || p.tokens == 64) << "no such instance";
    EXPECT_EQ(p.rows, kMmaRows);
    EXPECT_EQ(p.cluster_size, 1);
    EXPECT_LE(kMmaSharedBytes, d.shared_bytes_per_block);
  }
  EXPECT_GE(p.padded_m, m);
  EXPECT_EQ(p.padded_m % p.tokens, 0);
  EXPECT_LE(p.ctas(), d.multiprocessors);
  EXPECT_GE(std::int64_t{p.row_blocks[0]} * p.rows * p.cluster_size, f.n);
  EXPECT_EQ(p.tiles, p.row_blocks[0] * (p.padded_m / p.tokens));
  if (p.k_split_log > 0) {
    EXPECT_TRUE(p.kernel == GemmKernel::wgmma && gemm_splits_k(p.tokens, p.regular));
    EXPECT_EQ(p.clusters, p.tiles);
    EXPECT_EQ(p.split_tiles, p.tiles);
    EXPECT_GE(p.slices, 1 << p.k_split_log) << "a CTA without slices";
    EXPECT_LE(p.tiles, d.max_clusters(p.cluster_size << p.k_split_log)) << "not resident at once";
  }
  // Whole tiles go round by round; the others slice by slice, and no cluster gets two slices more than another.
  EXPECT_EQ((p.tiles - p.split_tiles) % p.clusters, 0);
  EXPECT_EQ(p.slices_per_cluster() * p.clusters + p.longer_clusters(), p.split_tiles * p.slices);
  EXPECT_LT(p.longer_clusters(), p.clusters);
  EXPECT_EQ(p.x_bytes % 16, 0);
  EXPECT_EQ(p.partial_bytes % 16, 0);
}

TEST(Plan, GemmSharesOutAllSlices) {
  for (const DeviceProperties& d : kDevices) {
    for (const Grid& grid : grids()) {
      if (!supports_grid(grid) || (grid.trellis != nullptr && !has_wgmma(d))) continue;
      for (const std::int64_t k : {64, 192, 576, 4096, 11008, 64 * 1001}) {
        for (const std::int64_t n : {0, 1, 17, 576, 4096, 128256}) {
          for (const std::int64_t m : {1, 17, 32, 64, 65, 128, 200, 256, 300, 4096}) {
            const LayerFormat f = format(grid, n, k);
            const GemmPlan p = plan_gemm({m, DType::bf16, {&f, 1}}, d);
            SCOPED_TRACE(d.name + " " + std::string(grid.name) + " " + std::to_string(m) + " x " + std::to_string(n) +
                         " x " + std::to_string(k) + ": " + p.to_string());
            expect_valid(p, f, m, d);
          }
        }
      }
    }
  }
}

TEST(Plan, GemmKernelByArchitecture) {
  for (const char* name : {"p2_n256", "p4_n64"}) {
    const LayerFormat f = format(find_grid(name), 4096, 4096);
    for (const DeviceProperties& d : kDevices) {
      for (const std::int64_t m : {16, 32, 64}) {
        EXPECT_EQ(plan_gemm({m, DType::f16, {&f, 1}}, d).kernel, d.sm() == 90 ? GemmKernel::wgmma : GemmKernel::mma)
            << d.name << ", m = " << m;
      }
    }
  }
}

TEST(Plan, GemmSplitsKWithinClustersThatFit) {
  const LayerFormat f = format(find_grid("p2_n256"), 4096, 4096);
  DeviceProperties d = kDevices[3];
  d.resident_clusters = {0, 132, 66, 43, 30, 24, 20, 16, 15};  // of an H200: 2, 4 and 8
  const auto split = [&](std::int64_t m) { return 1 << plan_gemm({m, DType::bf16, {&f, 1}}, d).k_split_log; };
  EXPECT_EQ(split(64), 4);  // 22 tiles of 8 slices
  EXPECT_EQ(split(4096), 1);
  d.resident_clusters[4] = 21;
  EXPECT_EQ(split(64), 1) << "by 2, CTAs would have twice the slices that even shares give them";
}

TEST(Plan, XOfMoreThanFourRowsIsPreparedForATrellis) {
  const LayerFormat f = format(find_grid("a2_b8"), 28672, 4096);
  for (const DeviceProperties& d : kDevices) {
    for (const std::int64_t m : {1, 4, 5, 8, 9, 16}) {
      const LaunchPlan p = plan({m, DType::bf16, {&f, 1}}, d);
      EXPECT_EQ(p.prepared, p.rows > 4) << d.name << " " << m;
      EXPECT_GE(p.chunks, 1) << "scales of x";
    }
  }
  EXPECT_EQ(plan({16, DType::bf16, {&f, 1}}, kDevices[3]).rows, 16);
}

TEST(Plan, UpToThirtyTwoRowsMeetATrellisInProductsOfIntegers) {
  const DeviceProperties& h200 = kDevices[3];
  for (const char* name : {"a2_b4", "a2_b5", "a2_b6", "a2_b7", "a2_b8"}) {
    LayerFormat f = format(find_grid(name), 4096, 4096);
    for (const auto& [m, padded] : {std::pair{1, 16}, {16, 16}, {17, 32}, {32, 32}}) {
      const GemmPlan p = plan_gemm({m, DType::bf16, {&f, 1}}, h200);
      EXPECT_TRUE(p.bytes) << name;
      EXPECT_EQ(p.x_bytes, padded * (2 * 4096 + 4096 / 512 * 8)) << name << ": digits, scales and half sums";
    }
    EXPECT_FALSE(plan_gemm({33, DType::bf16, {&f, 1}}, h200).bytes) << name;
    f.group = f.block = 64;  // scales change within a slice
    EXPECT_FALSE(plan_gemm({16, DType::bf16, {&f, 1}}, h200).bytes) << name;
  }
  const LayerFormat pairs = format(find_grid("p2_n256"), 4096, 4096);
  EXPECT_FALSE(plan_gemm({16, DType::bf16, {&pairs, 1}}, h200).bytes);
}

TEST(Plan, UpToThirtyTwoRowsMeetBytesOfQuadsInProductsOfIntegers) {
  const DeviceProperties& h200 = kDevices[3];
  for (const auto& [name, most] : {std::pair{"p4_n256", 32}, {"p2_n16", 32}, {"p1_n4", 32}, {"p4_n4096", 16}}) {
    LayerFormat f = format(find_grid(name), 4096, 4096);
    for (const auto& [m, padded] : {std::pair{1, 16}, {16, 16}, {17, 32}, {32, 32}}) {
      const GemmPlan p = plan_gemm({m, DType::bf16, {&f, 1}}, h200);
      EXPECT_EQ(p.bytes, m <= most) << name;
      if (!p.bytes) continue;
      EXPECT_EQ(p.x_bytes, padded * (2 * 4096 + 4096 / 512 * 8)) << name << ": digits, scales and half sums";
    }
    EXPECT_FALSE(plan_gemm({33, DType::bf16, {&f, 1}}, h200).bytes) << name;
    EXPECT_FALSE(plan_gemm({16, DType::bf16, {&f, 1}}, kDevices[0]).bytes) << name;
    f.group = f.block = 64;  // scales change within a slice
    EXPECT_FALSE(plan_gemm({16, DType::bf16, {&f, 1}}, h200).bytes) << name;
  }
  const LayerFormat few = format(find_grid("p4_n64"), 4096, 4096);
  EXPECT_FALSE(plan_gemm({16, DType::bf16, {&few, 1}}, h200).bytes);
}

TEST(Plan, GemmTakesBlocksWithAnOddFactor) {
  const LayerFormat f{&find_grid("p2_n256"), 64, 576, 576, 576, 0};
  for (const DeviceProperties& d : kDevices) expect_valid(plan_gemm({3, DType::f16, {&f, 1}}, d), f, 3, d);
}

TEST(Plan, GemmNeedsSharedMemory) {
  const LayerFormat f = format(find_grid("p2_n256"), 4096, 4096);
  try {
    (void)plan_gemm({64, DType::f16, {&f, 1}}, device(7, 5, 40, 64));
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::unsupported);
    EXPECT_NE(std::string(e.what()).find("sm_75 has 65536 bytes"), std::string::npos) << e.what();
  }
}

TEST(Plan, RejectsBadProblems) {
  const Grid& grid = find_grid("p2_n256");
  const LayerFormat a = format(grid, 64, 1024);
  const LayerFormat b = format(grid, 64, 2048);
  const LayerFormat both[] = {a, b};
  EXPECT_THROW((void)plan({0, DType::f16, {&a, 1}}, kDevices[3]), Error);
  EXPECT_THROW((void)plan({17, DType::f16, {&a, 1}}, kDevices[3]), Error);
  EXPECT_THROW((void)plan({1, DType::f32, {&a, 1}}, kDevices[3]), Error);
  EXPECT_THROW((void)plan({1, DType::f16, {}}, kDevices[3]), Error);
  EXPECT_THROW((void)plan({1, DType::f16, both}, kDevices[3]), Error);
}

TEST(Plan, BlocksWithAnOddFactorAreRefused) {
  const LayerFormat f{&find_grid("p2_n256"), 64, 576, 576, 576, 0};
  try {
    (void)plan({1, DType::f16, {&f, 1}}, kDevices[3]);
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::unsupported);
    EXPECT_NE(std::string(e.what()).find("block 576"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace higgs::cuda
