// Additive trellis grids on the GPU: from the words of a unit to tensor-core operands.
//
// A run is what a lane holds of one row of a unit of 256 columns: columns 16 s + 4 t + {0..3}, steps s = 0..15, which
// are 32 steps of the trellis, two weights each. Step i reads the window w_i, 8 bits from bit `Bits` * i of the run's
// circular stream, and its weights are T1[w_i] + T2[w_(i - Shift)]. A table entry has four bytes, T1[w] and T2[w], and
// meets two pieces of x at once in the integer MMA: that of step i and that of step i + Shift. So decoding two weights
// is one look-up, like for a vector grid.
//
// Words. The windows of even steps 2 s lie in whole bytes, in order: byte s % 4 of word `even[s / 4]`. Odd windows are
// put together four at a time, in the same places of `odd`: a window shares 8 - Bits bits with the one before, its
// lowest, and as many with the one after, its highest. In the byte the lowest are bits 0.. and the highest are bits 4..
// (window_bit; entries of the table are in that order), so that one shift of the even words by 4 brings both there. The
// 2 Bits - 8 bits between them are stored: `rest`. The word after even[3] is even[0]: the stream is circular.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "decode.cuh"
#include "rotate_x.cuh"

namespace higgs::cuda {

inline constexpr int kRunWords = 4;   // of even windows, and of odd ones
inline constexpr int kRunSteps = 16;  // MMA steps of a unit
inline constexpr int kTrellisColumns = 256;

constexpr uint32_t bytes_of(uint32_t b) { return b * 0x01010101u; }

// Where bit b of a window is in its byte.
__host__ __device__ constexpr int window_bit(int bits, int b) {
  const int shared = 8 - bits;
  const int half = 4 - shared;  // of the middle
  if (b < shared) return b;
  if (b >= bits) return b - bits + 4;
  return b < shared + half ? b : b - half + 4;
}

// Where bit b of the rest of step s = 4 i + j is among the rest words of a row: bit 8 j + `bit` of word `word`.
struct RestPlace {
  int word;
  int bit;
};
template <int Bits>
__host__ __device__ constexpr RestPlace rest_place(int i, int b) {
  const int bit = window_bit(Bits, 8 - Bits + b);
  if (Bits == 8) return {i, bit};
  if (Bits == 7) return i < 3 ? RestPlace{i, bit} : RestPlace{bit % 4 - 1, bit / 4 * 4};
  if (Bits == 6) return {i / 2, bit - i % 2 * 2};
  return {0, bit - i};  // 5
}

// Windows of one row of a unit, from its words: four even words, then the rest.
template <int Bits>
struct RunWindows {
  static_assert(Bits >= 4 && Bits <= 8);
  uint32_t even[kRunWords];
  uint32_t odd[kRunWords];

  // word(i): word i of the row
  template <typename Word>
  __device__ __forceinline__ explicit RunWindows(const Word& word) {
    constexpr uint32_t kShared = bytes_of(((1 << (8 - Bits)) - 1) * 0x11);
#pragma unroll
    for (int i = 0; i < kRunWords; ++i) even[i] = word(i);
#pragma unroll
    for (int i = 0; i < kRunWords; ++i) {
      const uint32_t shared = __funnelshift_r(even[i], even[(i + 1) % kRunWords], 4);
      if constexpr (Bits == 4) {
        odd[i] = shared;
      } else if constexpr (Bits == 8) {
        odd[i] = word(4 + i);
      } else {
        odd[i] = select(kShared, shared, rest(i, word));
      }
    }
  }
  // Window `window` of 32: byte step % 4 of this word, where step = window / 2.
  [[nodiscard]] __device__ __forceinline__ uint32_t word_of(int window) const {
    return window % 2 == 0 ? even[window / 8] : odd[window / 8];
  }

