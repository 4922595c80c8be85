// Dot products of packed rows with x, compiled once per instruction set; everything has internal linkage.
//
// An instruction set provides:
// - Vec, a vector of kLanes floats, with load, store, zero, fma (a * b + c) and sum (lanes added in halves);
// - f16(bits), fp16 bits -> float;
// - Decoder<B, P> with chunk(bytes, valid, sink): decodes 64 indices, of which the first `valid` are in the row (the
//   rest may be anything, x is zero there), and calls sink(offset, Vec) for 64 * P floats in decode order.
//
// The sums run in the same order in dot_rows and dot_tile: one chain of fma per (row of w, row of x, scale group), in
// decode order, lanes added up per group, groups in order. So a row of y has the same bits in any batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels.h"

namespace higgs::detail {
namespace {

// Where the bytes of a scale group lie, for a decoder of B-bit indices.
template <int B, int P>
struct GroupBytes {
  const PackedView& w;
  DecodeGeometry geometry = decode_geometry(w.format);
  std::int64_t row_bytes = w.format.row_bytes();
  std::int64_t full_bytes = w.format.group / P * B / 8;
  std::int64_t full_indices = w.format.group / P;
  std::int64_t last_indices = (w.format.k - (geometry.groups - 1) * w.format.group) / P;

  [[nodiscard]] const std::uint8_t* bytes(std::int64_t row, std::int64_t g) const {
    return w.indices + row * row_bytes + g * full_bytes;
  }
  [[nodiscard]] std::int64_t indices(std::int64_t g) const {
    return g + 1 == geometry.groups ? last_indices : full_indices;
  }
  [[nodiscard]] std::int64_t x_offset(std::int64_t g) const { return g * geometry.group_chunks * kChunk * P; }
};

template <class Isa, int B, int P>
void dot_rows(const PackedView& w, const float* x, std::int64_t begin, std::int64_t end, float* y) {
  using Vec = typename Isa::Vec;
  const GroupBytes<B, P> layout{w};
  const typename Isa::template Decoder<B, P> decoder(w);
  const std::int64_t groups = layout.geometry.groups;
  for (std::int64_t i = begin; i < end; i += 2) {  // two rows at a time: two independent chains of fma
    const std::int64_t pair[2] = {i, std::min(i + 1, end - 1)};
    float total[2] = {0, 0};
    for (std::int64_t g = 0; g < groups; ++g) {
      const std::uint8_t* bytes[2] = {layout.bytes(pair[0], g), layout.bytes(pair[1], g)};
      const std::int64_t count = layout.indices(g);
      const float* xg = x + layout.x_offset(g);
      Vec acc0 = Isa::zero();
      Vec acc1 = Isa::zero();
      for (std::int64_t c = 0; c < count; c += kChunk, xg += kChunk * P) {
        const int valid = static_cast<int>(std::min<std::int64_t>(kChunk, count - c));
        __builtin_prefetch(bytes[0] + c * B / 8 + 2 * layout.row_bytes);  // the next pair of rows
        __builtin_prefetch(bytes[1] + c * B / 8 + 2 * layout.row_bytes);
        decoder.chunk(bytes[0] + c * B / 8, valid,
                      [&](int offset, Vec v) { acc0 = Isa::fma(v, Isa::load(xg + offset), acc0); });
        decoder.chunk(bytes[1] + c * B / 8, valid,
                      [&](int offset, Vec v) { acc1 = Isa::fma(v, Isa::load(xg + offset), acc1); });
      }
      total[0] += Isa::f16(w.scales[pair[0] * groups + g]) * Isa::sum(acc0);
      total[1] += Isa::f16(w.scales[pair[1] * groups + g]) * Isa::sum(acc1);
    }
    y[i] = total[0];
    if (i + 1 < end) y[i + 1] = total[1];
  }
}

// R rows of decoded weights times M rows of x over `cols` floats; adds scale * sum to y.
template <class Isa, int R, int M>
inline void micro(const float* weights, std::int64_t weights_stride, const float* x, std::int64_t x_stride,
                  std::int64_t cols, const float* scales, float* y, std::int64_t y_stride) {
  using Vec = typename Isa::Vec;
  Vec acc[R][M];
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) acc[r][m] = Isa::zero();
  }
  for (std::int64_t j = 0; j < cols; j += Isa::kLanes) {
    Vec xv[M];
    for (int m = 0; m < M; ++m) xv[m] = Isa::load(x + m * x_stride + j);
    for (int r = 0; r < R; ++r) {
      const Vec wv = Isa::load(weights + r * weights_stride + j);
      for (int m = 0; m < M; ++m) acc[r][m] = Isa::fma(wv, xv[m], acc[r][m]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) y[m * y_stride + r] += scales[r] * Isa::sum(acc[r][m]);
  }
}

template <class Isa, int B, int P>
void dot_tile(const PackedView& w, const float* x, std::int64_t m, std::int64_t begin, std::int64_t end, float* scratch,
              float* y, std::int64_t y_stride) {
  using Vec = typename Isa::Vec;
  constexpr int kRows = Isa::kMicroRows;
  constexpr int kTokens = Isa::kMicroTokens;
  const GroupBytes<B, P> layout{w};
  const typename Isa::template Decoder<B, P> decoder(w);
  const std::int64_t groups = layout.geometry.groups;
  const std::int64_t x_stride = layout.geometry.arranged_cols;
  const std::int64_t stride = layout.geometry.group_chunks * kChunk * P;
  for (std::int64_t i = 0; i < m; ++i) std::fill_n(y + i * y_stride, end - begin, 0.0f);
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t count = layout.indices(g);
    const std::int64_t cols = (count + kChunk - 1) / kChunk * kChunk * P;
    float scales[kTileRows];
    for (std::int64_t i = begin; i < end; ++i) {
      float* row = scratch + (i - begin) * stride;
      for (std::int64_t c = 0; c < count; c += kChunk, row += kChunk * P) {
        const int valid = static_cast<int>(std::min<std::int64_t>(kChunk, count - c));
        decoder.chunk(layout.bytes(i, g) + c * B / 8, valid, [&](int offset, Vec v) { Isa::store(row + offset, v); });
      }
      scales[i - begin] = Isa::f16(w.scales[i * groups + g]);
    }
    const float* xg = x + layout.x_offset(g);
    for (std::int64_t t = 0; t < m;) {
      const bool full = m - t >= kTokens;
      const float* xt = xg + t * x_stride;
      float* yt = y + t * y_stride;
      for (std::int64_t r = 0; r < end - begin;) {
        const bool full_rows = end - begin - r >= kRows;
        const float* wr = scratch + r * stride;
        if (full && full_rows) {
          micro<Isa, kRows, kTokens>(wr, stride, xt, x_stride, cols, scales + r, yt + r, y_stride);
        } else if (full) {
          micro<Isa, 1, kTokens>(wr, stride, xt, x_stride, cols, scales + r, yt + r, y_stride);
        } else if (full_rows) {
          micro<Isa, kRows, 1>(wr, stride, xt, x_stride, cols, scales + r, yt + r, y_stride);
        } else {
          micro<Isa, 1, 1>(wr, stride, xt, x_stride, cols, scales + r, yt + r, y_stride);
        }
        r += full_rows ? kRows : 1;
      }
      t += full ? kTokens : 1;
    }
  }
}

