// AVX-512 kernels (F, BW, DQ, VL, VBMI).
//
// Up to 8 bits an index: VPERMB and VPMULTISHIFTQB unpack 64 indices of any width in three instructions, and the grid
// sits in registers as two byte tables per component (low and high byte of the fp16 value), so that one VPERMB or
// VPERMI2B looks up 64 indices; interleaving the two bytes gives 64 fp16 values. For p2_n256 that is 17 instructions
// for 128 weights before the conversion to fp32. p4_n4096 looks up its magnitudes so and flips signs. Other indices
// wider than 8 bits load both components of a point as one 32-bit word, by plain loads: the gather instruction takes
// more than twice as long on Zen 4 and 5.
#include <immintrin.h>

#include "../block_loops.h"
#include "../dot_loops.h"
#include "../trellis_loops.h"

namespace higgs::detail {
namespace {

// The first `count` of 64 bytes; what follows in the tensor may come along. Masked loads only where the tensor ends: on
// Zen 5 a stream of them is three times slower than memory, as if the prefetcher did not see them.
inline __m512i load_bytes(const std::uint8_t* bytes, int count, const std::uint8_t* end) {
  if (bytes + 64 <= end) return _mm512_loadu_si512(bytes);
  return _mm512_maskz_loadu_epi8(count >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1, bytes);
}

// Calls sink for the first Count of 64 fp16 values given as their low and high bytes. Interleaving works per 128-bit
// lane: it takes the indices in the order of kQwordOrder.
template <int Count, typename Sink>
inline void convert_bytes(__m512i low, __m512i high, int offset, const Sink& sink) {
  const __m512i first = _mm512_unpacklo_epi8(low, high);
  const __m512i second = _mm512_unpackhi_epi8(low, high);
  sink(offset, _mm512_cvtph_ps(_mm512_castsi512_si256(first)));
  if constexpr (Count > 16) sink(offset + 16, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(first, 1)));
  if constexpr (Count > 32) sink(offset + 32, _mm512_cvtph_ps(_mm512_castsi512_si256(second)));
  if constexpr (Count > 48) sink(offset + 48, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(second, 1)));
}
constexpr int kQwordOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};

// 64 fields of 8 bits of a stream, of which one begins every B bits: `spread` brings a qword the bytes of eight,
// `shift` says where in it they begin.
template <int B>
inline __m512i fields(const std::uint8_t* spread, const std::uint8_t* shift, __m512i raw) {
  const __m512i words = _mm512_permutexvar_epi8(_mm512_load_si512(spread), raw);
  return B == 8 ? words : _mm512_multishift_epi64_epi8(_mm512_load_si512(shift), words);
}

inline __m512 floats_of_bytes(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)); }

// 64 bytes of a table of Registers * 64, by index.
template <int Registers>
inline __m512i look_up_byte(const std::uint8_t* table, __m512i index) {
  const __m512i t0 = _mm512_load_si512(table);
  if constexpr (Registers == 1) return _mm512_permutexvar_epi8(index, t0);
  const __m512i low = _mm512_permutex2var_epi8(t0, index, _mm512_load_si512(table + 64));
  if constexpr (Registers == 2) return low;
  const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(table + 128), index, _mm512_load_si512(table + 192));
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high);
}

template <int B, int P>
struct ByteTableDecoder {
  static constexpr int kPoints = 1 << B;
  static constexpr int kRegisters = kPoints <= 64 ? 1 : kPoints / 64;
  alignas(64) std::uint8_t bytes_of[P][2][kRegisters * 64];  // [component][low, high]
  alignas(64) std::uint8_t spread[64];
  alignas(64) std::uint8_t shift[64];

  const std::uint8_t* end;  // of the tensor

