// Dot products of packed rows with x, compiled once per instruction set; everything has internal linkage.
//
// An instruction set provides:
// - Vec, a vector of kLanes floats, with load, store, zero, fma (a * b + c) and sum (lanes added in halves);
// - f16(bits), fp16 bits -> float;
// - Decoder<B, P> with chunk(bytes, count, sink): decodes `count` indices, at most 64 and a multiple of 64 / P, and
//   calls sink(offset, Vec) for count * P floats in decode order;
// - TrellisDecoder<B, P> with chunk(bytes, steps, from, to, sink) for steps of a run of a trellis grid, both multiples
//   of 16 if the run is not taken as a whole; such as WindowDecoder with
// - look_up<P>(points, halves, windows): kLanes / P points, given both as floats and as fp16 bits;
// - Additive<B> with chunk(row, index, count, sink) for steps of a group of runs of an additive grid, such as
//   AdditiveDecoder with
// - signed_bytes(bytes, use): calls use(offset, Vec) for 16 signed bytes, as floats.
//
// The sums run in the same order in dot_rows and dot_tile: one chain of fma per (row of w, row of x, scale group), in
// decode order, lanes added up per group, groups in order. So a row of y has the same bits in any batch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace higgs::detail {
namespace {

// How the indices of a scale group are cut into what a decoder takes at once: count(i, left) indices from index i of
// the row on, where `left` are left in the scale group. Vector grids: chunks.
template <int P>
struct Chunks {
  explicit Chunks(const LayerFormat&) {}
  [[nodiscard]] static std::int64_t count(std::int64_t, std::int64_t left) { return left < kChunk ? left : kChunk; }
};

// Decodes runs, in their order, by the table of all windows.
template <class Isa, int B, int P>
struct WindowDecoder {
  static constexpr int kSteps = Isa::kLanes / P;
  const float* points;
  const std::uint16_t* halves;
  std::uint32_t mask;

  explicit WindowDecoder(const PackedView& w)
      : points(w.format.grid->points.data()),
        halves(trellis_halves(*w.format.grid)),
        mask(static_cast<std::uint32_t>(w.format.grid->n_points) - 1) {}

  template <typename Sink>
  void chunk(const std::uint8_t* bytes, int steps, int from, int to, const Sink& sink) const {
    constexpr int kWrapped = 4;  // bytes: a window and the bits before it in its first byte
    // The run with its first bytes again at the end.
    std::uint8_t stream[(kMaxRunColumns / P + kSteps) * B / 8 + kWrapped] = {};
    const int length = steps * B / 8;
    std::memcpy(stream, bytes, static_cast<std::size_t>(length));
    for (int i = 0; i < kWrapped; ++i) stream[length + i] = bytes[i % length];
    for (int t = from; t < to; t += kSteps) {
      std::uint32_t windows[kSteps];
      for (int i = 0; i < kSteps; ++i) {
        std::uint32_t word;
        std::memcpy(&word, stream + (t + i) * B / 8, sizeof word);
        windows[i] = word >> ((t + i) * B % 8) & mask;
      }
      sink((t - from) * P, Isa::template look_up<P>(points, halves, windows));
    }
  }
};

// Decodes trellis grids by hash, whose groups are one run, in column order.
template <class Isa, int B, int P>
struct RunDecoder {
  typename Isa::template TrellisDecoder<B, P> decoder;
  const Trellis& trellis;
  std::int64_t k;

  explicit RunDecoder(const PackedView& w) : decoder(w), trellis(*w.format.grid->trellis), k(w.format.k) {}