// The (index_bits, p) pairs that have a decoder: a grid of any other pair needs one more line here and nothing else.
#define HIGGS_FOR_EACH_DECODER(X) \
  X(2, 1)                         \
  X(3, 1)                         \
  X(4, 1)                         \
  X(5, 1)                         \
  X(6, 1) X(8, 1) X(4, 2) X(5, 2) X(6, 2) X(7, 2) X(8, 2) X(9, 2) X(10, 2) X(11, 2) X(12, 2) X(4, 4) X(6, 4) X(8, 4)

template <class Isa>
void dot_rows_any(const PackedView& w, const float* x, std::int64_t begin, std::int64_t end, float* y) {
  switch (w.format.grid->index_bits * 8 + w.format.grid->p) {
#define HIGGS_CASE(B, P) \
  case (B) * 8 + (P): return dot_rows<Isa, B, P>(w, x, begin, end, y);
    HIGGS_FOR_EACH_DECODER(HIGGS_CASE)
#undef HIGGS_CASE
    default: no_decoder(*w.format.grid);
  }
}

template <class Isa>
void dot_tile_any(const PackedView& w, const float* x, std::int64_t m, std::int64_t begin, std::int64_t end,
                  float* scratch, float* y, std::int64_t y_stride) {
  switch (w.format.grid->index_bits * 8 + w.format.grid->p) {
#define HIGGS_CASE(B, P) \
  case (B) * 8 + (P): return dot_tile<Isa, B, P>(w, x, m, begin, end, scratch, y, y_stride);
    HIGGS_FOR_EACH_DECODER(HIGGS_CASE)
#undef HIGGS_CASE
    default: no_decoder(*w.format.grid);
  }
}

}  // namespace
}  // namespace higgs::detail