  explicit ByteTableDecoder(const PackedView& w) : end(w.indices + w.format.index_bytes()) {
    const float* points = w.format.grid->points.data();
    for (int i = 0; i < kRegisters * 64; ++i) {
      for (int c = 0; c < P; ++c) {
        const unsigned bits = _cvtss_sh(points[i % kPoints * P + c], 0);
        bytes_of[c][0][i] = static_cast<std::uint8_t>(bits);
        bytes_of[c][1][i] = static_cast<std::uint8_t>(bits >> 8);
      }
    }
    for (int q = 0; q < 8; ++q) {
      for (int b = 0; b < 8; ++b) {
        spread[8 * q + b] = static_cast<std::uint8_t>(kQwordOrder[q] * B + (b < B ? b : 0));
        shift[8 * q + b] = static_cast<std::uint8_t>(b * B);
      }
    }
  }

  [[nodiscard]] __m512i unpack(const std::uint8_t* bytes, int count) const {
    const __m512i raw = load_bytes(bytes, count * B / 8, end);
    const __m512i index = fields<B>(spread, shift, raw);
    return B == 8 ? index : _mm512_and_si512(index, _mm512_set1_epi8(static_cast<char>(kPoints - 1)));
  }

  template <int Count = kChunk, typename Sink>
  void chunk(const std::uint8_t* bytes, int count, const Sink& sink) const {
    if constexpr (Count > 64 / P) {
      if (count < Count) return chunk<Count - 64 / P>(bytes, count, sink);
    }
    const __m512i index = unpack(bytes, Count);
    for (int c = 0; c < P; ++c) {
      convert_bytes<Count>(look_up_byte<kRegisters>(bytes_of[c][0], index),
                           look_up_byte<kRegisters>(bytes_of[c][1], index), c * Count, sink);
    }
  }
};

// A sign-symmetric grid: p = 4, the number of a magnitude in 8 bits, then 4 signs. Magnitudes have at most 8
// significant bits, so the byte tables are those of the upper half of an fp32 value: no conversion.
struct SignedDecoder {
  alignas(64) std::uint8_t bytes_of[4][2][256];  // [component][low, high]
  alignas(64) std::uint8_t spread[64];
  alignas(64) std::uint8_t shift[64];
  const std::uint8_t* end;  // of the tensor

  explicit SignedDecoder(const PackedView& w) : end(w.indices + w.format.index_bytes()) {
    const float* points = w.format.grid->points.data();
    for (int i = 0; i < 4 * 256; ++i) {
      std::uint32_t bits;
      std::memcpy(&bits, &points[i], sizeof bits);
      bytes_of[i % 4][0][i / 4] = static_cast<std::uint8_t>(bits >> 16);
      bytes_of[i % 4][1][i / 4] = static_cast<std::uint8_t>(bits >> 24);
    }
    for (int q = 0; q < 8; ++q) {
      const int quad = q % 2 * 4 + q / 2;  // four indices in 6 bytes; a qword gets their magnitudes, then their signs
      for (int b = 0; b < 8; ++b) {
        spread[8 * q + b] = static_cast<std::uint8_t>(6 * quad + (b < 6 ? b : 0));
        shift[8 * q + b] = static_cast<std::uint8_t>(b < 4 ? 12 * b : 12 * (b - 4) + 8);
      }
    }
  }

  // 32 indices, of which `count` are there.
  [[nodiscard]] __m512 half_chunk(const std::uint8_t* bytes, int count) const {
    const __m512i raw = count > 0 ? load_bytes(bytes, count * 12 / 8, end) : _mm512_setzero_si512();
    const __m512i words = _mm512_permutexvar_epi8(_mm512_load_si512(spread), raw);
    return _mm512_castsi512_ps(_mm512_multishift_epi64_epi8(_mm512_load_si512(shift), words));
  }

