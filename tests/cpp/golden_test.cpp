// The stored bytes of tests/golden/: quantize must write them and dequantize must read them, bit for bit, on every
// instruction set.
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>

#include "helpers.h"

namespace higgs {
namespace {

using test::IsaGuard;
using test::Layer;

const std::string kDirectory = HIGGS_GOLDEN_DIR;

std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// The value of `"key": ` in one line of the manifest, quotes removed.
std::string field(const std::string& line, const std::string& key) {
  const std::string mark = "\"" + key + "\": ";
  const std::size_t at = line.find(mark);
  if (at == std::string::npos) throw std::runtime_error("manifest: no " + key + " in " + line);
  std::size_t begin = at + mark.size();
  const std::size_t end = line.find_first_of(",}", begin);
  std::string value = line.substr(begin, end - begin);
  if (value.front() == '"') value = value.substr(1, value.size() - 2);
  return value;
}

struct Case {
  std::string name;
  LayerFormat format;
  std::int64_t row_bytes;
  std::int64_t row_groups;
  bool column_scale;

  template <typename T>
  [[nodiscard]] std::vector<T> array(const char* what, std::int64_t count) const {
    const std::string text = read_text(kDirectory + "/" + name + "." + what + ".bin");
    if (text.size() != static_cast<std::size_t>(count) * sizeof(T)) {
      throw std::runtime_error(name + "." + what + ".bin has " + std::to_string(text.size()) + " bytes");
    }
    std::vector<T> values(static_cast<std::size_t>(count));
    std::memcpy(values.data(), text.data(), text.size());
    return values;
  }
  [[nodiscard]] Layer layer() const {
    Layer l(format);
    l.indices = array<std::uint8_t>("indices", format.n * row_bytes);
    l.scales = array<std::uint16_t>("scales", format.n * row_groups);
    if (column_scale) l.column_scale = array<std::uint16_t>("column_scale", format.k);
    return l;
  }
};

std::vector<Case> cases() {
  std::vector<Case> list;
  const std::string manifest = read_text(kDirectory + "/manifest.json");
  for (std::size_t at = manifest.find("{\"name\""); at != std::string::npos; at = manifest.find("{\"name\"", at + 1)) {
    const std::string line = manifest.substr(at, manifest.find('}', at) - at + 1);
    LayerFormat f = test::make_format(field(line, "grid"), std::stoll(field(line, "n")), std::stoll(field(line, "k")),
                                      std::stoi(field(line, "block")), std::stoll(field(line, "group")),
                                      std::stoull(field(line, "seed")));
    list.push_back({field(line, "name"), f, std::stoll(field(line, "row_bytes")), std::stoll(field(line, "row_groups")),
                    field(line, "column_scale") == "true"});
  }
  return list;
}

TEST(Golden, ManifestHasTheFormatsThatMatter) {
  EXPECT_NE(read_text(kDirectory + "/manifest.json").find("\"format_version\": " + std::to_string(kFormatVersion)),
            std::string::npos);
  bool ragged = false;
  bool column_scale = false;
  std::vector<int> widths;
  for (const Case& c : cases()) {
    ragged = ragged || c.format.k % c.format.group != 0;
    column_scale = column_scale || c.column_scale;
    widths.push_back(c.format.grid->index_bits);
    EXPECT_NO_THROW(validate(c.format)) << c.name;
    EXPECT_EQ(c.row_bytes, c.format.row_bytes()) << c.name;
    EXPECT_EQ(c.row_groups, c.format.row_groups()) << c.name;
  }
  EXPECT_TRUE(ragged);
  EXPECT_TRUE(column_scale);
  for (const int width : {2, 3, 4, 6, 8, 9, 12})
    EXPECT_NE(std::find(widths.begin(), widths.end(), width), widths.end());
}

TEST(Golden, QuantizeWritesTheseBytesOnEveryIsa) {
  for (const Case& c : cases()) {
    const Layer expected = c.layer();
    const std::vector<float> w = c.array<float>("weights", c.format.n * c.format.k);
    for (const Isa isa : supported_isas()) {
      const IsaGuard guard(isa);
      const Layer layer =
          test::quantize_layer(matrix(w.data(), c.format.n, c.format.k), c.format, expected.column_scale);
      EXPECT_EQ(layer.indices, expected.indices) << c.name << " " << name_of(isa);
      EXPECT_EQ(layer.scales, expected.scales) << c.name << " " << name_of(isa);
    }
  }
}

TEST(Golden, DequantizeGivesTheseBitsOnEveryIsa) {
  for (const Case& c : cases()) {
    const Layer layer = c.layer();
    const std::vector<float> expected = c.array<float>("dequantized", c.format.n * c.format.k);
    test::expect_same_bits(test::spec::dequantize(layer), expected, c.name + " FORMAT.md");
    for (const Isa isa : supported_isas()) {
      const IsaGuard guard(isa);
      std::vector<float> out(expected.size());
      dequantize(layer.view(), matrix(out.data(), c.format.n, c.format.k));
      test::expect_same_bits(out, expected, c.name + " " + name_of(isa));
    }
  }
}

TEST(Golden, DequantizedWeightsAreCloseToTheOriginalOnes) {
  for (const Case& c : cases()) {
    const std::vector<float> w = c.array<float>("weights", c.format.n * c.format.k);
    const std::vector<float> d = c.array<float>("dequantized", c.format.n * c.format.k);
    double error = 0;
    double energy = 0;
    for (std::int64_t j = 0; j < c.format.k; ++j) {  // row 0, whose values are about normal
      const auto at = static_cast<std::size_t>(j);
      error += std::pow(static_cast<double>(w[at]) - d[at], 2);
      energy += static_cast<double>(w[at]) * w[at];
    }
    EXPECT_LT(error / energy, (c.column_scale ? 8 : 2) * c.format.grid->t2) << c.name;
    for (std::int64_t j = 2 * c.format.k; j < 3 * c.format.k; ++j)
      ASSERT_EQ(d[static_cast<std::size_t>(j)], 0) << c.name;
  }
}

}  // namespace
}  // namespace higgs
