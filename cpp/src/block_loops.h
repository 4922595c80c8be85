// Rotation and nearest-point loops, compiled once per instruction set (everything has internal linkage, so that no
// function compiled for a newer CPU can be picked by the linker for an older one). GCC/Clang vector extensions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__FMA__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace higgs::detail {
namespace {

typedef float Vec16 __attribute__((vector_size(64)));
typedef std::int32_t Int16 __attribute__((vector_size(64)));
constexpr std::int32_t kNeg = INT32_MIN;  // the sign bit

inline Vec16 load16(const float* p) {
  Vec16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store16(float* p, Vec16 v) { std::memcpy(p, &v, sizeof v); }

// As wide as the registers: for code the compiler would not split well.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__FMA__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t Int __attribute__((vector_size(4 * kLanes)));

// a * b + c, rounded once, in every lane.
inline Vec fused_multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Vec>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return out;
#endif
}

// One butterfly stage inside a vector: lanes without the stride's bit get a + b, lanes with it a - b.
template <int Stride>
inline Vec16 butterfly(Vec16 v) {
  constexpr auto at = [](int i) { return i ^ Stride; };
  constexpr auto sign = [](int i) { return (i & Stride) != 0 ? kNeg : 0; };
  const Vec16 partner = __builtin_shufflevector(v, v, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8),
                                                at(9), at(10), at(11), at(12), at(13), at(14), at(15));
  const Int16 signs = {sign(0), sign(1), sign(2),  sign(3),  sign(4),  sign(5),  sign(6),  sign(7),
                       sign(8), sign(9), sign(10), sign(11), sign(12), sign(13), sign(14), sign(15)};
  return partner + reinterpret_cast<Vec16>(reinterpret_cast<Int16>(v) ^ signs);
}

// Walsh-Hadamard transform of `size` floats (a power of two), times 1 / sqrt(size).
inline void walsh_hadamard(float* data, int size) {
  const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(size)));
  for (int i = 0; i < size; i += 16) {
    store16(data + i, butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load16(data + i))))));
  }
  for (int stride = 16; stride < size; stride *= 2) {
    const float factor = stride * 2 == size ? norm : 1.0f;  // times 1 is exact
    for (int i = 0; i < size; i += 2 * stride) {
      for (int j = i; j < i + stride; j += 16) {
        const Vec16 lower = load16(data + j);
        const Vec16 upper = load16(data + j + stride);
        store16(data + j, (lower + upper) * factor);
        store16(data + j + stride, (lower - upper) * factor);
      }
    }
  }
}

// Hartley transform across r runs of `size` floats, at every position of the runs.
inline void hartley(float* data, int r, int size, const float* table) {
  for (int i = 0; i < size; i += kLanes) {
    Vec x[15];
    for (int b = 0; b < r; ++b) std::memcpy(&x[b], data + b * size + i, sizeof x[b]);
    for (int a = 0; a < r; ++a) {
      Vec t = x[0] * table[a * r];
      for (int b = 1; b < r; ++b) t = fused_multiply_add(Vec{} + table[a * r + b], x[b], t);
      std::memcpy(data + a * size + i, &t, sizeof t);
    }
  }
}

void transform_blocks(float* data, std::int64_t count, int block) {
  const int size = block & -block;  // the power of two in the block
  const int r = block / size;
  const float* table = r == 1 ? nullptr : hartley_table(r);
  for (std::int64_t b = 0; b < count; ++b, data += block) {
    for (int run = 0; run < r; ++run) walsh_hadamard(data + run * size, size);
    if (r > 1) hartley(data, r, size, table);
  }
}

// Sixteen fp64 partial sums, value i into sum i mod 16, added up as a tree: the summation order of FORMAT.md.
struct Sums {
  double part[16] = {};
  [[nodiscard]] double total() {
    for (int half = 8; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) part[i] += part[i + half];
    }
    return part[0];
  }
};

double sum_of_products(const float* a, const float* b, std::int64_t count) {
  Sums sums;
  for (std::int64_t i = 0; i < count; i += 16) {
    for (int j = 0; j < 16; ++j) sums.part[j] = __builtin_fma(double{a[i + j]}, double{b[i + j]}, sums.part[j]);
  }
  return sums.total();
}