  // Indices come as quads 0, 4, 8, 12, 1, 5, ...: in order after two interleavings within 128-bit lanes.
  template <int Count = kChunk, typename Sink>
  void chunk(const std::uint8_t* bytes, int count, const Sink& sink) const {
    if constexpr (Count > 16) {
      if (count < Count) return chunk<Count - 16>(bytes, count, sink);
    }
    const __m512 first = half_chunk(bytes, Count);
    const __m512 second = half_chunk(bytes + 48, Count - 32);
    const __m512i index = _mm512_castps_si512(_mm512_shuffle_ps(first, second, 0x88));
    const __m512i signs = _mm512_castps_si512(_mm512_shuffle_ps(first, second, 0xdd));
    const auto sink_words = [&](__m512i words, int c, int i) {
      const __m512i zero = _mm512_setzero_si512();
      if (i < Count) sink(c * Count + i, _mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, words)));
      if (i + 16 < Count) sink(c * Count + i + 16, _mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, words)));
    };
    for (int c = 0; c < 4; ++c) {
      const __m512i moved = _mm512_slli_epi16(signs, 7 - c);  // bit c of each byte to its top
      constexpr int kXorAnd = 0x78;                           // a ^ (b & c)
      const __m512i low = look_up_byte<4>(bytes_of[c][0], index);
      const __m512i high =
          _mm512_ternarylogic_epi64(look_up_byte<4>(bytes_of[c][1], index), moved, _mm512_set1_epi8(INT8_MIN), kXorAnd);
      sink_words(_mm512_unpacklo_epi8(low, high), c, 0);
      sink_words(_mm512_unpackhi_epi8(low, high), c, 32);
    }
  }
};

template <int B>
struct WordTableDecoder {  // P = 2, 9 to 12 bits
  static constexpr int kPoints = 1 << B;
  alignas(64) std::uint32_t table[kPoints];  // two fp16 components
  alignas(64) std::uint8_t spread[64];
  alignas(64) std::int32_t shift[16];

  const std::uint8_t* end;  // of the tensor

  explicit WordTableDecoder(const PackedView& w) : end(w.indices + w.format.index_bytes()) {
    const float* points = w.format.grid->points.data();
    for (int i = 0; i < kPoints; ++i) {
      const std::uint32_t low = _cvtss_sh(points[2 * i], 0);
      const std::uint32_t high = _cvtss_sh(points[2 * i + 1], 0);
      table[i] = low | high << 16;
    }
    for (int i = 0; i < 16; ++i) {
      for (int b = 0; b < 4; ++b) spread[4 * i + b] = static_cast<std::uint8_t>(i * B / 8 + b);
      shift[i] = i * B % 8;
    }
  }

  template <typename Sink>
  void chunk(const std::uint8_t* bytes, int count, const Sink& sink) const {
    const __m512i spread_v = _mm512_load_si512(spread);
    const __m512i shift_v = _mm512_load_si512(shift);
    for (int i = 0; i < count; i += 16, bytes += 2 * B) {
      const __m512i words = _mm512_permutexvar_epi8(spread_v, load_bytes(bytes, 2 * B, end));
      const __m512i index = _mm512_and_si512(_mm512_srlv_epi32(words, shift_v), _mm512_set1_epi32(kPoints - 1));
      alignas(64) std::uint32_t at[16];
      _mm512_store_si512(at, index);
      sink(2 * i, _mm512_cvtph_ps(eight_points(at)));
      sink(2 * i + 16, _mm512_cvtph_ps(eight_points(at + 8)));
    }
  }

  [[nodiscard]] __m256i eight_points(const std::uint32_t* at) const {
    const auto word = [&](int lane) { return static_cast<int>(table[at[lane]]); };
    return _mm256_setr_epi32(word(0), word(1), word(2), word(3), word(4), word(5), word(6), word(7));
  }
};

// Trellis grids of p = 2: 16 windows at once, points from the small table behind all windows, which stays in the
// first-level cache, where the table of all windows does not.
template <int B>
struct PairDecoder {
  static constexpr int kMaxRows = 1024;
  alignas(64) std::uint32_t rows[kMaxRows];  // pairs of fp16 values
  alignas(64) std::uint8_t spread[64];
  alignas(64) std::uint8_t spread_last[2][64];  // of the last 8 or 16 windows of a run, which go on in its first bytes
  alignas(64) std::int32_t shift[16];
  const std::uint8_t* end;  // of the tensor
  __m512i mask;
  __m512i multiplier;
  __m512i row_mask;