 private:
  // The middle of odd windows, other bits undefined.
  template <typename Word>
  static __device__ __forceinline__ uint32_t rest(int i, const Word& word) {
    if constexpr (Bits == 5) {
      return word(4) << i;
    } else if constexpr (Bits == 6) {
      return word(4 + i / 2) << (i % 2 * 2);
    } else {
      if (i < 3) return word(4 + i);
      return select(bytes_of(0x22), word(4) << 1, select(bytes_of(0x44), word(5) << 2, word(6) << 3));
    }
  }
};

// Two weights of a step, T1 of entry `e` plus T2 of `before`, in multiples of kUnit. Entries are bytes T1 + 128 and
// 128 - T2, from the table with offsets. One of two operands of a permutation can be a constant without a register:
// here the selector.
template <typename T>
struct WindowPair;
template <>
struct WindowPair<__half> {
  static constexpr float kUnit = 0x1p-24f;  // bytes are subnormal fp16 numbers
  static __device__ __forceinline__ uint32_t sum(uint32_t e, uint32_t before) {
    const uint32_t first = __byte_perm(e, 0, 0x4140);
    const uint32_t second = __byte_perm(before, 0, 0x4342);
    const __half2 sum = __hsub2(*reinterpret_cast<const __half2*>(&first), *reinterpret_cast<const __half2*>(&second));
    return *reinterpret_cast<const uint32_t*>(&sum);
  }
};
template <>
struct WindowPair<__nv_bfloat16> {
  static constexpr float kUnit = 0x1p-6f;  // bytes are multiples of 2^-133, times 2^127: products must not vanish
  static __device__ __forceinline__ uint32_t sum(uint32_t e, uint32_t before) {
    constexpr uint32_t kScale = 0x7f007f00u;
    constexpr uint32_t kMinus = 0xff00ff00u;
    const uint32_t first = __byte_perm(e, 0, 0x4140);
    const uint32_t second = __byte_perm(before, 0, 0x4342);
    uint32_t v;
    asm("{.reg .b32 t;\nmul.rn.bf16x2 t, %2, %4;\nfma.rn.bf16x2 %0, %1, %3, t;\n}"
        : "=r"(v)
        : "r"(first), "r"(second), "r"(kScale), "r"(kMinus));
    return v;
  }
};

// The windows of a unit of 256 columns, rows g and g + 8, and their entries in a table of bytes.
template <int Bits>
struct TrellisWindows {
  static constexpr FieldShape kShape{Bits, 2, trellis_shift(Bits)};
  using Table = ByteTable<8>;

  RunWindows<Bits> rows[2];

  __device__ __forceinline__ explicit TrellisWindows(const uint32_t (&w)[2 * Bits])
      : rows{RunWindows<Bits>([&](int i) { return w[2 * i]; }), RunWindows<Bits>([&](int i) { return w[2 * i + 1]; })} {
  }
  static __device__ __forceinline__ uint32_t lane_offset(int lane) { return lane * 4; }

  // Window `window` of 32.
  template <typename SharedTable>
  __device__ __forceinline__ uint32_t entry(int window, int r, SharedTable table, uint32_t offset) const {
    return look_up(table, byte_address(rows[r].word_of(window), window / 2 % 4, offset));
  }
};

// A decoder as those of decode.cuh, from the table with offsets, steps in order; in multiples of WindowPair's kUnit.
// Instructions for two weights: PRMT LDS, 3 (fp16) or 4 (bf16) for the sum, 0.1-0.4 to put odd windows together.
template <int Bits>
struct TrellisDecoder : TrellisWindows<Bits> {
  static constexpr int kShift = trellis_shift(Bits);
  static constexpr bool kIntegers = false;

  using TrellisWindows<Bits>::TrellisWindows;

  template <typename T>
  __device__ __forceinline__ void fragment(int step, SharedWindow<T> table, uint32_t offset, uint32_t (&a)[4]) {
    fragment_as<T>(step, table, offset, a);
  }
  __device__ __forceinline__ void fragment(int step, const uint8_t* table, uint32_t offset, uint32_t (&a)[4]) {
    fragment_as<__half>(step, table, offset, a);
  }

 private:
  template <typename T, typename SharedTable>
  __device__ __forceinline__ void fragment_as(int step, SharedTable table, uint32_t offset, uint32_t (&a)[4]) {
    if (step == 0) {  // the run is circular
#pragma unroll
      for (int i = 0; i < kShift; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) before_[i][r] = this->entry(2 * kRunSteps - kShift + i, r, table, offset);
      }
    }
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t e = this->entry(2 * step + odd, r, table, offset);
        a[2 * odd + r] = WindowPair<T>::sum(e, before_[0][r]);
#pragma unroll
        for (int i = 0; i + 1 < kShift; ++i) before_[i][r] = before_[i + 1][r];
        before_[kShift - 1][r] = e;
      }
    }
  }

  uint32_t before_[kShift][2];  // entries of the last windows, the oldest first
};

// The same for the integer MMA, 16 x 32 for a step of 32 columns, from sums of entries: unsigned bytes, weights as they
// are plus 2 * kTrellisOffset. Words of entries are added as they are, T1 and T2 of window i to T2 of window i - Shift
// and T1 of window i + Shift: the weights of steps i and i + Shift. No byte carries into the next.
struct SumTable : ByteTable<8> {
  static __device__ __forceinline__ uint32_t prepared(uint32_t entry) {
    return (entry ^ bytes_of(0x80)) - bytes_of(0x80 - kTrellisOffset);
  }
};
template <int Bits>
struct SumTrellisDecoder : TrellisWindows<Bits> {
  static constexpr int kShift = trellis_shift(Bits);
  static constexpr bool kIntegers = true;
  static constexpr float kHalfUnit = -4.0f * kTrellisOffset;  // what every weight has too much, in halves
  using Table = SumTable;

