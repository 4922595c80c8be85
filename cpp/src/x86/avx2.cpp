// AVX2 + FMA + F16C kernels. Eight indices at a time are spread to 32-bit lanes, shifted and masked (any width up to 12
// bits), then looked up: in registers for up to 16 points of one weight, else by gathers of two fp16 components.
#include <immintrin.h>

#include "../block_loops.h"
#include "../dot_loops.h"

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

  // Pairs of components as fp16, one 32-bit word per point, [ceil(P / 2)][points]; one float per point for P = 1.
  template <int B, int P>
  struct Decoder {
    static constexpr int kPoints = 1 << B;
    static constexpr int kTables = P == 1 ? 1 : P / 2;
    static constexpr int kBytes = B;  // of eight indices
    static constexpr bool kInRegisters = P == 1 && B <= 4;

    alignas(32) std::uint32_t table[kTables][kPoints < 16 ? 16 : kPoints] = {};
    const std::uint8_t* end;  // of the tensor: loads are 16 bytes wide and must not pass it
    __m256i spread;
    __m256i shift;

    explicit Decoder(const PackedView& w) : end(w.indices + w.format.index_bytes()) {
      const float* points = w.format.grid->points.data();
      for (int i = 0; i < kPoints; ++i) {
        for (int t = 0; t < kTables; ++t) {
          if constexpr (P == 1) {
            std::memcpy(&table[t][i], &points[i], 4);
          } else {
            const std::uint32_t low = _cvtss_sh(points[i * P + 2 * t], 0);
            const std::uint32_t high = _cvtss_sh(points[i * P + 2 * t + 1], 0);
            table[t][i] = low | high << 16;
          }
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
        std::memcpy(copy, bytes, kBytes);
        raw = _mm_load_si128(reinterpret_cast<const __m128i*>(copy));
      }
      const __m256i words = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(raw), spread);
      return _mm256_and_si256(_mm256_srlv_epi32(words, shift), _mm256_set1_epi32(kPoints - 1));
    }

    template <typename Sink>
    void chunk(const std::uint8_t* bytes, int valid, const Sink& sink) const {
      for (int i = 0; i < valid; i += 8, bytes += kBytes) {
        const __m256i index = eight_indices(bytes);
        if constexpr (kInRegisters) {
          const __m256 low = _mm256_permutevar8x32_ps(load(reinterpret_cast<const float*>(&table[0][0])), index);
          const __m256 high = _mm256_permutevar8x32_ps(load(reinterpret_cast<const float*>(&table[0][8])), index);
          const __m256 use_high = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
          sink(i, B < 4 ? low : _mm256_blendv_ps(low, high, use_high));
        } else if constexpr (P == 1) {
          sink(i, _mm256_i32gather_ps(reinterpret_cast<const float*>(table[0]), index, 4));
        } else {
          for (int t = 0; t < kTables; ++t) {
            const __m256i pairs = _mm256_i32gather_epi32(reinterpret_cast<const int*>(table[t]), index, 4);
            const __m256i low = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff));
            const __m256i high = _mm256_srli_epi32(pairs, 16);
            const __m256i both = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
            sink((2 * t) * kChunk + i, _mm256_cvtph_ps(_mm256_castsi256_si128(both)));
            sink((2 * t + 1) * kChunk + i, _mm256_cvtph_ps(_mm256_extracti128_si256(both, 1)));
          }
        }
      }
      for (int i = valid; i < kChunk; i += 8) {
        for (int c = 0; c < P; ++c) sink(c * kChunk + i, zero());
      }
    }
  };
};

}  // namespace

const Kernels kAvx2Kernels = {fwht_blocks, nearest_group, sum_of_squares, dot_rows_any<Avx2>, dot_tile_any<Avx2>};

}  // namespace higgs::detail