  explicit PairDecoder(const PackedView& w) : end(w.indices + w.format.index_bytes()) {
    const Grid& grid = *w.format.grid;
    const Trellis& trellis = *grid.trellis;
    mask = _mm512_set1_epi32(grid.n_points - 1);
    multiplier = _mm512_set1_epi32(static_cast<int>(trellis.multiplier));
    row_mask = _mm512_set1_epi32(trellis.rows - 1);
    const float* values = trellis.table.data();
    for (int i = 0; i < trellis.rows; ++i) {
      const std::uint32_t low = _cvtss_sh(values[2 * i], 0);
      const std::uint32_t high = _cvtss_sh(values[2 * i + 1], 0);
      rows[i] = low | high << 16;
    }
    for (int i = 0; i < 16; ++i) {
      for (int b = 0; b < 4; ++b) {
        const int at = i * B / 8 + b;
        spread[4 * i + b] = static_cast<std::uint8_t>(at);
        for (int j = 0; j < 2; ++j) {
          const int bytes = (j + 1) * B;
          spread_last[j][4 * i + b] = static_cast<std::uint8_t>(at < bytes ? at : 64 + at - bytes);
        }
      }
      shift[i] = i * B % 8;
    }
  }

  template <typename Sink>
  void chunk(const std::uint8_t* bytes, int steps, int from, int to, const Sink& sink) const {
    const __m512i first_bytes = load_bytes(bytes, 4, end);
    for (int t = from; t < to; t += 16) {
      const int left = steps - t;
      const __m512i raw = load_bytes(bytes + t * B / 8, left <= 16 ? left * B / 8 : 2 * B + 4, end);
      const __m512i order = _mm512_load_si512(left == 8 ? spread_last[0] : left == 16 ? spread_last[1] : spread);
      const __m512i words = _mm512_permutex2var_epi8(raw, order, first_bytes);
      const __m512i window = _mm512_and_si512(_mm512_srlv_epi32(words, _mm512_load_si512(shift)), mask);
      const __m512i hash = _mm512_mullo_epi32(window, multiplier);
      const __m512i magnitudes = gather(_mm512_and_si512(_mm512_srli_epi32(hash, 16), row_mask), rows);
      const __m512i signs = _mm512_and_si512(hash, _mm512_set1_epi32(static_cast<int>(0x80008000u)));
      const __m512i pairs = _mm512_xor_si512(magnitudes, signs);
      sink(2 * (t - from), first(pairs));
      sink(2 * (t - from) + 16, second(pairs));
    }
  }

  static __m512 first(__m512i halves) { return _mm512_cvtph_ps(_mm512_castsi512_si256(halves)); }
  static __m512 second(__m512i halves) { return _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)); }

  // Plain loads: see the top of the file.
  static __m512i gather(__m512i index, const std::uint32_t* from) {
    alignas(64) std::uint32_t at[16];
    _mm512_store_si512(at, index);
    const auto word = [&](int lane) { return static_cast<int>(from[at[lane]]); };
    return _mm512_setr_epi32(word(0), word(1), word(2), word(3), word(4), word(5), word(6), word(7), word(8), word(9),
                             word(10), word(11), word(12), word(13), word(14), word(15));
  }
};

// Additive grids: the steps of two whole runs at once, as bytes, from byte tables of the four columns of the grid's
// table. Shorter runs, and parts of runs, as everywhere.
template <class Isa, int B>
struct RunPairDecoder : AdditiveDecoder<Isa, B> {
  using Base = AdditiveDecoder<Isa, B>;
  static constexpr int kRunBytes = Base::kMaxSteps * B / 8;
  static_assert(Base::kMaxSteps == 32);
  alignas(64) std::uint8_t bytes_of[2][2][256];  // [lo, hi][weight of the step]
  alignas(64) std::uint8_t spread[2][64];        // [lo, hi]
  alignas(64) std::uint8_t shift[2][64];