  using TrellisWindows<Bits>::TrellisWindows;

  // Columns are in order if Shift is 1; if it is 2, words of 16 columns and of the next 16 have exchanged halves
  // (FieldShape::crossed).
  template <typename SharedTable>
  __device__ __forceinline__ void fragment(int step, SharedTable table, uint32_t offset, uint32_t (&a)[4]) {
    constexpr int kWindows = 2 * kRunSteps;
    if (step == 0) {  // the run is circular
#pragma unroll
      for (int i = 0; i < kShift; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          before_[i][r] = last_[i][r] = this->entry(kWindows - kShift + i, r, table, offset);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int window = 4 * step + i * (3 - kShift);
      const int chain = i * (kShift - 1);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t e = this->entry(window, r, table, offset);
        const uint32_t after =
            window + 2 * kShift >= kWindows ? last_[chain][r] : this->entry(window + kShift, r, table, offset);
        a[2 * i + r] = e + __byte_perm(before_[chain][r], after, 0x5432);
        before_[chain][r] = after;
      }
    }
  }

 private:
  uint32_t before_[kShift][2];  // entries of the last windows that came after
  uint32_t last_[kShift][2];    // and of the run's last ones
};

// d += a b in integers: a 16 x 32, b 32 x 8 signed bytes.
__device__ __forceinline__ void mma_m16n8k32(int (&d)[4], const uint32_t (&a)[4], uint2 b) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

// x of a lane for the steps of a unit: byte c of word s is a digit of column 16 s + 4 t + c. A window meets two pieces
// of x, of two columns each; those of half of all windows make a word as they come (Shift 1) or when two words have
// exchanged halves (Shift 2). So two steps are multiplied together: product 0 has the windows that meet words as they
// are, product 1 those that meet halves of two words.
template <int Shift>
__host__ __device__ constexpr int window_of_product(int step, int product, int second) {  // step: even
  return 2 * step + (product == 0 ? second * (3 - Shift) : second == 0 ? Shift : 3);
}
template <int Shift>
__device__ __forceinline__ void order_pieces(uint32_t (&x)[kRunSteps]) {
  static_assert(Shift == 1 || Shift == 2);
  if constexpr (Shift == 2) {
#pragma unroll
    for (int s = 0; s < kRunSteps; s += 2) {
      const uint32_t even = __byte_perm(x[s], x[s + 1], 0x5410);
      x[s + 1] = __byte_perm(x[s], x[s + 1], 0x7632);
      x[s] = even;
    }
  }
}
// Here: volatile, as moved out of a loop the results would take more registers than there are.
template <bool Here>
__device__ __forceinline__ uint32_t halves_of(uint32_t a, uint32_t b) {
  if constexpr (!Here) return __byte_perm(a, b, 0x5432);
  uint32_t v;
  asm volatile("prmt.b32 %0, %1, %2, 0x5432;" : "=r"(v) : "r"(a), "r"(b));
  return v;
}
// The B operand of a product of steps s and s + 1.
template <int Shift, bool Here>
__device__ __forceinline__ uint2 x_operand(const uint32_t (&x)[kRunSteps], int s, int product) {
  if (product == 0) return {x[s], x[s + 1]};
  return {halves_of<Here>(x[s], x[(s + Shift) % kRunSteps]), halves_of<Here>(x[s + 1], x[(s + 1 + Shift) % kRunSteps])};
}

// --- rotated x in shared memory -------------------------------------------------------------------------------------
//
// A chunk (1024 columns, in the decode kernel half of them) is rounded to multiples of a scale of its own: to integers
// of 16 bits, or to fp16. Both take 2 plane_bytes(chunks) per row of x.
__host__ __device__ constexpr int plane_bytes(int chunks) { return chunks * kChunk + 64; }

__device__ __forceinline__ float max_or_nan(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
}

// y as Rotation::rotate leaves it: columns 128 j + first_column(lane) + i in y[j / 2][i / 2][j % 2 * 2 + i % 2]. Stores
// the columns' scale for a greatest value `most_value`, over `unit`, and returns its inverse.
template <int kPairs>
__device__ __forceinline__ float chunk_scale(const float (&y)[kPairs][2][4], float most_value, float unit, float* scale,
                                             int lane) {
  float of_lane[kPairs] = {};  // short chains instead of a long one
#pragma unroll
  for (int i = 0; i < 8 * kPairs; ++i) of_lane[i / 8] = max_or_nan(of_lane[i / 8], fabsf(y[i / 8][i / 4 % 2][i % 4]));
  float greatest = of_lane[0];
#pragma unroll
  for (int i = 1; i < kPairs; ++i) greatest = max_or_nan(greatest, of_lane[i]);
  // Floats that are not negative are in the order of their bits, NaN last.
  const float most = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(greatest)));
  if (lane == 0) *scale = most * (1 / (most_value * unit));
  return most > 1e-30f ? __fdividef(most_value, most) : 0.0f;
}