  // `count` indices' worth of columns from those of index `index` on, which lie in one run.
  template <typename Sink>
  void chunk(const std::uint8_t* row, std::int64_t index, int count, const Sink& sink) const {
    const RunGroup run = run_group(trellis, k, index * P);
    const auto first = static_cast<int>(index - run.first / P);
    decoder.chunk(row + run.first / P * B / 8, run.columns / P, first, first + count, sink);
  }
};

// Decodes additive grids of two weights (`a2`), in decode order, as integers: 32 times the weights. An entry holds both
// tables: bytes hi_0, hi_1, lo_0, lo_1 of a piece. So one look-up for a piece of 8 bits serves the step that has it as
// lo and the step, kShift before, that has it as hi; both weights of all steps are added up as bytes.
template <class Isa, int B>
struct AdditiveDecoder {
  static constexpr int kShift = B == 4 ? 2 : 1;
  static constexpr int kSteps = 8;  // at once: B bytes
  static constexpr int kMaxSteps = 32;
  static constexpr int kRuns = 4;  // of a group
  typedef std::uint32_t Words __attribute__((vector_size(4 * kSteps)));
  typedef std::uint8_t Bytes __attribute__((vector_size(4 * kSteps)));
  typedef std::uint16_t Pairs __attribute__((vector_size(2 * kSteps)));

  std::uint32_t entries[256];
  const Trellis& trellis;
  std::int64_t k;
  const std::uint8_t* end;  // of the tensor

  explicit AdditiveDecoder(const PackedView& w)
      : trellis(*w.format.grid->trellis), k(w.format.k), end(w.indices + w.format.index_bytes()) {
    for (int i = 0; i < 256; ++i) {
      const float* lo = trellis.table.data() + 4 * i;
      const float* hi = lo + 2;
      entries[i] = byte(hi[0]) | byte(hi[1]) << 8 | byte(lo[0]) << 16 | byte(lo[1]) << 24;
    }
  }
  static std::uint32_t byte(float entry) {
    return static_cast<std::uint8_t>(static_cast<std::int8_t>(entry / kAdditiveStep));
  }

  // Of `count` indices from `index` on, which lie in one group of runs.
  template <typename Sink>
  void chunk(const std::uint8_t* row, std::int64_t index, int count, const Sink& sink) const {
    const RunGroup group = run_group(trellis, k, index * 2);
    const int steps = group.columns / kRuns / 2;
    const int from = static_cast<int>(index - group.first / 2) / kRuns;
    const int taken = count / kRuns;  // steps of each run
    const std::uint8_t* bytes = row + group.first / 2 * B / 8;
    std::uint32_t words[kRuns][kMaxSteps + kShift];
    // All look-ups first: a vector cannot be loaded before what it consists of has reached the cache.
    for (auto& of_run : words) {
      look_up(bytes, steps, from, taken, of_run);
      bytes += steps * B / 8;
    }
    for (const auto& of_run : words) {
      for (int s = 0; s < taken; s += kSteps) {
        Words lo;
        Words hi;
        std::memcpy(&lo, of_run + s, sizeof lo);
        std::memcpy(&hi, of_run + s + kShift, sizeof hi);
        const Bytes sums = reinterpret_cast<Bytes>(lo >> 16) + reinterpret_cast<Bytes>(hi);
        const Pairs pairs = __builtin_convertvector(reinterpret_cast<Words>(sums), Pairs);
        Isa::signed_bytes(reinterpret_cast<const std::int8_t*>(&pairs), [&](int i, typename Isa::Vec v) {
          sink(static_cast<int>(&of_run - words) * 2 * taken + 2 * s + i, v);
        });
      }
    }
  }

  // Entries of the pieces of steps [from, from + count + kShift) of a run, cyclic.
  void look_up(const std::uint8_t* run, int steps, int from, int count, std::uint32_t* words) const {
    for (int s = from; s < from + count; s += kSteps) {
      std::uint64_t stream = load(run + s * B / 8);
      if constexpr (B < 8) {
        if (s + kSteps == steps) stream = (stream & ((std::uint64_t{1} << 8 * B) - 1)) | std::uint64_t{*run} << 8 * B;
      }
      for (int i = 0; i < kSteps; ++i, stream >>= B) *words++ = entries[stream & 255];
    }
    std::uint64_t stream = load(from + count == steps ? run : run + (from + count) * B / 8);
    for (int i = 0; i < kShift; ++i, stream >>= B) *words++ = entries[stream & 255];
  }

