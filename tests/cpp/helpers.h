// What the tests share: random inputs, owning matrices and layers, guards for global settings, and the rules of
// cpp/FORMAT.md written down once more, literally and slowly, so that the library is compared with the page and not
// with itself.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numbers>
#include <random>
#include <string>
#include <vector>

#include "higgs/higgs.h"

namespace higgs::test {

using Rng = std::mt19937_64;

inline std::vector<float> gaussian(Rng& rng, std::int64_t count, float sigma = 1.0f) {
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& v : values) v = normal(rng);
  return values;
}

// An owning row-major matrix of any dtype.
struct Matrix {
  DType dtype = DType::f32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::vector<std::byte> bytes;

  // Every byte 0xff: NaN in all three types, so that an element nobody writes is seen.
  Matrix(std::int64_t rows_, std::int64_t cols_, DType dtype_)
      : dtype(dtype_),
        rows(rows_),
        cols(cols_),
        bytes(static_cast<std::size_t>(rows_ * cols_) * size_of(dtype_), std::byte{0xff}) {}
  Matrix(const std::vector<float>& values, std::int64_t rows_, std::int64_t cols_, DType dtype_ = DType::f32)
      : Matrix(rows_, cols_, dtype_) {
    for (std::int64_t i = 0; i < rows * cols; ++i)
      store_f32(bytes.data(), dtype, i, values[static_cast<std::size_t>(i)]);
  }

  [[nodiscard]] MatrixView view() { return {bytes.data(), dtype, rows, cols}; }
  [[nodiscard]] ConstMatrixView view() const { return {bytes.data(), dtype, rows, cols}; }
  [[nodiscard]] ConstMatrixView top(std::int64_t count) const { return {bytes.data(), dtype, count, cols}; }
  [[nodiscard]] float at(std::int64_t i, std::int64_t j) const { return load_f32(bytes.data(), dtype, i * cols + j); }
  [[nodiscard]] std::vector<float> floats() const {
    std::vector<float> out(static_cast<std::size_t>(rows * cols));
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = load_f32(bytes.data(), dtype, static_cast<std::int64_t>(i));
    return out;
  }
};

inline std::vector<std::string> grid_names() {
  std::vector<std::string> names;
  for (const Grid& g : grids()) names.emplace_back(g.name);
  return names;
}

inline std::vector<Grid> grids_of_family(bool trellis) {
  std::vector<Grid> list;
  for (const Grid& g : grids()) {
    if ((g.trellis != nullptr) == trellis) list.push_back(g);
  }
  return list;
}

inline std::vector<std::string> names_of_family(bool trellis) {
  std::vector<std::string> names;
  for (const Grid& g : grids_of_family(trellis)) names.emplace_back(g.name);
  return names;
}

inline std::string grid_name(const testing::TestParamInfo<std::string>& info) { return info.param; }

// block and group 0: the defaults of the format.
inline LayerFormat make_format(std::string_view grid, std::int64_t n, std::int64_t k, int block = 0,
                               std::int64_t group = 0, std::uint64_t seed = 0) {
  LayerFormat f;
  f.grid = &find_grid(grid);
  f.n = n;
  f.k = k;
  f.block = block != 0 ? block : default_block(k);
  f.group = group != 0 ? group : default_group(k, f.block);
  f.seed = seed;
  return f;
}

struct Layer {
  LayerFormat format;
  std::vector<std::uint8_t> indices;
  std::vector<std::uint16_t> scales;
  std::vector<std::uint16_t> column_scale;  // empty: none
  QuantizeResult result;

  explicit Layer(const LayerFormat& f)
      : format(f),
        indices(static_cast<std::size_t>(f.index_bytes()), 0xee),
        scales(static_cast<std::size_t>(f.n * f.row_groups()), 0xeeee) {}
  [[nodiscard]] const std::uint16_t* column_scale_data() const {
    return column_scale.empty() ? nullptr : column_scale.data();
  }
  [[nodiscard]] PackedView view() const { return {format, indices.data(), scales.data(), column_scale_data()}; }
  // The first `rows` rows: the layout is row-major, so they are a prefix.
  [[nodiscard]] PackedView top(std::int64_t rows) const {
    PackedView v = view();
    v.format.n = rows;
    return v;
  }
};

inline Layer quantize_layer(ConstMatrixView w, const LayerFormat& format,
                            const std::vector<std::uint16_t>& column_scale = {}) {
  Layer layer(format);
  layer.column_scale = column_scale;
  layer.result = quantize(w, format, layer.column_scale_data(), layer.indices.data(), layer.scales.data());
  return layer;
}