// Digits of four values: integers 256 hi + lo, in signed bytes {hi, lo}.
__device__ __forceinline__ uint2 digits_of(const float (&values)[4], float inverse) {
  constexpr float kMagic = 12582912.0f + 128.0f;  // the integer in the low bits, plus 128: byte 1 is hi
  uint32_t v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = __float_as_uint(fmaf(values[i], inverse, kMagic));
  const uint32_t a = __byte_perm(v[0], v[1], 0x5140);  // lo, lo, hi, hi
  const uint32_t b = __byte_perm(v[2], v[3], 0x5140);
  return {__byte_perm(a, b, 0x7632), __byte_perm(a, b, 0x5410) ^ 0x80808080u};
}
inline constexpr float kMostDigits = 127 * 256.0f;

// Digits 256 hi + lo of the columns, by store(j, {hi, lo}) for columns 128 j + first_column(lane) + 0..3. Their scale
// goes to `scale` or, with half the sum of x as the products see it for each of kHalfParts parts of these columns, to
// store_half(part, scale, half sum). unit: of the values, 1 over it.
template <int kHalfParts, int kPairs, typename Store, typename StoreHalf>
__device__ __forceinline__ void make_digits(const float (&y)[kPairs][2][4], float unit, float* scale, int lane,
                                            const Store& store, const StoreHalf& store_half) {
  float own = 0;  // of lane 0
  const float inverse = chunk_scale(y, kMostDigits, unit, kHalfParts > 0 ? &own : scale, lane);
  int sums[2][kHalfParts > 0 ? kHalfParts : 1] = {};  // of either digit
#pragma unroll
  for (int j = 0; j < 2 * kPairs; ++j) {
    const auto& part = y[j / 2];
    const int c = j % 2 * 2;
    const uint2 digits = digits_of({part[0][c], part[0][c + 1], part[1][c], part[1][c + 1]}, inverse);
    store(j, digits);
    if constexpr (kHalfParts > 0) {
      constexpr int kOnes = 0x01010101;
      const int p = j * kHalfParts / (2 * kPairs);
      sums[0][p] = __dp4a(static_cast<int>(digits.x), kOnes, sums[0][p]);
      sums[1][p] = __dp4a(static_cast<int>(digits.y), kOnes, sums[1][p]);
    }
  }
#pragma unroll
  for (int p = 0; p < kHalfParts; ++p) {
    const int sum = __reduce_add_sync(~0u, 256 * sums[0][p] + sums[1][p]);
    if (lane == 0) store_half(p, own, 0.5f * own * static_cast<float>(sum));
  }
}

// Two planes of bytes per row. Within 64 columns, those of lane t for four MMA steps are neighbours: byte
// 16 t + 4 s + c. A plane is 64 bytes longer than its chunks, so that the 16-byte loads of two planes meet different
// banks.
//
// With halves, an entry of `scales` is {scale, half the sum of x} and there is one for each part of these columns,
// `step` entries apart.
template <int kPieceBytes = 64, int kHalfParts = 0, int kPairs>
__device__ __forceinline__ void store_digits(const float (&y)[kPairs][2][4], uint8_t* hi, uint8_t* lo, float* scales,
                                             int entry, int step, int lane) {
  const int place = lane / 16 * kPieceBytes + lane % 4 * 16 + lane / 4 % 4 * 4;
  const auto store = [&](int j, uint2 digits) {
    *reinterpret_cast<uint32_t*>(lo + 2 * j * kPieceBytes + place) = digits.y;
    *reinterpret_cast<uint32_t*>(hi + 2 * j * kPieceBytes + place) = digits.x;
  };
  make_digits<kHalfParts>(y, 1, scales + entry, lane, store, [&](int p, float scale, float half) {
    reinterpret_cast<float2*>(scales)[entry + p * step] = {scale, half};
  });
}

// fp16, in the order of Rotation::rotate.
__device__ __forceinline__ void store_halves(const float (&y)[4][2][4], __half* out, float* scale, int lane) {
  const float inverse = chunk_scale(y, 2048.0f, WindowPair<__half>::kUnit, scale, lane);
  const int place = Rotation<__half>::first_place<32>(lane);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const auto& part = y[j / 2];
    const int c = j % 2 * 2;
    *reinterpret_cast<uint2*>(out + 128 * j + place) = {pack2<__half>(part[0][c] * inverse, part[0][c + 1] * inverse),
                                                        pack2<__half>(part[1][c] * inverse, part[1][c + 1] * inverse)};
  }
}

}  // namespace higgs::cuda
