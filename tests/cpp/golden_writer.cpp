// Writes the golden files of tests/golden/ into the directory given on the command line. They are written once per
// change of the format or of the grids, by
//   cmake --build build-dev --target golden_writer && build-dev/tests/golden_writer tests/golden
// and must not change otherwise. Every array is one little-endian file `case.array.bin`; manifest.json lists the cases.
#include <bit>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "higgs/higgs.h"

namespace higgs {
namespace {

static_assert(std::endian::native == std::endian::little);

struct Case {
  const char* name;
  const char* grid;
  std::int64_t n;
  std::int64_t k;
  int block;
  std::int64_t group;
  std::uint64_t seed;
  bool column_scale;
};

constexpr Case kCases[] = {
    {"p1_n4", "p1_n4", 4, 64, 64, 64, 0, false},
    {"p2_n64", "p2_n64", 4, 192, 64, 192, 1, false},
    {"p2_n256", "p2_n256", 4, 576, 64, 576, 0, false},
    {"p2_n256_odd_block", "p2_n256", 4, 576, 576, 576, 2, true},
    {"p2_n256_column_scale", "p2_n256", 4, 256, 256, 256, 18446744073709551557ull, true},
    {"p2_n256_ragged", "p2_n256", 4, 320, 64, 128, 3, true},
    {"p1_n8_ragged", "p1_n8", 4, 448, 64, 256, 7, false},
    {"p2_n512_ragged", "p2_n512", 4, 384, 128, 256, 11, false},
    {"p2_n4096", "p2_n4096", 4, 128, 128, 128, 5, false},
    {"p4_n256", "p4_n256", 4, 256, 64, 128, 6, false},
    {"ch8", "ch8", 4, 128, 64, 128, 8, false},
    {"p1_n16_wide_block", "p1_n16", 3, 1024, 1024, 1024, 9, false},
    {"p4_n64_ragged", "p4_n64", 4, 448, 64, 256, 12, true},
    {"p4_n16", "p4_n16", 4, 192, 64, 128, 10, false},
    {"t2_b8", "t2_b8", 4, 512, 512, 512, 10, false},
    {"t2_b5_odd_block", "t2_b5", 4, 576, 576, 576, 12, true},
    {"t4_b8_ragged", "t4_b8", 4, 320, 64, 128, 13, false},
    {"a2_b6", "a2_b6", 4, 192, 192, 192, 14, false},
    {"a2_b8", "a2_b8", 4, 128, 64, 128, 15, true},
    {"a2_b4_ragged", "a2_b4", 4, 576, 64, 192, 16, false},
    {"t2_b4_two_runs", "t2_b4", 4, 1088, 64, 192, 17, false},
    {"p4_n4096_ragged", "p4_n4096", 4, 320, 64, 128, 18, true},
};

// A value in (-6, 6), roughly normal, from integers alone: the same on every machine.
float roughly_normal(std::uint64_t stream, std::uint64_t i) {
  std::int64_t sum = 0;
  for (std::uint64_t t = 0; t < 12; ++t) sum += static_cast<std::int64_t>(sign_word(stream, 12 * i + t) >> 52);
  return static_cast<float>(sum - 6 * 4096 + 6) / 4096.0f;
}

// Row 0 ordinary, row 1 with a few outliers, row 2 all zeros, row 3 large and of one sign.
std::vector<float> weights(const Case& c, std::uint64_t stream) {
  std::vector<float> w(static_cast<std::size_t>(c.n * c.k));
  for (std::size_t i = 0; i < w.size(); ++i) {
    const auto row = static_cast<std::int64_t>(i) / c.k;
    const auto column = static_cast<std::int64_t>(i) % c.k;
    const float v = roughly_normal(stream, i);
    const float outlier = column % 61 == 7 ? 30.0f : 1.0f;
    w[i] = row == 0 ? 0.02f * v : row == 1 ? 0.01f * outlier * v : row == 2 ? 0.0f : 5.0f + 0.25f * v;
  }
  return w;
}

template <typename T>
void write(const std::string& directory, const Case& c, const char* array, const std::vector<T>& values) {
  const std::string path = directory + "/" + c.name + "." + array + ".bin";
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values.data()), static_cast<std::streamsize>(values.size() * sizeof(T)));
  file.close();
  if (!file) throw std::runtime_error("cannot write " + path);
}

std::string write_case(const std::string& directory, const Case& c, std::uint64_t stream) {
  LayerFormat format;
  format.grid = &find_grid(c.grid);
  format.n = c.n;
  format.k = c.k;
  format.block = c.block;
  format.group = c.group;
  format.seed = c.seed;
  validate(format);

  const std::vector<float> w = weights(c, stream);
  std::vector<std::uint16_t> column_scale;
  for (std::int64_t j = 0; c.column_scale && j < c.k; ++j) {
    column_scale.push_back(
        f32_to_f16(0.5f + static_cast<float>(sign_word(stream + 1, static_cast<std::uint64_t>(j)) >> 62)));
  }
  std::vector<std::uint8_t> indices(static_cast<std::size_t>(format.index_bytes()));
  std::vector<std::uint16_t> scales(static_cast<std::size_t>(c.n * format.row_groups()));
  const std::uint16_t* s = c.column_scale ? column_scale.data() : nullptr;
  quantize(matrix(w.data(), c.n, c.k), format, s, indices.data(), scales.data());
  std::vector<float> dequantized(w.size());
  dequantize({format, indices.data(), scales.data(), s}, matrix(dequantized.data(), c.n, c.k));

  write(directory, c, "weights", w);
  write(directory, c, "indices", indices);
  write(directory, c, "scales", scales);
  if (c.column_scale) write(directory, c, "column_scale", column_scale);
  write(directory, c, "dequantized", dequantized);
  return std::string("    {\"name\": \"") + c.name + "\", \"grid\": \"" + c.grid + "\", \"n\": " + std::to_string(c.n) +
         ", \"k\": " + std::to_string(c.k) + ", \"block\": " + std::to_string(c.block) +
         ", \"group\": " + std::to_string(c.group) + ", \"seed\": " + std::to_string(c.seed) +
         ", \"row_bytes\": " + std::to_string(format.row_bytes()) +
         ", \"row_groups\": " + std::to_string(format.row_groups()) +
         ", \"column_scale\": " + (c.column_scale ? "true" : "false") + "}";
}

void write_all(const std::string& directory) {
  set_isa(Isa::portable);
  std::string manifest = "{\n  \"format_version\": " + std::to_string(kFormatVersion) + ",\n  \"cases\": [\n";
  std::uint64_t stream = 1000;
  bool first = true;
  for (const Case& c : kCases) {
    manifest += (first ? "" : ",\n") + write_case(directory, c, stream);
    stream += 1000;
    first = false;
  }
  std::ofstream file(directory + "/manifest.json");
  file << manifest << "\n  ]\n}\n";
  file.close();
  if (!file) throw std::runtime_error("cannot write " + directory + "/manifest.json");
}

}  // namespace
}  // namespace higgs

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s DIRECTORY\n", argv[0]);
    return 2;
  }
  try {
    higgs::write_all(argv[1]);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
  return 0;
}
