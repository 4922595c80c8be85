// AVX2 + FMA + F16C kernels. Eight indices at a time are spread to 32-bit lanes, shifted and masked (any width up to 12
// bits), then looked up: in registers for up to 16 points of one weight, else by one load for each whole point. Plain
// loads, because a gather instruction takes two to four times as long on many CPUs.
#include <immintrin.h>

#include "../block_loops.h"
#include "../dot_loops.h"
#include "../trellis_loops.h"

namespace higgs::detail {
namespace {

struct Avx2 {
  using Vec = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kMicroRows = 3;
  static constexpr int kMicroTokens = 4;

  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Vec v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
  }
  static float f16(std::uint16_t bits) { return _cvtsh_ss(bits); }

  template <typename Use>
  static void signed_bytes(const std::int8_t* bytes, const Use& use) {
    for (int i = 0; i < 16; i += kLanes) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + i));
      use(i, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)));
    }
  }

  template <int B, int P>
  using TrellisDecoder = WindowDecoder<Avx2, B, P>;

  template <int B>
  using Additive = AdditiveDecoder<Avx2, B>;

  template <int P>
  static Vec look_up(const float*, const std::uint16_t* halves, const std::uint32_t* windows) {
    std::uint16_t row[kLanes];
    for (int i = 0; i < kLanes / P; ++i) std::memcpy(row + i * P, halves + windows[i] * P, 2 * P);
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
  }

  // A point is one fp32 value (P = 1), two fp16 values or, as those of four weights have at most 8 significant bits,
  // the upper halves of four fp32 values: these need no conversion.
  template <int B, int P>
  struct Decoder {
    static constexpr int kPoints = 1 << (kSigned<B, P> ? B - P : B);  // in the table
    static constexpr bool kInRegisters = P == 1 && B <= 4;
    using Word = std::conditional_t<P == 4, std::uint64_t, std::uint32_t>;

    alignas(32) Word table[kPoints < 16 ? 16 : kPoints] = {};
    const std::uint8_t* end;  // of the tensor: loads are 16 bytes wide and must not pass it
    __m256i spread;
    __m256i shift;

    explicit Decoder(const PackedView& w) : end(w.indices + w.format.index_bytes()) {
      const float* points = w.format.grid->points.data();
      for (int i = 0; i < kPoints; ++i) {
        for (int c = 0; c < P; ++c) {
          std::uint32_t bits;
          std::memcpy(&bits, &points[i * P + c], sizeof bits);
          const std::uint32_t part = P == 1 ? bits : P == 4 ? bits >> 16 : _cvtss_sh(points[i * P + c], 0);
          table[i] |= static_cast<Word>(part) << (16 * c);
        }
      }
      alignas(32) std::uint8_t control[32];
      alignas(32) std::int32_t shifts[8];
      for (int i = 0; i < 8; ++i) {
        for (int b = 0; b < 4; ++b) control[4 * i + b] = static_cast<std::uint8_t>(i * B / 8 + b);
        shifts[i] = i * B % 8;
      }
      spread = _mm256_load_si256(reinterpret_cast<const __m256i*>(control));
      shift = _mm256_load_si256(reinterpret_cast<const __m256i*>(shifts));
    }

    [[nodiscard]] __m256i eight_indices(const std::uint8_t* bytes) const {
      __m128i raw;
      if (bytes + 16 <= end) {
        raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
      } else {
        alignas(16) std::uint8_t copy[16] = {};
        std::memcpy(copy, bytes, B);
        raw = _mm_load_si128(reinterpret_cast<const __m128i*>(copy));
      }
      const __m256i words = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(raw), spread);
      return _mm256_and_si256(_mm256_srlv_epi32(words, shift), _mm256_set1_epi32((1 << B) - 1));
    }

    template <typename Sink>
    void chunk(const std::uint8_t* bytes, int count, const Sink& sink) const {
      for (int i = 0; i < count; i += 8, bytes += B) {
        const __m256i index = eight_indices(bytes);
        if constexpr (kInRegisters) {
          const __m256 low = _mm256_permutevar8x32_ps(load(reinterpret_cast<const float*>(table)), index);
          const __m256 high = _mm256_permutevar8x32_ps(load(reinterpret_cast<const float*>(table + 8)), index);
          const __m256 use_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
          sink(i, B < 4 ? low : _mm256_blendv_ps(low, high, use_high));
        } else {
          alignas(32) std::uint32_t at[8];
          _mm256_store_si256(reinterpret_cast<__m256i*>(at), index);
          for (int part = 0; part < 8; part += 32 / static_cast<int>(sizeof(Word)))
            look_up(at + part, (i + part) * P, sink);
        }
      }
    }

    // One register full of points: eight of one or two weights, four of four.
    template <typename Sink>
    void look_up(const std::uint32_t* at, int offset, const Sink& sink) const {
      if constexpr (P == 4) {
        const auto word = [&](int lane) { return static_cast<long long>(table[at[lane] % kPoints]); };
        __m256i halves = _mm256_setr_epi64x(word(0), word(2), word(1), word(3));
        if constexpr (kSigned<B, P>) halves = _mm256_xor_si256(halves, sign_bits(at));
        const __m256i zero = _mm256_setzero_si256();
        sink(offset, _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, halves)));
        sink(offset + 8, _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, halves)));
      } else {
        const auto word = [&](int lane) { return static_cast<int>(table[at[lane]]); };
        const __m256i words = _mm256_setr_epi32(word(0), word(1), word(2), word(3), word(4), word(5), word(6), word(7));
        if constexpr (P == 1) {
          sink(offset, _mm256_castsi256_ps(words));
        } else {
          sink(offset, _mm256_cvtph_ps(_mm256_castsi256_si128(words)));
          sink(offset + 8, _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1)));
        }
      }
    }

    // Signs of the four points of indices 0, 2, 1 and 3: bit 8 + c of an index at the top of half c.
    static __m256i sign_bits(const std::uint32_t* at) {
      const __m128i index = _mm_load_si128(reinterpret_cast<const __m128i*>(at));
      const auto twice = [](std::uint32_t a, std::uint32_t b) {
        return _mm_setr_epi32(static_cast<int>(a), static_cast<int>(a), static_cast<int>(b), static_cast<int>(b));
      };
      const __m256i second_bytes = _mm256_setr_m128i(twice(0x80018001, 0x80098009), twice(0x80058005, 0x800d800d));
      const __m256i signs = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(index), second_bytes);
      const __m256i to_top = _mm256_set1_epi64x(0x1000'2000'4000'8000);
      return _mm256_and_si256(_mm256_mullo_epi16(signs, to_top), _mm256_set1_epi16(INT16_MIN));
    }
  };
};

}  // namespace

const Kernels kAvx2Kernels = {
    0, kLanes, transform_blocks, nearest_group, sum_of_products, encode_runs, dot_rows_any<Avx2>, dot_tile_any<Avx2>};

}  // namespace higgs::detail
