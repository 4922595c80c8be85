// linear against the float64 oracle: error at most twice that of a matmul in the same dtype on dequantized weights.
#include <array>
#include <deque>

#include "helpers.h"

namespace higgs::cuda::test {
namespace {

struct Case {
  std::int64_t m;
  DType dtype;
  bool bias;
};

double norm_of_difference(const std::vector<double>& a, const std::vector<float>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}

// The error to expect of torch.matmul in `dtype` (norm over y): weights rounded once, exact sums, result rounded once.
// Variances are added up, so that few outputs have no lucky baseline.
double matmul_error(const std::vector<float>& x, const std::vector<double>& w, const std::vector<double>& expected,
                    const LayerFormat& f, std::int64_t m, DType dtype) {
  std::vector<double> rounding(w.size());
  for (std::size_t i = 0; i < w.size(); ++i) rounding[i] = w[i] - rounded(static_cast<float>(w[i]), dtype);
  const int mantissa_bits = dtype == DType::f16 ? 10 : 7;
  double variance = 0;
  for (std::int64_t t = 0; t < m; ++t) {
    for (std::int64_t i = 0; i < f.n; ++i) {
      for (std::int64_t j = 0; j < f.k; ++j) {
        const double e = x[t * f.k + j] * rounding[i * f.k + j];
        variance += e * e;
      }
      const double y = expected[static_cast<std::size_t>(t * f.n + i)];
      const double ulp = y == 0 ? 0 : std::ldexp(1.0, std::ilogb(y) - mantissa_bits);
      variance += ulp * ulp / 12;
    }
  }
  return std::sqrt(variance);
}

std::vector<std::uint8_t> run(const Layer& layer, const Buffer<std::byte>& tiled, const Buffer<std::uint8_t>& x,
                              const Buffer<float>& d, const void* bias, const Case& c, const DeviceProperties& device) {
  Buffer<std::uint8_t> y(static_cast<std::size_t>(c.m * layer.format.n) * 2);
  const LinearPart part{{layer.format, tiled.data()}, bias, y.data()};
  Buffer<std::uint8_t> workspace(static_cast<std::size_t>(linear_workspace_bytes(c.m, c.dtype, {&part, 1}, device)));
  linear(x.data(), c.dtype, c.m, d.data(), {&part, 1}, workspace.data(), nullptr, device);
  return y.host();
}

// Error over that of a matmul in the same dtype, root mean square over the cases of a test.
struct Ratios {
  double sum = 0;
  int count = 0;
  void add(double ratio) { sum += ratio * ratio, ++count; }
  ~Ratios() {
    if (count > 0) EXPECT_LE(std::sqrt(sum / count), 2.0);
  }
};

// The current device, and as if it were one without clusters and wgmma.
std::vector<DeviceProperties> planned_devices() {
  const DeviceProperties& d = current_device();
  DeviceProperties old;
  old.name = d.name + " as sm_86";
  old.sm_major = 8;
  old.sm_minor = 6;
  old.multiprocessors = d.multiprocessors;
  old.shared_bytes_per_block = 99 * 1024;
  return {d, old};
}

void check_layer(const Layer& layer, std::span<const Case> cases, Ratios& ratios) {
  const LayerFormat& f = layer.format;
  Buffer<std::byte> tiled(static_cast<std::size_t>(tiled_format(f).bytes));
  repack(layer.device(), tiled.data(), nullptr);
  Buffer<float> d(static_cast<std::size_t>(f.k));
  rotation_vector(VectorKind::input, f.seed, layer.device_column_scale.data(), f.k, d.data(), nullptr);
  const std::vector<double> w = reference::dequantize(layer.host());
  for (const Case& c : cases) {
    SCOPED_TRACE(layer.name() + " m=" + std::to_string(c.m) + " " + name_of(c.dtype));
    const std::vector<std::uint8_t> x_bytes = stored(gaussian(static_cast<std::size_t>(c.m * f.k)), c.dtype);
    const std::vector<std::uint8_t> bias_bytes = stored(gaussian(static_cast<std::size_t>(c.bias ? f.n : 0)), c.dtype);
    const std::vector<float> x = loaded(x_bytes, c.dtype);
    const std::vector<float> bias = loaded(bias_bytes, c.dtype);
    const Buffer<std::uint8_t> device_x(x_bytes);
    const Buffer<std::uint8_t> device_bias(bias_bytes);
    const void* bias_pointer = c.bias ? device_bias.data() : nullptr;
    std::vector<double> expected(static_cast<std::size_t>(c.m * f.n));
    for (std::int64_t t = 0; t < c.m; ++t) {
      for (std::int64_t i = 0; i < f.n; ++i) {
        double sum = c.bias ? bias[static_cast<std::size_t>(i)] : 0.0;
        for (std::int64_t j = 0; j < f.k; ++j) sum += x[t * f.k + j] * w[static_cast<std::size_t>(i * f.k + j)];
        expected[static_cast<std::size_t>(t * f.n + i)] = sum;
      }
    }
    const double baseline = matmul_error(x, w, expected, f, c.m, c.dtype);
    for (const DeviceProperties& device : planned_devices()) {
      if (f.grid->trellis != nullptr && c.m > linear_max_rows(c.dtype, f, device)) {
        EXPECT_THROW((void)run(layer, tiled, device_x, d, bias_pointer, c, device), Error) << device.name;
        continue;
      }
      const std::vector<std::uint8_t> y = run(layer, tiled, device_x, d, bias_pointer, c, device);
      EXPECT_EQ(run(layer, tiled, device_x, d, bias_pointer, c, device), y) << "second run, " << device.name;
      EXPECT_EQ(run(layer, tiled, device_x, d, bias_pointer, c, device), y) << "third run, " << device.name;
      const double error = norm_of_difference(expected, loaded(y, c.dtype));
      // Few outputs are a small sample of rounding errors: their bound is looser, the mean over all cases is not. False
      // for NaN: every output was written.
      EXPECT_LE(error, (expected.size() < 256 ? 4 : 2) * baseline) << device.name;
      ratios.add(error / baseline);
    }
  }
}

constexpr Case kAllCases[] = {{1, DType::f16, false}, {1, DType::bf16, true}, {3, DType::bf16, false},
                              {8, DType::f16, true},  {9, DType::f16, false}, {16, DType::bf16, true}};
constexpr Case kGemmCases[] = {{17, DType::f16, true},   {33, DType::bf16, false}, {100, DType::f16, false},
                               {200, DType::bf16, true}, {300, DType::f16, true},  {515, DType::bf16, false}};
constexpr Case kFewCases[] = {{1, DType::f16, true}, {5, DType::bf16, false}, {13, DType::f16, true}};

class CudaLinearGrids : public GridTest {
 protected:
  Ratios ratios;
};
INSTANTIATE_TEST_SUITE_P(Every, CudaLinearGrids, testing::ValuesIn(grid_numbers(supports_grid)), grid_name);

TEST_P(CudaLinearGrids, FullSlices) {
  HIGGS_NEEDS_GPU();
  check_layer(Layer(grid, 72, 3072, 1024, 1024 * 3), kAllCases, ratios);
}

TEST_P(CudaLinearGrids, RaggedShapes) {
  HIGGS_NEEDS_GPU();
  check_layer(Layer(grid, 41, 576, 64, 576), kAllCases, ratios);
  check_layer(Layer(grid, 23, 64 * 35, 64, 640), kFewCases, ratios);
  check_layer(Layer(grid, 7, 64, 64, 64), kFewCases, ratios);
  check_layer(Layer(grid, 20, 64 * 13, 64, 64), kFewCases, ratios);
}

// Several row tiles a warp, with a last slice that is not full.
TEST_P(CudaLinearGrids, RaggedSlicesInSeveralRounds) {
  HIGGS_NEEDS_GPU();
  check_layer(Layer(grid, 5000, 896, 128, 896), kFewCases, ratios);
}

TEST_P(CudaLinearGrids, Gemm) {
  HIGGS_NEEDS_GPU();
  check_layer(Layer(grid, 72, 3072, 1024, 1024 * 3), kGemmCases, ratios);
  check_layer(Layer(grid, 41, 576, 64, 576), kGemmCases, ratios);
  check_layer(Layer(grid, 23, 64 * 35, 64, 640), kGemmCases, ratios);
  check_layer(Layer(grid, 7, 64, 64, 64), kGemmCases, ratios);
  check_layer(Layer(grid, 20, 64 * 13, 64, 64), kGemmCases, ratios);
  check_layer(Layer(grid, 33, 576, 576, 576), kGemmCases, ratios);
  check_layer(Layer(grid, 33, 192 * 8, 192, 1536), kFewCases, ratios);
}

// Tiles shared among CTAs, whole tiles, and both.
TEST(CudaLinear, GemmSchedules) {
  HIGGS_NEEDS_GPU();
  Ratios ratios;
  constexpr Case kCases[] = {{24, DType::bf16, false}, {60, DType::f16, false}, {150, DType::f16, false}};
  for (const Shape& s : {Shape{2064, 1024, 64, 1024}, Shape{300, 4096, 64, 1024}, Shape{27000, 64, 64, 64},
                         Shape{4000, 512 + 64, 64, 64}}) {
    check_layer(Layer(find_grid("p2_n256"), s.n, s.k, s.block, s.group), kCases, ratios);
  }
  constexpr Case kBytes[] = {{17, DType::f16, true}, {24, DType::bf16, false}, {32, DType::f16, false}};
  for (const char* grid : {"p4_n256", "p4_n4096"}) {
    for (const Shape& s : {Shape{2064, 1024, 128, 512}, Shape{300, 4096, 1024, 1024}, Shape{1100, 1536, 512, 1536}}) {
      check_layer(Layer(find_grid(grid), s.n, s.k, s.block, s.group), kBytes, ratios);
    }
  }
}

// On an H200 seven or eight CTAs share a tile of 32 tokens, four of which add up the sums of all.
TEST(CudaLinear, ManyShareATile) {
  HIGGS_NEEDS_GPU();
  Ratios ratios;
  constexpr Case kCases[] = {{24, DType::bf16, true}};
  check_layer(Layer(find_grid("p2_n256"), 1100, 64 * 57, 64, 64), kCases, ratios);  // a scale group for each k block
  for (const char* grid : {"p2_n256", "p4_n256"}) {
    check_layer(Layer(find_grid(grid), 3900, 3584, 512, 512), kCases, ratios);
  }
}

// Tiles of 256 tokens next to the same rows in calls of 128.
TEST(CudaLinear, ManyRowsAreAsFew) {
  HIGGS_NEEDS_GPU();
  const DeviceProperties& device = current_device();
  for (const char* grid : {"p2_n256", "p2_n64", "p4_n256", "p4_n4096", "a2_b8", "p2_n1024"}) {
    for (const auto& [n, k, m] : {std::array{8448, 2560, 1100}, {4096, 2048, 1024}, {17000, 3072, 500}}) {
      const Layer layer(find_grid(grid), n, k, 512, 512);
      SCOPED_TRACE(layer.name() + " m=" + std::to_string(m));
      if (m > linear_max_rows(DType::bf16, layer.format, device)) continue;
      Buffer<std::byte> tiled(static_cast<std::size_t>(tiled_format(layer.format).bytes));
      repack(layer.device(), tiled.data(), nullptr);
      Buffer<float> d(static_cast<std::size_t>(k));
      rotation_vector(VectorKind::input, 7, nullptr, k, d.data(), nullptr);
      const std::vector<std::uint8_t> x = stored(gaussian(static_cast<std::size_t>(m) * k), DType::bf16);
      const Buffer<std::uint8_t> all(x);
      const auto y = run(layer, tiled, all, d, nullptr, {m, DType::bf16, false}, device);
      for (int i = 0; i < 8; ++i) EXPECT_EQ(run(layer, tiled, all, d, nullptr, {m, DType::bf16, false}, device), y);
      const std::vector<float> many = loaded(y, DType::bf16);
      std::size_t at = 0;
      for (int first = 0; first < m; first += 128) {
        const int rows = std::min(128, m - first);
        const Buffer<std::uint8_t> some(std::vector<std::uint8_t>(x.begin() + std::int64_t{first} * k * 2,
                                                                  x.begin() + std::int64_t{first + rows} * k * 2));
        for (const float few :
             loaded(run(layer, tiled, some, d, nullptr, {rows, DType::bf16, false}, device), DType::bf16)) {
          ASSERT_NEAR(many[at], few, 0.05f + 0.01f * std::abs(few)) << "y[" << at / n << ", " << at % n << "]";
          ++at;
        }
      }
    }
  }
}

// Matrices that share x, and y of each for m rows in bf16.
struct SharedX {
  std::deque<Buffer<std::byte>> tiled;
  std::deque<Buffer<std::uint8_t>> ys;
  std::vector<LinearPart> parts;