// fp16 column scales between 1/4 and 4.
inline std::vector<std::uint16_t> random_column_scale(Rng& rng, std::int64_t k) {
  std::uniform_real_distribution<float> exponent(-2.0f, 2.0f);
  std::vector<std::uint16_t> s(static_cast<std::size_t>(k));
  for (std::uint16_t& v : s) v = f32_to_f16(std::exp2(exponent(rng)));
  return s;
}

// Random index bytes (all of them are legal) and random scales, a few of them 0.
inline Layer random_layer(Rng& rng, const LayerFormat& format, bool with_column_scale = false) {
  Layer layer(format);
  for (std::uint8_t& b : layer.indices) b = static_cast<std::uint8_t>(rng());
  std::uniform_real_distribution<float> scale(0.005f, 0.05f);
  for (std::uint16_t& s : layer.scales) s = rng() % 16 == 0 ? std::uint16_t{0} : f32_to_f16(scale(rng));
  if (with_column_scale) layer.column_scale = random_column_scale(rng, format.k);
  return layer;
}

class IsaGuard {
 public:
  explicit IsaGuard(Isa isa) : before_(current_isa()) { set_isa(isa); }
  ~IsaGuard() { set_isa(before_); }
  IsaGuard(const IsaGuard&) = delete;
  IsaGuard& operator=(const IsaGuard&) = delete;

 private:
  Isa before_;
};

class ThreadsGuard {
 public:
  explicit ThreadsGuard(int threads) : before_(num_threads()) { set_num_threads(threads); }
  ~ThreadsGuard() { set_num_threads(before_); }
  ThreadsGuard(const ThreadsGuard&) = delete;
  ThreadsGuard& operator=(const ThreadsGuard&) = delete;

 private:
  int before_;
};

// The call throws higgs::Error with this code and all of these words in its message.
template <typename Call>
void expect_error(ErrorCode code, const std::vector<std::string>& words, const Call& call) {
  try {
    call();
    ADD_FAILURE() << "no error; expected one that says '" << (words.empty() ? "" : words.front()) << "'";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), code) << e.what();
    for (const std::string& word : words) {
      EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << "'" << word << "' is missing in: " << e.what();
    }
  }
}

// H[i][j] * sqrt(block)
inline double hadamard_entry(std::int64_t i, std::int64_t j) {
  return std::popcount(static_cast<std::uint64_t>(i & j)) % 2 != 0 ? -1.0 : 1.0;
}

// The rules of FORMAT.md, literally. They may be slow; they may not share code with the library (numeric.h excepted,
// which has its own exhaustive tests).
namespace spec {

inline void butterflies(float* v, int block) {
  for (int stride = 1; stride < block; stride *= 2) {
    for (int i = 0; i < block; ++i) {
      if ((i & stride) != 0) continue;
      const float a = v[i];
      const float b = v[i + stride];
      v[i] = a + b;
      v[i + stride] = a - b;
    }
  }
  const auto norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(block)));
  for (int i = 0; i < block; ++i) v[i] *= norm;
}

// Step 2 of FORMAT.md for one block.
inline void transform(float* v, int block) {
  int size = block;
  while (size % 2 == 0) size /= 2;
  const int r = size;
  size = block / r;
  for (int run = 0; run < r; ++run) butterflies(v + run * size, size);
  for (int i = 0; r > 1 && i < size; ++i) {
    std::vector<float> x;
    for (int b = 0; b < r; ++b) x.push_back(v[b * size + i]);
    for (int a = 0; a < r; ++a) {
      float t = 0;
      for (int b = 0; b < r; ++b) {
        const double z = 2 * std::numbers::pi * (a * b % r) / r;
        const auto c = static_cast<float>((std::cos(z) + std::sin(z)) / std::sqrt(static_cast<double>(r)));
        t = b == 0 ? c * x[0] : std::fma(c, x[static_cast<std::size_t>(b)], t);
      }
      v[a * size + i] = t;
    }
  }
}

inline float sign(std::uint64_t seed, std::int64_t j) {
  std::uint64_t z = seed + (static_cast<std::uint64_t>(j / 64) + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return (z >> (j % 64) & 1u) != 0 ? -1.0f : 1.0f;
}

inline double tree_sum(std::array<double, 16> sums) {
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[static_cast<std::size_t>(i)] += sums[static_cast<std::size_t>(i + half)];
  }
  return sums[0];
}

inline double sum_products(const float* a, const float* b, std::int64_t count) {
  std::array<double, 16> sums{};
  for (std::int64_t i = 0; i < count; ++i) {
    double& s = sums[static_cast<std::size_t>(i % 16)];
    s = std::fma(static_cast<double>(a[i]), static_cast<double>(b[i]), s);
  }
  return tree_sum(sums);
}

