// The kernel for experts: its plans, and its outputs against those of `linear` on every expert.
#include "higgs/cuda/grouped.h"

#include "helpers.h"

namespace higgs::cuda::test {
namespace {

DeviceProperties device_of(int sm_major, int shared_kilobytes) {
  DeviceProperties d;
  d.name = "sm_" + std::to_string(sm_major) + "0";
  d.sm_major = sm_major;
  d.multiprocessors = 132;
  d.shared_bytes_per_block = shared_kilobytes * 1024;
  return d;
}

struct Experts {
  int experts;
  std::int64_t n;
  std::int64_t k;
};
constexpr Experts kModels[] = {{8, 28672, 4096}, {8, 4096, 14336}, {128, 1536, 2048}, {128, 2048, 768}, {4, 64, 64}};

LayerFormat format_of(const Grid& grid, const Experts& e) {
  const int block = default_block(e.k);
  return {&grid, e.experts * e.n, e.k, block, default_group(e.k, block), 0};
}

TEST(GroupedPlan, EveryFormatOfAVectorGridHasOne) {
  for (const DeviceProperties& device : {device_of(9, 227), device_of(8, 163), device_of(8, 99)}) {
    for (const Grid& grid : grids()) {
      if (grid.trellis != nullptr) continue;
      for (const Experts& e : kModels) {
        const LayerFormat format = format_of(grid, e);
        const std::int64_t most = grouped_linear_max_rows(format, e.experts, DType::f16, device);
        EXPECT_GE(most, e.experts * 5) << e.k;
        const GroupedPlan single = plan_grouped({format, e.experts, 1, DType::f16}, device);
        for (const std::int64_t rows : {1, 2, 8, 16, 60, 500, 4096, 10000}) {
          if (rows > most) break;
          const GroupedPlan p = plan_grouped({format, e.experts, rows, DType::f16}, device);
          SCOPED_TRACE(std::to_string(rows) + " rows, " + p.to_string());
          EXPECT_LE(p.shared_bytes, device.shared_bytes_per_block);
          EXPECT_LE(p.threads(), 512);
          EXPECT_GE(p.k_warps * p.slices_per_warp, tiled_format(format).slices);
          EXPECT_LT((p.k_warps - 1) * p.slices_per_warp, tiled_format(format).slices);
          EXPECT_GE(std::int64_t{p.rounds} * p.row_groups * kTileRows, e.n);
          EXPECT_GE(std::int64_t{p.max_items} * p.tokens, rows);
          EXPECT_LE(p.max_items, rows);
          EXPECT_LE(p.tokens, 8 * p.token_tiles);
          // The order of the sums, which is that of any other number of rows.
          EXPECT_EQ(p.k_warps, single.k_warps);
          EXPECT_EQ(p.slices_per_warp, single.slices_per_warp);
        }
      }
    }
  }
}

void expect_error(ErrorCode code, const std::string& text, const GroupedProblem& problem) {
  try {
    (void)plan_grouped(problem, device_of(9, 227));
    ADD_FAILURE() << "no error; expected " << text;
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), code);
    EXPECT_NE(std::string(e.what()).find(text), std::string::npos) << e.what();
  }
}

TEST(GroupedPlan, Errors) {
  const LayerFormat format = format_of(find_grid("p2_n256"), {4, 64, 256});
  expect_error(ErrorCode::invalid_argument, "3 experts cannot share n = 256 rows", {format, 3, 1, DType::f16});
  expect_error(ErrorCode::invalid_argument, "0 rows of x; use 1..16384", {format, 4, 0, DType::f16});
  expect_error(ErrorCode::type, "x is float32", {format, 4, 1, DType::f32});
  expect_error(ErrorCode::unsupported, "experts of 8 rows", {format, 32, 1, DType::f16});
  const LayerFormat trellis = format_of(find_grid("a2_b6"), {4, 64, 256});
  expect_error(ErrorCode::unsupported, "no kernel for trellis grids", {trellis, 4, 1, DType::f16});
}

// Both kernels round x and the points alike; they differ in the order of the sums and how they rotate x.
TEST(GroupedLinear, IsLinearWithTheExpertOfTheRow) {
  HIGGS_NEEDS_GPU();
  const Experts shape{3, 48, 1152};
  const std::vector<std::int32_t> offsets{2, 2, 25};
  for (const char* grid : {"p4_n64", "p4_n4096", "p2_n32", "p2_n256", "p2_n2048", "ch8"}) {
    const Layer layer(find_grid(grid), shape.experts * shape.n, shape.k, 128, 384);
    const LayerFormat& f = layer.format;
    Buffer<std::byte> tiled(static_cast<std::size_t>(tiled_format(f).bytes));
    repack(layer.device(), tiled.data(), nullptr);
    Buffer<float> d(static_cast<std::size_t>(f.k));
    rotation_vector(VectorKind::input, f.seed, layer.device_column_scale.data(), f.k, d.data(), nullptr);
    const std::int64_t rows = offsets.back();
    const Buffer<std::uint8_t> x(stored(gaussian(static_cast<std::size_t>(rows * f.k)), DType::f16));
    const Buffer<std::int32_t> ends(offsets);
    Buffer<std::uint8_t> y(static_cast<std::size_t>(rows * shape.n) * 2);
    Buffer<std::uint8_t> workspace(static_cast<std::size_t>(rows * f.k) * 2);
    grouped_linear({f, shape.experts, rows, DType::f16}, tiled.data(), x.data(), d.data(), ends.data(), y.data(),
                   workspace.data(), nullptr);
    Buffer<std::uint8_t> all(static_cast<std::size_t>(rows * f.n) * 2);
    const LinearPart part{{f, tiled.data()}, nullptr, all.data()};
    Buffer<std::uint8_t> scratch(static_cast<std::size_t>(linear_workspace_bytes(rows, DType::f16, {&part, 1})));
    linear(x.data(), DType::f16, rows, d.data(), {&part, 1}, scratch.data(), nullptr);
    const std::vector<float> ours = loaded(y.host(), DType::f16);
    const std::vector<float> expected = loaded(all.host(), DType::f16);
    double error = 0;
    double norm = 0;
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t expert = i < offsets[0] ? 0 : 2;
      for (std::int64_t o = 0; o < shape.n; ++o) {
        const double e = expected[static_cast<std::size_t>(i * f.n + expert * shape.n + o)];
        error += std::pow(ours[static_cast<std::size_t>(i * shape.n + o)] - e, 2);
        norm += e * e;
      }
    }
    EXPECT_LE(std::sqrt(error), 2e-3 * std::sqrt(norm)) << grid;  // false for NaN: every output was written
  }
}

}  // namespace
}  // namespace higgs::cuda::test