  void add(const Layer& layer, std::int64_t m) {
    tiled.emplace_back(static_cast<std::size_t>(tiled_format(layer.format).bytes));
    ys.emplace_back(static_cast<std::size_t>(m * layer.format.n * 2));
    repack(layer.device(), tiled.back().data(), nullptr);
    ok(cudaDeviceSynchronize());  // the layer may go
    parts.push_back({{layer.format, tiled.back().data()}, nullptr, ys.back().data()});
  }
};

// Whole and shared tiles of several matrices, whose sums, words, stages and outputs follow each other in a CTA: the
// same bits however its warps meet.
TEST(CudaLinear, ManyTilesAreTheSameInEveryRun) {
  HIGGS_NEEDS_GPU();
  const DeviceProperties& device = current_device();
  struct Problem {
    std::vector<std::int64_t> n;
    std::int64_t k;
    std::int64_t m;
  };
  for (const char* grid : {"p2_n256", "p4_n4096", "a2_b6"}) {
    for (const Problem& problem : {Problem{{1003, 256}, 4096, 1024}, Problem{{200, 1000}, 4096, 1024},
                                   Problem{{2056}, 6144, 741}, Problem{{4100}, 4096, 287}, Problem{{8192}, 1024, 883},
                                   Problem{{8192}, 2048, 128}, Problem{{8192}, 2048, 64}}) {
      const auto& [ns, k, m] = problem;
      SCOPED_TRACE(std::string(grid) + " n=" + std::to_string(ns[0]) + " m=" + std::to_string(m));
      Buffer<float> d(static_cast<std::size_t>(k));
      rotation_vector(VectorKind::input, 3, nullptr, k, d.data(), nullptr);
      const Buffer<std::uint8_t> x(stored(gaussian(static_cast<std::size_t>(m * k)), DType::bf16));
      SharedX shared;
      for (const std::int64_t n : ns) shared.add(Layer(find_grid(grid), n, k, 1024, 1024), m);
      auto& [tiled, ys, parts] = shared;
      Buffer<std::uint8_t> workspace(static_cast<std::size_t>(linear_workspace_bytes(m, DType::bf16, parts, device)));
      std::vector<std::vector<std::uint8_t>> first;
      for (int i = 0; i < 12; ++i) {
        workspace.poison();
        for (Buffer<std::uint8_t>& y : ys) y.poison();
        linear(x.data(), DType::bf16, m, d.data(), parts, workspace.data(), nullptr, device);
        for (std::size_t part = 0; part < ys.size(); ++part) {
          if (i == 0) {
            first.push_back(ys[part].host());
          } else {
            EXPECT_EQ(ys[part].host(), first[part]) << "run " << i << " of matrix " << part;
          }
        }
      }
      // Alone, other tiles are shared, at other columns.
      for (std::size_t part = 0; part < ys.size() && ys.size() > 1; ++part) {
        linear(x.data(), DType::bf16, m, d.data(), {&parts[part], 1}, workspace.data(), nullptr, device);
        const std::vector<float> together = loaded(first[part], DType::bf16);
        const std::vector<float> alone = loaded(ys[part].host(), DType::bf16);
        for (std::size_t i = 0; i < alone.size(); ++i) {
          ASSERT_NEAR(together[i], alone[i], 0.05f + 0.01f * std::abs(alone[i])) << "matrix " << part << " at " << i;
        }
      }
    }
  }
}

class CudaLinearRealShapes : public testing::TestWithParam<const char*> {};

TEST_P(CudaLinearRealShapes, MatchTheOracle) {
  HIGGS_NEEDS_GPU();
  Ratios ratios;
  for (const Shape& s : {Shape{4112, 1024, 1024, 1024}, Shape{300, 4096, 1024, 1024}, Shape{130, 8192, 1024, 1024},
                         Shape{70, 14336, 1024, 1024}, Shape{70, 11008, 256, 1024}, Shape{40, 28672, 1024, 1024}}) {
    check_layer(Layer(find_grid(GetParam()), s.n, s.k, s.block, s.group), kAllCases, ratios);
  }
}
// Several rounds of row blocks, in loops that differ with the number of rows of x: a row alone has MatchTheOracle.
TEST_P(CudaLinearRealShapes, RowsOfABatchAreThoseAlone) {
  HIGGS_NEEDS_GPU();
  const Layer layer(find_grid(GetParam()), 33000, 1024, 1024, 1024);  // more than 2^25 weights: 16 rows take the GEMM
  const LayerFormat& f = layer.format;
  Buffer<std::byte> tiled(static_cast<std::size_t>(tiled_format(f).bytes));
  repack(layer.device(), tiled.data(), nullptr);
  Buffer<float> d(static_cast<std::size_t>(f.k));
  rotation_vector(VectorKind::input, f.seed, layer.device_column_scale.data(), f.k, d.data(), nullptr);
  const std::vector<std::uint8_t> x = stored(gaussian(static_cast<std::size_t>(32 * f.k)), DType::f16);
  const auto rows = [&](std::int64_t first, std::int64_t m) {
    const Buffer<std::uint8_t> part(
        std::vector<std::uint8_t>(x.begin() + first * f.k * 2, x.begin() + (first + m) * f.k * 2));
    return loaded(run(layer, tiled, part, d, nullptr, {m, DType::f16, false}, current_device()), DType::f16);
  };
  for (const std::int64_t m : {5, 8, 12, 16, 32}) {
    const std::vector<float> batch = rows(0, m);
    for (const std::int64_t i : {std::int64_t{0}, m - 1}) {
      const std::vector<float> alone = rows(i, 1);
      double error = 0;
      double energy = 0;
      for (std::size_t j = 0; j < alone.size(); ++j) {
        const double e = batch[static_cast<std::size_t>(i * f.n) + j] - alone[j];
        error += e * e;
        energy += static_cast<double>(alone[j]) * alone[j];
      }
      EXPECT_LE(error, 1e-6 * energy) << "row " << i << " of " << m;
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Grids, CudaLinearRealShapes,
                         testing::Values("p2_n256", "p2_n64", "p4_n256", "p4_n4096", "a2_b4", "a2_b5", "a2_b6", "a2_b7",
                                         "a2_b8"),
                         [](const auto& grid) { return std::string(grid.param); });

// Layers of these grids and numbers of rows, in one call and alone. Not alike: x is rounded in another way in one call,
// to x's type instead of integers, so outputs near 0 may differ by more than they are.
void check_shared_x(const std::vector<std::pair<const char*, std::int64_t>>& layers, bool alike,
                    const std::vector<std::int64_t>& ms = {1, 6, 16, 24, 40, 200, 1100}) {
  constexpr std::int64_t kColumns = 2048;
  std::deque<Layer> made;
  for (const auto& [grid, n] : layers) made.emplace_back(find_grid(grid), n, kColumns, 1024, 1024);
  Buffer<float> d(kColumns);
  rotation_vector(VectorKind::input, 5, nullptr, kColumns, d.data(), nullptr);
  for (const std::int64_t m : ms) {
    const Buffer<std::uint8_t> x(stored(gaussian(static_cast<std::size_t>(m * kColumns)), DType::bf16));
    SharedX shared;
    for (const Layer& layer : made) shared.add(layer, m);
    auto& [tiled, together, parts] = shared;
    for (const DeviceProperties& device : planned_devices()) {
      Buffer<std::uint8_t> workspace(static_cast<std::size_t>(linear_workspace_bytes(m, DType::bf16, parts, device)));
      for (Buffer<std::uint8_t>& y : together) y.poison();
      linear(x.data(), DType::bf16, m, d.data(), parts, workspace.data(), nullptr, device);
      for (std::size_t i = 0; i < parts.size(); ++i) {
        Buffer<std::uint8_t> alone(static_cast<std::size_t>(m * parts[i].weights.format.n * 2));
        LinearPart part = parts[i];
        part.y = alone.data();
        linear(x.data(), DType::bf16, m, d.data(), {&part, 1}, workspace.data(), nullptr, device);
        const std::vector<float> a = loaded(together[i].host(), DType::bf16);
        const std::vector<float> b = loaded(alone.host(), DType::bf16);
        double error = 0;
        double energy = 0;
        for (std::size_t j = 0; j < a.size(); ++j) {
          if (alike) EXPECT_NEAR(a[j], b[j], 0.02f + 0.01f * std::abs(b[j]));
          error += (a[j] - b[j]) * (a[j] - b[j]);
          energy += b[j] * b[j];
        }
        EXPECT_LE(error, 1e-4 * energy) << parts[i].weights.format.grid->name << " m=" << m;
      }
    }
  }
}

TEST(CudaLinear, MatricesThatShareX) {
  HIGGS_NEEDS_GPU();
  check_shared_x({{"p2_n256", 300}, {"p1_n16", 72}, {"p2_n128", 65}, {"p4_n4096", 130}}, true);  // several tile sizes
  check_shared_x({{"p4_n256", 300}, {"p2_n16", 64}, {"p1_n4", 130}}, true);  // integers, up to 32 rows
  check_shared_x({{"p4_n256", 300}, {"p4_n4096", 130}}, false);              // up to 32 rows only one of them alone
  check_shared_x({{"a2_b8", 8300}, {"a2_b5", 8200}, {"p4_n256", 500}}, false, {12, 16});  // together in the GEMM
  check_shared_x({{"a2_b4", 8300}, {"a2_b6", 8200}}, false, {16});                        // x of the first is crossed
}

TEST(CudaLinear, HashedTrellisGridsAreForDequantizeRotated) {
  HIGGS_NEEDS_GPU();
  const Layer layer(find_grid("t2_b8"), 16, 256, 256, 256);
  Buffer<std::byte> tiled(static_cast<std::size_t>(tiled_format(layer.format).bytes));
  const Buffer<std::uint8_t> x(2 * 256);
  const Buffer<std::uint8_t> y(2 * 16);
  const Buffer<float> d(256);
  const LinearPart part{{layer.format, tiled.data()}, nullptr, y.data()};
  EXPECT_EQ(linear_max_rows(DType::f16, layer.format), 0);
  try {
    linear(x.data(), DType::f16, 1, d.data(), {&part, 1}, nullptr, nullptr);
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::unsupported);
    EXPECT_NE(std::string(e.what()).find("t2_b8 has no CUDA kernel that multiplies"), std::string::npos) << e.what();
  }
}

TEST(CudaLinear, NoRowsAndBadArguments) {
  HIGGS_NEEDS_GPU();
  const Layer layer(find_grid("p2_n256"), 16, 256, 256, 256);
  Buffer<std::byte> tiled(static_cast<std::size_t>(tiled_format(layer.format).bytes));
  const LinearPart part{{layer.format, tiled.data()}, nullptr, nullptr};
  EXPECT_NO_THROW(linear(nullptr, DType::f16, 0, nullptr, {&part, 1}, nullptr, nullptr));
  EXPECT_THROW(linear(nullptr, DType::f16, 1, nullptr, {&part, 1}, nullptr, nullptr), Error);
  EXPECT_THROW(linear(nullptr, DType::f32, 0, nullptr, {&part, 1}, nullptr, nullptr), Error);
  EXPECT_THROW(linear(nullptr, DType::f16, -1, nullptr, {&part, 1}, nullptr, nullptr), Error);
}

}  // namespace
}  // namespace higgs::cuda::test
