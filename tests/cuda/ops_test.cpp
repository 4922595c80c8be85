// rotate, dequantize, quantize and repack give the bits of the CPU definition.
#include "helpers.h"

namespace higgs::cuda::test {
namespace {

constexpr Shape kShapes[] = {{37, 64, 64, 64},    {19, 576, 64, 576},     {33, 320, 64, 128},    {16, 1024, 1024, 1024},
                             {50, 2240, 64, 640}, {21, 4096, 1024, 1024}, {18, 1536, 512, 1536}, {5, 11008, 256, 1024},
                             {40, 576, 576, 576}, {23, 2304, 768, 768},   {17, 1920, 960, 960},  {9, 1152, 384, 768}};

std::vector<float> to_floats(const std::vector<std::uint16_t>& halves) {
  std::vector<float> out;
  for (const std::uint16_t h : halves) out.push_back(f16_to_f32(h));
  return out;
}

TEST(CudaRotate, MatchesTheCore) {
  HIGGS_NEEDS_GPU();
  for (const Shape& s : kShapes) {
    const Layer layer(find_grid("p2_n256"), s.n, s.k, s.block, s.group);
    const std::vector<float> column_scale = to_floats(layer.column_scale);
    Buffer<float> vector(static_cast<std::size_t>(s.k));
    std::vector<float> d(static_cast<std::size_t>(s.k));
    input_vector(layer.format.seed, column_scale, d);
    rotation_vector(VectorKind::input, layer.format.seed, layer.device_column_scale.data(), s.k, vector.data(),
                    nullptr);
    EXPECT_EQ(vector.host(), d);
    rotation_vector(VectorKind::weight, layer.format.seed, layer.device_column_scale.data(), s.k, vector.data(),
                    nullptr);
    for (const DType in_type : {DType::f32, DType::f16, DType::bf16}) {
      const std::vector<std::uint8_t> in = stored(gaussian(static_cast<std::size_t>(s.n * s.k)), in_type);
      std::vector<float> expected(static_cast<std::size_t>(s.n * s.k));
      higgs::rotate({reinterpret_cast<const std::byte*>(in.data()), in_type, s.n, s.k}, s.block, layer.format.seed,
                    column_scale, matrix(expected.data(), s.n, s.k));
      const Buffer<std::uint8_t> device_in(in);
      for (const DType out_type : {DType::f32, DType::f16, DType::bf16}) {
        const Buffer<std::uint8_t> out(expected.size() * size_of(out_type));
        rotate(device_in.data(), in_type, s.n, s.k, s.block, vector.data(), out.data(), out_type, nullptr);
        EXPECT_EQ(out.host(), stored(expected, out_type))
            << layer.name() << " " << name_of(in_type) << name_of(out_type);
      }
    }
  }
}

using CudaOpsGrids = GridTest;
INSTANTIATE_TEST_SUITE_P(Every, CudaOpsGrids, testing::ValuesIn(grid_numbers([](const Grid&) { return true; })),
                         grid_name);

TEST_P(CudaOpsGrids, DequantizeMatchesTheCore) {
  HIGGS_NEEDS_GPU();
  for (const Shape& s : kShapes) {
    const Layer layer(grid, s.n, s.k, s.block, s.group);
    const auto count = static_cast<std::size_t>(s.n * s.k);
    Buffer<std::byte> tiled(static_cast<std::size_t>(tiled_format(layer.format).bytes));
    repack(layer.device(), tiled.data(), nullptr);
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      std::vector<std::uint8_t> expected(count * size_of(dtype));
      const Buffer<std::uint8_t> out(expected.size());
      const MatrixView view{reinterpret_cast<std::byte*>(expected.data()), dtype, s.n, s.k};
      higgs::dequantize(layer.host(), view);
      dequantize(layer.device(), out.data(), dtype, nullptr);
      EXPECT_EQ(out.host(), expected) << "dequantize " << layer.name();
      higgs::dequantize_rotated(layer.host(), view);
      dequantize_rotated(layer.device(), out.data(), dtype, nullptr);
      EXPECT_EQ(out.host(), expected) << "dequantize_rotated " << layer.name();
      Buffer<std::uint8_t> from_tiled(expected.size());
      dequantize_rotated(TiledView{layer.format, tiled.data()}, from_tiled.data(), dtype, nullptr);
      EXPECT_EQ(from_tiled.host(), expected) << "dequantize_rotated (tiled) " << layer.name();
      const std::int64_t first = std::min<std::int64_t>(kTileRows, s.n - 1) / kTileRows * kTileRows;
      const std::size_t skipped = static_cast<std::size_t>(first * s.k) * size_of(dtype);
      Buffer<std::uint8_t> rows(expected.size() - skipped);
      dequantize_rotated({layer.format, tiled.data()}, first, s.n - first, rows.data(), dtype, nullptr);
      EXPECT_EQ(rows.host(), std::vector(expected.begin() + static_cast<std::ptrdiff_t>(skipped), expected.end()))
          << "dequantize_rotated (rows) " << layer.name();
    }
  }
}

TEST_P(CudaOpsGrids, RepackRoundTrips) {
  HIGGS_NEEDS_GPU();
  for (const Shape& s : kShapes) {
    const Layer layer(grid, s.n, s.k, s.block, s.group);
    Buffer<std::byte> tiled(static_cast<std::size_t>(tiled_format(layer.format).bytes));
    Buffer<std::uint8_t> indices(layer.indices.size());
    Buffer<std::uint16_t> scales(layer.scales.size());
    repack(layer.device(), tiled.data(), nullptr);
    unrepack({layer.format, tiled.data()}, indices.data(), scales.data(), nullptr);
    EXPECT_EQ(indices.host(), layer.indices) << layer.name();
    EXPECT_EQ(scales.host(), layer.scales) << layer.name();
  }
}

void expect_same_quantization(const Layer& layer, DType dtype, const std::vector<float>& w) {
  const LayerFormat& f = layer.format;
  const std::vector<std::uint8_t> bytes = stored(w, dtype);
  std::vector<std::uint8_t> indices(layer.indices.size());
  std::vector<std::uint16_t> scales(layer.scales.size());
  const QuantizeResult expected = higgs::quantize({reinterpret_cast<const std::byte*>(bytes.data()), dtype, f.n, f.k},
                                                  f, layer.column_scale.data(), indices.data(), scales.data());
  const Buffer<std::uint8_t> device_w(bytes);
  Buffer<std::uint8_t> out(indices.size());
  Buffer<std::uint16_t> out_scales(scales.size());
  Buffer<double> stats(static_cast<std::size_t>(2 * f.n));
  quantize(device_w.data(), dtype, f, layer.device_column_scale.data(), out.data(), out_scales.data(), stats.data(),
           nullptr);
  EXPECT_EQ(out.host(), indices) << layer.name() << " " << name_of(dtype);
  EXPECT_EQ(out_scales.host(), scales) << layer.name() << " " << name_of(dtype);
  double error = 0;
  double energy = 0;
  const std::vector<double> rows = stats.host();
  for (std::size_t i = 0; i < rows.size(); i += 2) error += rows[i], energy += rows[i + 1];
  EXPECT_EQ(error, expected.error) << layer.name();
  EXPECT_EQ(energy, expected.energy) << layer.name();
}

using CudaQuantizeGrids = GridTest;
INSTANTIATE_TEST_SUITE_P(Every, CudaQuantizeGrids, testing::ValuesIn(grid_numbers(supports_grid)), grid_name);

TEST_P(CudaQuantizeGrids, MatchesTheCore) {
  HIGGS_NEEDS_GPU();
  for (const Shape& s : kShapes) {
    const Layer layer(grid, s.n, s.k, s.block, s.group);
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      expect_same_quantization(layer, dtype, gaussian(static_cast<std::size_t>(s.n * s.k), 0.02f));
    }
  }
}

// As many as racecheck can follow in seconds.
TEST(CudaQuantize, FewRowsOfATrellis) {
  HIGGS_NEEDS_GPU();
  for (const char* grid : {"a2_b4", "a2_b5", "a2_b6", "a2_b7", "a2_b8"}) {
    expect_same_quantization(Layer(find_grid(grid), 3, 1024, 256, 512), DType::bf16, gaussian(3 * 1024, 0.02f));
  }
}

TEST(CudaQuantize, ZeroGroupsAndOutliers) {
  HIGGS_NEEDS_GPU();
  const Layer layer(find_grid("p2_n256"), 6, 2048, 256, 512);
  std::vector<float> w = gaussian(6 * 2048, 0.02f);
  for (int j = 0; j < 600; ++j) w[2048 + j] = 0;
  for (int j = 0; j < 2048; ++j) w[2 * 2048 + j] = 0;
  w[3 * 2048 + 7] = 40.0f;
  w[4 * 2048 + 9] = 1e-6f;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) expect_same_quantization(layer, dtype, w);
}

}  // namespace
}  // namespace higgs::cuda::test