// Of a sign-symmetric grid a magnitude for |u|, and the signs of u.
inline int nearest(const Grid& grid, const float* value) {
  std::vector<float> u(value, value + grid.p);
  int signs = 0;
  for (std::size_t c = 0; grid.magnitudes != 0 && c < u.size(); ++c) {
    if (u[c] < 0) signs |= 1 << c;
    u[c] = std::fabs(u[c]);
  }
  int best = 0;
  float best_score = 0;
  for (int i = 0; i < (grid.magnitudes != 0 ? grid.magnitudes : grid.n_points); ++i) {
    const float* g = &grid.points[static_cast<std::size_t>(i * grid.p)];
    double norm = 0;
    for (int c = 0; c < grid.p; ++c) norm += static_cast<double>(g[c]) * g[c];
    auto t = static_cast<float>(norm / 2);
    for (int c = 0; c < grid.p; ++c) t = std::fma(-u[static_cast<std::size_t>(c)], g[c], t);
    if (i == 0 || t < best_score) {
      best = i;
      best_score = t;
    }
  }
  return best + signs * grid.magnitudes;
}

struct Group {
  std::vector<int> indices;
  std::uint16_t rms_scale = 0;
  std::uint16_t scale = 0;
  std::vector<float> u;
};

// "From weights to bytes", steps 2 to 4.
inline Group quantize_group(const Grid& grid, const float* v, std::int64_t count) {
  Group out;
  const double energy = sum_products(v, v, count);
  out.rms_scale = f32_to_f16(static_cast<float>(std::sqrt(energy / static_cast<double>(count))));
  const float s0 = f16_to_f32(out.rms_scale);
  const float inverse = s0 > 0 ? 1.0f / s0 : 0.0f;
  std::vector<float> rounded(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) out.u.push_back(v[i] * inverse);
  for (std::int64_t i = 0; i < count; i += grid.p) {
    const int index = nearest(grid, &out.u[static_cast<std::size_t>(i)]);
    out.indices.push_back(index);
    for (int c = 0; c < grid.p; ++c) {
      rounded[static_cast<std::size_t>(i + c)] = grid.points[static_cast<std::size_t>(index * grid.p + c)];
    }
  }
  const double vg = sum_products(v, rounded.data(), count);
  const double gg = sum_products(rounded.data(), rounded.data(), count);
  const auto error = [&](double s) { return energy - 2 * s * vg + s * s * gg; };
  const std::uint16_t refit = f32_to_f16(static_cast<float>(vg / gg));
  const float s1 = f16_to_f32(refit);
  out.scale = s1 > 0 && std::isfinite(s1) && error(s1) < error(s0) ? refit : out.rms_scale;
  return out;
}

// "From weights to bytes", step 1.
inline std::vector<float> rotated_row(const Matrix& w, std::int64_t i, const LayerFormat& f,
                                      const std::vector<std::uint16_t>& column_scale) {
  std::vector<float> v(static_cast<std::size_t>(f.k));
  for (std::int64_t j = 0; j < f.k; ++j) {
    const auto at = static_cast<std::size_t>(j);
    const float s = column_scale.empty() ? 1.0f : f16_to_f32(column_scale[at]);
    v[at] = sign(f.seed, j) * s * w.at(i, j);
  }
  for (std::int64_t b = 0; b < f.k; b += f.block) transform(&v[static_cast<std::size_t>(b)], f.block);
  return v;
}

inline int index_at(const std::vector<std::uint8_t>& bytes, std::int64_t row_start, std::int64_t i, int index_bits) {
  int index = 0;
  for (int j = 0; j < index_bits; ++j) {
    const std::int64_t bit = i * index_bits + j;
    index |= (bytes[static_cast<std::size_t>(row_start + bit / 8)] >> (bit % 8) & 1) << j;
  }
  return index;
}

// FORMAT.md, "Trellis grids": the columns of every run of a row, in the order of the stream.
inline std::vector<std::vector<std::int64_t>> runs_of_row(const LayerFormat& f) {
  const bool strided = f.grid->name[0] == 'a';
  std::vector<std::vector<std::int64_t>> runs;
  for (std::int64_t j = 0; j < f.k;) {
    const std::int64_t left = f.k - j;
    const std::int64_t columns = strided ? std::min<std::int64_t>(256, left) : left < 1024 ? left : 512;
    for (int t = 0; t < (strided ? 4 : 1); ++t) {
      runs.emplace_back();
      for (std::int64_t c = 0; c < columns; ++c) {
        if (!strided || c / 4 % 4 == t) runs.back().push_back(j + c);
      }
    }
    j += columns;
  }
  return runs;
}