template <int P>
inline float score(const NearestTable& table, const float* u, int candidate) {
  const int n = table.grid->n_points;
  float t = table.half_norms[candidate];
  for (int c = 0; c < P; ++c) t = __builtin_fmaf(-u[c], table.components[c * n + candidate], t);
  return t;
}

template <int P>
inline std::uint16_t nearest_in_cell(const NearestTable& table, const float* u) {
  static_assert(P <= 2);
  int cell = 0;
  bool inside = true;
  for (int c = P - 1; c >= 0; --c) {
    const float position = (u[c] + table.extent) * table.inverse_width;
    inside = inside && position >= 0.0f && position < static_cast<float>(table.cells_per_axis);
    cell = cell * table.cells_per_axis + static_cast<int>(inside ? position : 0.0f);
  }
  const std::uint16_t* candidates = &table.candidates[static_cast<std::size_t>(cell) * NearestTable::kSlots];
  if (!inside || candidates[0] == NearestTable::kTryAll) return nearest_of_all(table, u);
  std::uint16_t best = candidates[0];
  float best_score = score<P>(table, u, best);
  for (int s = 1; s < NearestTable::kSlots; ++s) {
    const float t = score<P>(table, u, candidates[s]);
    best = t < best_score ? candidates[s] : best;
    best_score = t < best_score ? t : best_score;
  }
  return best;
}

// kLanes runs of p = 4 values at once, all points tried; in a sign-symmetric grid all magnitudes.
inline void nearest_of_all_p4(const NearestTable& table, const float* u, std::uint16_t* indices) {
  const int n = table.grid->table_points();
  const float* points = table.components.data();
  Vec x[4];
  Int signs = {};
  for (int c = 0; c < 4; ++c) {
    for (int i = 0; i < kLanes; ++i) x[c][i] = -u[4 * i + c];
    if (table.grid->magnitudes > 0) {
      const Int negative = x[c] > Vec{};  // u is
      x[c] = negative ? -x[c] : x[c];
      signs |= negative & (Int{} + (n << c));
    }
  }
  Vec best_score = Vec{} + __builtin_huge_valf();
  Int best = {};
  for (int g = 0; g < n; ++g) {
    Vec t = Vec{} + table.half_norms[g];
    for (int c = 0; c < 4; ++c) t = fused_multiply_add(x[c], Vec{} + points[c * n + g], t);
    const Int less = t < best_score;
    best_score = less ? t : best_score;
    best = less ? Int{} + g : best;
  }
  for (int i = 0; i < kLanes; ++i) indices[i] = static_cast<std::uint16_t>(best[i] | signs[i]);
}

void nearest_group(const NearestTable& table, const float* values, std::int64_t count, float inverse_scale,
                   std::uint16_t* indices, double* vg, double* gg) {
  const int p = table.grid->p;
  const int n = table.grid->n_points;
  Sums sum_vg;
  Sums sum_gg;
  for (std::int64_t i = 0; i < count; i += 64) {
    float u[64];
    float g[64];
    for (int j = 0; j < 64; ++j) u[j] = values[i + j] * inverse_scale;
    std::uint16_t* out = indices + i / p;
    if (p == 1) {
      for (int j = 0; j < 64; ++j) out[j] = nearest_in_cell<1>(table, u + j);
      for (int j = 0; j < 64; ++j) g[j] = table.components[out[j]];
    } else if (p == 2) {
      for (int j = 0; j < 32; ++j) out[j] = nearest_in_cell<2>(table, u + 2 * j);
      for (int j = 0; j < 64; ++j) g[j] = table.components[(j & 1) * n + out[j / 2]];
    } else {
      for (int j = 0; j < 16; j += kLanes) nearest_of_all_p4(table, u + 4 * j, out + j);
      for (int j = 0; j < 16; ++j) std::memcpy(g + 4 * j, table.grid->points.data() + 4 * out[j], 4 * sizeof(float));
    }
    for (int j = 0; j < 64; j += 16) {
      for (int l = 0; l < 16; ++l) {
        const double point = g[j + l];
        sum_vg.part[l] = __builtin_fma(static_cast<double>(values[i + j + l]), point, sum_vg.part[l]);
        sum_gg.part[l] = __builtin_fma(point, point, sum_gg.part[l]);
      }
    }
  }
  *vg = sum_vg.total();
  *gg = sum_gg.total();
}

}  // namespace
}  // namespace higgs::detail