  // Eight bytes, or those up to the end of the tensor; B are wanted.
  [[nodiscard]] std::uint64_t load(const std::uint8_t* bytes) const {
    std::uint64_t stream = 0;
    if (end - bytes >= 8) {
      std::memcpy(&stream, bytes, 8);
    } else {
      std::memcpy(&stream, bytes, B);
    }
    return stream;
  }
};

// Trellis grids: what a scale group and a run group have in common. i: index within the row.
template <int P>
struct Runs {
  const LayerFormat& format;
  explicit Runs(const LayerFormat& f) : format(f) {}
  [[nodiscard]] std::int64_t count(std::int64_t i, std::int64_t left) const {
    const RunGroup group = run_group(*format.grid->trellis, format.k, i * P);
    return std::min(left, (group.first + group.columns) / P - i);
  }
};

// A decoder of vector grids.
template <class Decoder, int B>
struct ChunkDecoder {
  Decoder decoder;
  explicit ChunkDecoder(const PackedView& w) : decoder(w) {}
  template <typename Sink>
  void chunk(const std::uint8_t* row, std::int64_t index, int count, const Sink& sink) const {
    decoder.chunk(row + index * B / 8, count, sink);
  }
};

// Where the bytes of a scale group lie, for a decoder of B-bit indices.
template <int B, int P>
struct GroupBytes {
  const PackedView& w;
  std::int64_t groups = w.format.row_groups();
  std::int64_t row_bytes = w.format.row_bytes();
  std::int64_t full_indices = w.format.group / P;
  std::int64_t last_indices = (w.format.k - (groups - 1) * w.format.group) / P;