  explicit RunPairDecoder(const PackedView& w) : Base(w) {
    for (int is_hi = 0; is_hi < 2; ++is_hi) {
      for (int i = 0; i < 256; ++i) {
        for (int c = 0; c < 2; ++c) {
          bytes_of[is_hi][c][i] = static_cast<std::uint8_t>(Base::entries[i] >> (is_hi ? 0 : 16) >> 8 * c);
        }
      }
      const int skipped = is_hi * Base::kShift * B;  // bits
      for (int q = 0; q < 8; ++q) {
        const int run = kQwordOrder[q] / 4;
        const int first = kQwordOrder[q] % 4 * B + skipped / 8;
        for (int b = 0; b < 8; ++b) {
          spread[is_hi][8 * q + b] = static_cast<std::uint8_t>(run * kRunBytes + (first + b) % kRunBytes);
          shift[is_hi][8 * q + b] = static_cast<std::uint8_t>(skipped % 8 + b * B);
        }
      }
    }
  }

  template <typename Sink>
  void chunk(const std::uint8_t* row, std::int64_t index, int count, const Sink& sink) const {
    if (count < Base::kRuns * Base::kMaxSteps) return Base::chunk(row, index, count, sink);
    for (int pair = 0; pair < Base::kRuns / 2; ++pair) {
      const __m512i raw = load_bytes(row + index * B / 8 + pair * 2 * kRunBytes, 2 * kRunBytes, Base::end);
      const __m512i lo = fields<B>(spread[0], shift[0], raw);
      const __m512i hi = fields<B>(spread[1], shift[1], raw);
      const __m512i even = sums(0, lo, hi);
      const __m512i odd = sums(1, lo, hi);
      sink_bytes(pair * 128, _mm512_unpacklo_epi8(even, odd), sink);
      sink_bytes(pair * 128 + 64, _mm512_unpackhi_epi8(even, odd), sink);
    }
  }

  [[nodiscard]] __m512i sums(int c, __m512i lo, __m512i hi) const {
    return _mm512_add_epi8(look_up_byte<4>(bytes_of[0][c], lo), look_up_byte<4>(bytes_of[1][c], hi));
  }
  template <typename Sink>
  static void sink_bytes(int offset, __m512i bytes, const Sink& sink) {
    sink(offset, floats_of_bytes(_mm512_castsi512_si128(bytes)));
    sink(offset + 16, floats_of_bytes(_mm512_extracti32x4_epi32(bytes, 1)));
    sink(offset + 32, floats_of_bytes(_mm512_extracti32x4_epi32(bytes, 2)));
    sink(offset + 48, floats_of_bytes(_mm512_extracti32x4_epi32(bytes, 3)));
  }
};

struct Avx512 {
  using Vec = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kMicroRows = 4;
  static constexpr int kMicroTokens = 4;

  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Vec v) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  static float f16(std::uint16_t bits) { return _cvtsh_ss(bits); }

  template <int P>
  static Vec look_up(const float*, const std::uint16_t* halves, const std::uint32_t* windows) {
    using Word = std::conditional_t<P == 4, std::int64_t, std::int32_t>;
    const auto word = [&](int i) {
      Word w;
      std::memcpy(&w, halves + windows[i] * P, sizeof w);
      return w;
    };
    if constexpr (P == 4) {
      return _mm512_cvtph_ps(_mm256_setr_epi64x(word(0), word(1), word(2), word(3)));
    } else {
      return _mm512_cvtph_ps(_mm256_setr_epi32(word(0), word(1), word(2), word(3), word(4), word(5), word(6), word(7)));
    }
  }

  template <typename Use>
  static void signed_bytes(const std::int8_t* bytes, const Use& use) {
    use(0, floats_of_bytes(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes))));
  }

  template <int B, int P>
  using TrellisDecoder = std::conditional_t<P == 2, PairDecoder<B>, WindowDecoder<Avx512, B, P>>;

  template <int B>
  using Additive = RunPairDecoder<Avx512, B>;

  template <int B, int P>
  using Decoder = std::conditional_t<kSigned<B, P>, SignedDecoder,
                                     std::conditional_t<(B <= 8), ByteTableDecoder<B, P>, WordTableDecoder<B>>>;
};

}  // namespace

const Kernels kAvx512Kernels = {8,
                                kLanes,
                                transform_blocks,
                                nearest_group,
                                sum_of_products,
                                encode_runs,
                                dot_rows_any<Avx512>,
                                dot_tile_any<Avx512>};

}  // namespace higgs::detail
