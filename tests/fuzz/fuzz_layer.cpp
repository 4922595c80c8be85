// A layer read from an untrusted file: any header, any bytes. validate either refuses the header or everything that
// reads the layer works within exactly the bytes the format says there are, and all instruction sets agree.
#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "higgs/higgs.h"
#include "input.h"

namespace higgs {
namespace {

constexpr std::int64_t kMaxRows = 6;
constexpr std::int64_t kMaxCols = 2560;

struct Buffers {
  LayerFormat format;
  std::vector<std::uint8_t> indices;
  std::vector<std::uint16_t> scales;
  std::vector<std::uint16_t> column_scale;

  [[nodiscard]] PackedView view() const {
    return {format, indices.data(), scales.data(), column_scale.empty() ? nullptr : column_scale.data()};
  }
};

// Mostly plausible headers, so that the fuzzer gets beyond validate; the first byte can make any field anything.
LayerFormat read_header(fuzz::Input& input) {
  const auto raw = input.take<std::uint8_t>();
  LayerFormat f;
  const auto grid = static_cast<std::size_t>(input.take<std::uint8_t>()) % (grids().size() + 1);
  f.grid = grid == grids().size() ? nullptr : &grids()[grid];
  f.n = (raw & 1) != 0 ? input.take<std::int64_t>() : input.take<std::uint8_t>() % (kMaxRows + 1);
  f.k = (raw & 2) != 0 ? input.take<std::int64_t>() : 64 * (input.take<std::uint8_t>() % 40 + 1);
  f.block = (raw & 4) != 0 ? input.take<std::int32_t>() : 64 * (input.take<std::uint8_t>() % 16 + 1);
  f.group = (raw & 8) != 0 ? input.take<std::int64_t>()
                           : static_cast<std::int64_t>(input.take<std::uint8_t>() % 40) * f.block;
  f.seed = input.take<std::uint64_t>();
  return f;
}

bool accepted(const LayerFormat& f) {
  try {
    validate(f);
  } catch (const Error& e) {
    fuzz::require(e.code() == ErrorCode::invalid_argument, "validate throws invalid_argument");
    return false;
  }
  fuzz::require(f.grid != nullptr && f.n >= 0 && f.k > 0 && f.k % 64 == 0, "grid, n and k of an accepted header");
  fuzz::require(f.block > 0 && f.block <= 1024 && f.block % 64 == 0 && f.k % f.block == 0,
                "block of an accepted header");
  fuzz::require(f.group > 0 && f.group <= f.k && f.group % f.block == 0, "group of an accepted header");
  return true;
}

// The same bits, or both NaN (scales may be anything here).
bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) {
    return std::bit_cast<std::uint32_t>(x) == std::bit_cast<std::uint32_t>(y) || (std::isnan(x) && std::isnan(y));
  });
}

std::vector<float> dequantized(const Buffers& layer) {
  std::vector<float> w(static_cast<std::size_t>(layer.format.n * layer.format.k));
  dequantize(layer.view(), matrix(w.data(), layer.format.n, layer.format.k));
  return w;
}

std::vector<float> product(const Buffers& layer, const std::vector<float>& x, std::int64_t m) {
  std::vector<float> y(static_cast<std::size_t>(m * layer.format.n));
  matmul({reinterpret_cast<const std::byte*>(x.data()), DType::f32, m, layer.format.k}, layer.view(), nullptr,
         matrix(y.data(), m, layer.format.n));
  return y;
}

void use(const Buffers& layer, const std::vector<float>& x, std::int64_t m) {
  std::vector<float> first;
  for (const Isa isa : supported_isas()) {
    set_isa(isa);
    std::vector<float> w;
    try {
      (void)product(layer, x, m);
      (void)product(layer, x, 1);
      w = dequantized(layer);
    } catch (const Error& e) {
      fuzz::require(e.code() == ErrorCode::invalid_argument && !layer.column_scale.empty(),
                    "only column scales can be bad");
      continue;
    }
    if (first.empty()) first = w;
    fuzz::require(same(first, w), "dequantize gives the same bits on every instruction set");
  }
}

}  // namespace
}  // namespace higgs

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace higgs;
  fuzz::Input input(data, size);
  Buffers layer{read_header(input), {}, {}, {}};
  const LayerFormat& f = layer.format;
  if (!accepted(f) || f.n > kMaxRows || f.k > kMaxCols) return 0;
  set_num_threads(1);
  const auto options = input.take<std::uint8_t>();
  const std::int64_t m = 2 + (options >> 1) % 8;
  layer.scales.resize(static_cast<std::size_t>(f.n * f.row_groups()));
  input.fill(layer.scales.data(), 2 * layer.scales.size());
  if ((options & 1) != 0) {
    layer.column_scale.resize(static_cast<std::size_t>(f.k));
    for (std::uint16_t& s : layer.column_scale) s = input.size() > 0 ? input.take<std::uint16_t>() : 0x3c00;
  }
  layer.indices.resize(static_cast<std::size_t>(f.index_bytes()));
  input.fill(layer.indices.data(), layer.indices.size());
  std::vector<float> x(static_cast<std::size_t>(m * f.k));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 251) - 125.0f;
  use(layer, x, m);
  return 0;
}
