// Kernels in plain C++ with compiler vector extensions: any CPU.
#include <bit>

#include "block_loops.h"
#include "dot_loops.h"
#include "higgs/numeric.h"
#include "trellis_loops.h"

namespace higgs::detail {
namespace {

struct Portable {
  typedef float Vec __attribute__((vector_size(16)));
  static constexpr int kLanes = 4;
  static constexpr int kMicroRows = 2;
  static constexpr int kMicroTokens = 4;

  static Vec zero() { return Vec{}; }
  static Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
  static Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  static float f16(std::uint16_t bits) { return f16_to_f32(bits); }

  template <typename Use>
  static void signed_bytes(const std::int8_t* bytes, const Use& use) {
    for (int i = 0; i < 16; i += kLanes) {
      Vec v;
      for (int j = 0; j < kLanes; ++j) v[j] = bytes[i + j];
      use(i, v);
    }
  }

  template <int B, int P>
  using TrellisDecoder = WindowDecoder<Portable, B, P>;

  template <int B>
  using Additive = AdditiveDecoder<Portable, B>;

  template <int P>
  static Vec look_up(const float* points, const std::uint16_t*, const std::uint32_t* windows) {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = points[windows[i / P] * P + i % P];
    return v;
  }

  template <int B, int P>
  struct Decoder {
    static constexpr int kTableBits = kSigned<B, P> ? B - P : B;
    explicit Decoder(const PackedView& w) : points(w.format.grid->points.data()) {}
    const float* points;

    template <typename Sink>
    void chunk(const std::uint8_t* bytes, int count, const Sink& sink) const {
      float values[P * kChunk];
      std::uint32_t window = 0;
      int filled = 0;
      for (int i = 0; i < count; ++i) {
        for (; filled < B; filled += 8) window |= static_cast<std::uint32_t>(*bytes++) << filled;
        const std::uint32_t index = window & ((1u << B) - 1);
        window >>= B;
        filled -= B;
        for (int c = 0; c < P; ++c) {
          const float point = points[(index & ((1u << kTableBits) - 1)) * P + c];
          const std::uint32_t sign = kSigned<B, P> ? index >> kTableBits >> c << 31 : 0;
          values[i * P + c] = std::bit_cast<float>(std::bit_cast<std::uint32_t>(point) ^ sign);
        }
      }
      for (int offset = 0; offset < count * P; offset += kLanes) sink(offset, load(values + offset));
    }
  };
};

}  // namespace

const Kernels kPortableKernels = {0,
                                  kLanes,
                                  transform_blocks,
                                  nearest_group,
                                  sum_of_products,
                                  encode_runs,
                                  dot_rows_any<Portable>,
                                  dot_tile_any<Portable>};

}  // namespace higgs::detail