// The point that covers column j: the index there in a vector grid, in a trellis grid the bits of the run from its step
// on, around the end.
inline std::size_t point_at(const std::vector<std::uint8_t>& bytes, std::int64_t row_start, const LayerFormat& f,
                            std::int64_t j) {
  const int p = f.grid->p;
  const int bits = f.grid->index_bits;
  if (f.grid->trellis == nullptr) return static_cast<std::size_t>(index_at(bytes, row_start, j / p, bits));
  std::int64_t before = 0;  // indices of the runs before that of column j
  std::vector<std::int64_t> run;
  for (const std::vector<std::int64_t>& r : runs_of_row(f)) {
    run = r;
    if (std::find(run.begin(), run.end(), j) != run.end()) break;
    before += static_cast<std::int64_t>(run.size()) / p;
  }
  std::vector<int> stream;
  for (std::int64_t i = 0; i < static_cast<std::int64_t>(run.size()) / p; ++i) {
    for (int b = 0; b < bits; ++b) stream.push_back(index_at(bytes, row_start, before + i, bits) >> b & 1);
  }
  const auto step = (std::find(run.begin(), run.end(), j) - run.begin()) / p;
  std::size_t window = 0;
  for (int b = 0; b < f.grid->window_bits; ++b) {
    window |= static_cast<std::size_t>(stream[static_cast<std::size_t>(step * bits + b) % stream.size()]) << b;
  }
  return window;
}

inline Layer quantize(const Matrix& w, const LayerFormat& f, const std::vector<std::uint16_t>& column_scale) {
  Layer layer(f);
  layer.column_scale = column_scale;
  std::fill(layer.indices.begin(), layer.indices.end(), std::uint8_t{0});
  for (std::int64_t i = 0; i < f.n; ++i) {
    const std::vector<float> v = rotated_row(w, i, f, column_scale);
    for (std::int64_t g = 0; g < f.row_groups(); ++g) {
      const std::int64_t first = g * f.group;
      const Group group = quantize_group(*f.grid, &v[static_cast<std::size_t>(first)], f.group_end(g) - first);
      layer.scales[static_cast<std::size_t>(i * f.row_groups() + g)] = group.scale;
      for (std::size_t t = 0; t < group.indices.size(); ++t) {
        for (int j = 0; j < f.grid->index_bits; ++j) {
          const std::int64_t bit = (first / f.grid->p + static_cast<std::int64_t>(t)) * f.grid->index_bits + j;
          const int value = group.indices[t] >> j & 1;
          layer.indices[static_cast<std::size_t>(i * f.row_bytes() + bit / 8)] |=
              static_cast<std::uint8_t>(value << (bit % 8));
        }
      }
    }
  }
  return layer;
}

// "From bytes to weights", fp32.
inline std::vector<float> dequantize(const Layer& layer, bool rotate_back = true) {
  const LayerFormat& f = layer.format;
  std::vector<float> out(static_cast<std::size_t>(f.n * f.k));
  for (std::int64_t i = 0; i < f.n; ++i) {
    float* row = &out[static_cast<std::size_t>(i * f.k)];
    for (std::int64_t j = 0; j < f.k; ++j) {
      const std::size_t point = point_at(layer.indices, i * f.row_bytes(), f, j);
      const float scale = f16_to_f32(layer.scales[static_cast<std::size_t>(i * f.row_groups() + j / f.group)]);
      row[j] =
          scale * f.grid->points[point * static_cast<std::size_t>(f.grid->p) + static_cast<std::size_t>(j % f.grid->p)];
    }
    if (!rotate_back) continue;
    for (std::int64_t b = 0; b < f.k; b += f.block) transform(row + b, f.block);
    for (std::int64_t j = 0; j < f.k; ++j) {
      const float e = sign(f.seed, j);
      row[j] *= layer.column_scale.empty() ? e : e / f16_to_f32(layer.column_scale[static_cast<std::size_t>(j)]);
    }
  }
  return out;
}

}  // namespace spec

// Bit for bit, naming the first difference.
inline void expect_same_bits(const std::vector<float>& a, const std::vector<float>& b, const std::string& what) {
  ASSERT_EQ(a.size(), b.size()) << what;
  for (std::size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(std::bit_cast<std::uint32_t>(a[i]), std::bit_cast<std::uint32_t>(b[i]))
        << what << ": element " << i << " is " << a[i] << " and " << b[i];
  }
}

}  // namespace higgs::test