  [[nodiscard]] const std::uint8_t* row(std::int64_t i) const { return w.indices + i * row_bytes; }
  [[nodiscard]] std::int64_t first(std::int64_t g) const { return g * full_indices; }
  [[nodiscard]] std::int64_t indices(std::int64_t g) const { return g + 1 == groups ? last_indices : full_indices; }
};

template <class Isa, class Decoder, class Cut, int B, int P, int M>
void dot_rows(const PackedView& w, const float* x, std::int64_t begin, std::int64_t end, float* y,
              std::int64_t y_stride) {
  using Vec = typename Isa::Vec;
  const GroupBytes<B, P> layout{w};
  const Decoder decoder(w);
  const Cut cut(w.format);
  const std::int64_t k = w.format.k;
  for (std::int64_t i = begin; i < end; i += 2) {  // two rows at a time: two independent chains of fma
    const std::int64_t pair[2] = {i, std::min(i + 1, end - 1)};
    float total[2][M] = {};
    for (std::int64_t g = 0; g < layout.groups; ++g) {
      const std::uint8_t* bytes[2] = {layout.row(pair[0]), layout.row(pair[1])};
      const std::int64_t first = layout.first(g);
      const std::int64_t count = layout.indices(g);
      const float* xg = x + g * w.format.group;
      Vec acc0[M];
      Vec acc1[M];
      for (int t = 0; t < M; ++t) acc0[t] = acc1[t] = Isa::zero();
      for (std::int64_t c = 0; c < count;) {
        const int taken = static_cast<int>(cut.count(first + c, count - c));
        const std::int64_t ahead = (first + c) * B / 8 + 2 * layout.row_bytes;  // in the next pair of rows
        for (int line = 0; line < kChunk * B / 8; line += 64) {
          __builtin_prefetch(bytes[0] + ahead + line);
          __builtin_prefetch(bytes[1] + ahead + line);
        }
        decoder.chunk(bytes[0], first + c, taken, [&](int offset, Vec v) {
          for (int t = 0; t < M; ++t) acc0[t] = Isa::fma(v, Isa::load(xg + t * k + offset), acc0[t]);
        });
        decoder.chunk(bytes[1], first + c, taken, [&](int offset, Vec v) {
          for (int t = 0; t < M; ++t) acc1[t] = Isa::fma(v, Isa::load(xg + t * k + offset), acc1[t]);
        });
        c += taken;
        xg += taken * P;
      }
      for (int t = 0; t < M; ++t) {
        total[0][t] += Isa::f16(w.scales[pair[0] * layout.groups + g]) * Isa::sum(acc0[t]);
        total[1][t] += Isa::f16(w.scales[pair[1] * layout.groups + g]) * Isa::sum(acc1[t]);
      }
    }
    for (int t = 0; t < M; ++t) {
      y[t * y_stride + i] = total[0][t];
      if (i + 1 < end) y[t * y_stride + i + 1] = total[1][t];
    }
  }
}

// Any m up to kFewRows.
template <class Isa, class Decoder, class Cut, int B, int P>
void dot_few_rows(const PackedView& w, const float* x, std::int64_t m, std::int64_t begin, std::int64_t end, float* y,
                  std::int64_t y_stride) {
  constexpr decltype(&dot_rows<Isa, Decoder, Cut, B, P, 1>) kLoops[kFewRows] = {
      dot_rows<Isa, Decoder, Cut, B, P, 1>, dot_rows<Isa, Decoder, Cut, B, P, 2>, dot_rows<Isa, Decoder, Cut, B, P, 3>,
      dot_rows<Isa, Decoder, Cut, B, P, 4>};
  kLoops[m - 1](w, x, begin, end, y, y_stride);
}

// R rows of decoded weights times M rows of x over `cols` floats; adds scale * sum to y. Not inlined: among all that
// goes on around it, GCC would run out of registers.
template <class Isa, int R, int M>
[[gnu::noinline]] void micro(const float* weights, std::int64_t weights_stride, const float* x, std::int64_t x_stride,
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

template <class Isa, class Decoder, class Cut, int B, int P>
void dot_tile(const PackedView& w, const float* x, std::int64_t m, std::int64_t begin, std::int64_t end, float* scratch,
              float* y, std::int64_t y_stride) {
  using Vec = typename Isa::Vec;
  constexpr int kRows = Isa::kMicroRows;
  constexpr int kTokens = Isa::kMicroTokens;
  const GroupBytes<B, P> layout{w};
  const Decoder decoder(w);
  const Cut cut(w.format);
  const std::int64_t groups = layout.groups;
  const std::int64_t x_stride = w.format.k;
  const std::int64_t stride = w.format.group;
  for (std::int64_t i = 0; i < m; ++i) std::fill_n(y + i * y_stride, end - begin, 0.0f);
  for (std::int64_t g = 0; g < groups; ++g) {
    const std::int64_t count = layout.indices(g);
    const std::int64_t cols = count * P;
    float scales[kTileRows];
    for (std::int64_t i = begin; i < end; ++i) {
      float* row = scratch + (i - begin) * stride;
      for (std::int64_t c = 0; c < count;) {
        const int taken = static_cast<int>(cut.count(layout.first(g) + c, count - c));
        decoder.chunk(layout.row(i), layout.first(g) + c, taken,
                      [&](int offset, Vec v) { Isa::store(row + c * P + offset, v); });
        c += taken;
      }
      scales[i - begin] = Isa::f16(w.scales[i * groups + g]);
    }
    const float* xg = x + g * w.format.group;
    for (std::int64_t t = 0; t < m;) {
      const std::int64_t left = m - t;
      const std::int64_t tokens = left >= kTokens ? kTokens : left >= 2 ? 2 : 1;
      const float* xt = xg + t * x_stride;
      float* yt = y + t * y_stride;
      for (std::int64_t r = 0; r < end - begin;) {
        const bool full_rows = end - begin - r >= kRows;
        const auto multiply = tokens == kTokens ? (full_rows ? micro<Isa, kRows, kTokens> : micro<Isa, 1, kTokens>)
                              : tokens == 2     ? (full_rows ? micro<Isa, kRows, 2> : micro<Isa, 1, 2>)
                                                : (full_rows ? micro<Isa, kRows, 1> : micro<Isa, 1, 1>);
        multiply(scratch + r * stride, stride, xt, x_stride, cols, scales + r, yt + r, y_stride);
        r += full_rows ? kRows : 1;
      }
      t += tokens;
    }
  }
}

// Whether B-bit indices for P weights are those of a sign-symmetric grid: a magnitude in the low 8 bits, then P signs.
template <int B, int P>
inline constexpr bool kSigned = B == 12 && P == 4;

// The (index_bits, p) pairs that have a decoder: a grid of any other pair needs one more line here and nothing else.
#define HIGGS_FOR_EACH_DECODER(X) \
  X(2, 1)                         \
  X(3, 1)                         \
  X(4, 1)                         \
  X(5, 1)                         \
  X(6, 1)                         \
  X(8, 1)                         \
  X(4, 2)                         \
  X(5, 2)                         \
  X(6, 2)                         \
  X(7, 2) X(8, 2) X(9, 2) X(10, 2) X(11, 2) X(12, 2) X(4, 4) X(6, 4) X(8, 4) X(12, 4)

// The same for trellis grids by hash.
#define HIGGS_FOR_EACH_TRELLIS_DECODER(X) X(4, 2) X(5, 2) X(6, 2) X(7, 2) X(8, 2) X(9, 2) X(10, 2) X(6, 4) X(8, 4)

// The index_bits of additive trellis grids of two weights.
#define HIGGS_FOR_EACH_ADDITIVE_DECODER(X) X(4) X(5) X(6) X(7) X(8)

inline int decoder_key(const Grid& grid) {
  const int family = grid.trellis == nullptr ? 0 : grid.trellis->kind == Trellis::Kind::hash ? 1 : 2;
  return 256 * family + grid.index_bits * 8 + grid.p;
}

template <class Isa>
void dot_rows_any(const PackedView& w, const float* x, std::int64_t m, std::int64_t begin, std::int64_t end, float* y,
                  std::int64_t y_stride) {
  switch (decoder_key(*w.format.grid)) {
#define HIGGS_CASE(B, P)                                                                              \
  case (B) * 8 + (P):                                                                                 \
    return dot_few_rows<Isa, ChunkDecoder<typename Isa::template Decoder<B, P>, B>, Chunks<P>, B, P>( \
        w, x, m, begin, end, y, y_stride);
    HIGGS_FOR_EACH_DECODER(HIGGS_CASE)
#undef HIGGS_CASE
#define HIGGS_CASE(B, P)    \
  case 256 + (B) * 8 + (P): \
    return dot_few_rows<Isa, RunDecoder<Isa, B, P>, Runs<P>, B, P>(w, x, m, begin, end, y, y_stride);
    HIGGS_FOR_EACH_TRELLIS_DECODER(HIGGS_CASE)
#undef HIGGS_CASE
#define HIGGS_CASE(B)     \
  case 512 + (B) * 8 + 2: \
    return dot_few_rows<Isa, typename Isa::template Additive<B>, Runs<2>, B, 2>(w, x, m, begin, end, y, y_stride);
    HIGGS_FOR_EACH_ADDITIVE_DECODER(HIGGS_CASE)
#undef HIGGS_CASE
    default: no_decoder(*w.format.grid);
  }
}

template <class Isa>
void dot_tile_any(const PackedView& w, const float* x, std::int64_t m, std::int64_t begin, std::int64_t end,
                  float* scratch, float* y, std::int64_t y_stride) {
  switch (decoder_key(*w.format.grid)) {
#define HIGGS_CASE(B, P)                                                                          \
  case (B) * 8 + (P):                                                                             \
    return dot_tile<Isa, ChunkDecoder<typename Isa::template Decoder<B, P>, B>, Chunks<P>, B, P>( \
        w, x, m, begin, end, scratch, y, y_stride);
    HIGGS_FOR_EACH_DECODER(HIGGS_CASE)
#undef HIGGS_CASE
#define HIGGS_CASE(B, P)    \
  case 256 + (B) * 8 + (P): \
    return dot_tile<Isa, RunDecoder<Isa, B, P>, Runs<P>, B, P>(w, x, m, begin, end, scratch, y, y_stride);
    HIGGS_FOR_EACH_TRELLIS_DECODER(HIGGS_CASE)
#undef HIGGS_CASE
#define HIGGS_CASE(B)     \
  case 512 + (B) * 8 + 2: \
    return dot_tile<Isa, typename Isa::template Additive<B>, Runs<2>, B, 2>(w, x, m, begin, end, scratch, y, y_stride);
    HIGGS_FOR_EACH_ADDITIVE_DECODER(HIGGS_CASE)
#undef HIGGS_CASE
    default: no_decoder(*w.format.grid);
  }
}

}  // namespace
}  // namespace higgs::detail
