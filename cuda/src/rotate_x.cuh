// Rotation of x on the tensor cores, inside the decode kernel and, with other column bits in the places of these, in
// pack_x: 1024 columns of a row by one warp, no shared memory, no shuffles. The Hadamard matrix of a block is a
// Kronecker product over column bits; a 16 x 16 factor is the A operand of an MMA, and the result of one MMA is, packed
// to 16 bits, the B operand of the next:
//
//   load       lane 4 g + t holds, for j = 0..7, columns 128 j + 16 g + 4 t .. + 3: times d, rounded to T
//   MMA 1      column bits 0-3 (k: t and the register), for every j; columns bits 4-6 are n
//   MMA 2      column bits 4-7 (k: t, register and j bit 0), for every j / 2; column bits 0-3 are n and the register
//   butterfly  column bits 8-9 across registers, fp32 (of half a chunk bit 9 before MMA 1, see Rotation)
//   store      lane 4 g + t holds columns 256 j' + 128 c + 16 g + 4 t .. + 3: 8 bytes, 256 consecutive per warp
//
// Bits beyond the Hadamard block get an identity factor. Against a rotation in fp32 this adds two roundings to T: that
// of x * d (exact without column scales and sums of halves) and that between the MMAs.
#pragma once

#include <type_traits>
#include <utility>

#include "fwht.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace higgs::cuda {

template <typename T>
__device__ __forceinline__ uint32_t pack2(float lo, float hi);
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float lo, float hi) {
  const __half2 v = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&v);
}
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float lo, float hi) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<const uint32_t*>(&v);
}

template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t v);
template <>
__device__ __forceinline__ float2 unpack2<__half>(uint32_t v) {
  return __half22float2(*reinterpret_cast<const __half2*>(&v));
}
template <>
__device__ __forceinline__ float2 unpack2<__nv_bfloat16>(uint32_t v) {
  return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
}

// Rotated x in shared memory. Within 32 columns, those of lane t for two MMA steps are neighbours (columns 4 t .. + 3
// and 16 + 4 t .. + 3). Rows are 64 bytes apart modulo 128: the 16-byte fragment loads of a quarter-warp (2 rows x 4
// lanes) cover all banks.
__host__ __device__ constexpr int xs_stride(int chunks) { return chunks * kChunk + 32; }

// The A operand: Hadamard over the lowest `bits` (1 to 4) of four bits, identity over the others, times `one` (T
// twice). Rows g, g + 8; columns 2 t, 2 t + 1, + 8: the four bits of a row and of a column mean the same column bits of
// x.
__device__ __forceinline__ void hadamard_fragment(int bits, int lane, uint32_t one, uint32_t (&a)[4]) {
  const int g = lane / 4;
  const int column = lane % 4 * 2;
  const int common = g & column & ((1 << bits) - 1);
  const uint32_t odd = (common ^ (common >> 1) ^ (common >> 2)) & 1u;  // sign of (g, column)
  const uint32_t odd_next = odd ^ (g & 1u);                            // of (g, column + 1)
  uint32_t low = one | odd << 15 | odd_next << 31;
  if (bits <= 2 && ((g ^ column) & (bits == 1 ? 6 : 4)) != 0) low = 0;
  a[0] = low;
  // A register each, although some are equal: the compiler must not know, or it copies them before every MMA.
  uint32_t zero;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(zero));
  zero ^= static_cast<uint32_t>(lane);
  a[1] = (bits == 4 ? low : 0) ^ zero;
  a[2] = (bits == 4 ? low : 0) + zero;
  a[3] = bits == 4 ? low ^ 0x80008000u : low;
}

// The same over all four bits, of which 1 and 3 have changed places in the rows.
__device__ __forceinline__ void crossed_hadamard_fragment(int lane, uint32_t one, uint32_t (&a)[4]) {
  const uint32_t odd = lane >> 4 & lane >> 1 & 1;  // bit 2 of row and column
  const uint32_t row_flips = (lane & 1) * 0x80008000u;
  const uint32_t column_flips = (lane >> 3 & 1) * 0x80008000u;
  a[0] = one | odd << 15 | (odd ^ (lane >> 2 & 1)) << 31;
  a[1] = a[0] ^ row_flips;
  a[2] = a[0] ^ column_flips;
  a[3] = a[0] ^ row_flips ^ column_flips;
}

// y[pair] = both factors times b[2 pair], b[2 pair + 1], the second's upper column bit.
template <typename T, int kPairs>
__device__ __forceinline__ void multiply_factors(const uint32_t (&first)[4], const uint32_t (&second)[4],
                                                 const uint2 (&b)[2 * kPairs], float (&y)[kPairs][2][4]) {
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
    float mid[2][4] = {};
    mma_m16n8k16<T>(mid[0], first, b[2 * pair]);
    mma_m16n8k16<T>(mid[1], first, b[2 * pair + 1]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (float& value : y[pair][h]) value = 0;
      mma_m16n8k16<T>(y[pair][h], second,
                      {pack2<T>(mid[0][2 * h], mid[0][2 * h + 1]), pack2<T>(mid[1][2 * h], mid[1][2 * h + 1])});
    }
  }
}

// A butterfly over a bit of `pair`.
template <int kStride, int kPairs>
__device__ __forceinline__ void across_pairs(float (&y)[kPairs][2][4]) {
#pragma unroll
  for (int i = 0; i < 8 * kPairs; ++i) {
    const int pair = i / 8;
    if ((pair & kStride) != 0) continue;
    const float a = y[pair][i / 4 % 2][i % 4];
    const float b = y[pair | kStride][i / 4 % 2][i % 4];
    y[pair][i / 4 % 2][i % 4] = a + b;
    y[pair | kStride][i / 4 % 2][i % 4] = a - b;
  }
}

// The norm 1 / sqrt(block) is split: 1/4 in the first factor, a power of two in the second, and for blocks of 128 and
// 512 sqrt(1/2) in remaining_norm() (gemv_params.h), which goes into the weights' scales.
template <typename T>
inline constexpr uint32_t kHalves = std::is_same_v<T, __half> ? 0x38003800u : 0x3f003f00u;
template <typename T>
inline constexpr uint32_t kExponents = std::is_same_v<T, __half> ? 0x04000400u : 0x00800080u;  // a factor of two

// Of a whole chunk (four pairs of 128 columns) or, in fewer instructions, of half of one: in blocks of 1024 a half of
// the result comes from the sum or the difference of both halves of x.
template <typename T, int kPairs = 4>
struct Rotation {
  static constexpr int kColumns = 256 * kPairs;
  static constexpr bool kHalf = kPairs == 2;
  static constexpr bool kHalvesSums = kHalf && std::is_same_v<T, __half>;  // they might be too large for fp16

  uint32_t first[4];   // column bits 0-3
  uint32_t second[4];  // column bits 4-7
  int block;

  __device__ __forceinline__ Rotation(int block, int lane) : block(block) {
    uint32_t one = kHalves<T>;
    hadamard_fragment(4, lane, one - kExponents<T>, first);
    if (block >= 256) one -= kExponents<T>;
    if (block >= 1024 && !kHalvesSums) one -= kExponents<T>;
    hadamard_fragment(block == 64 ? 2 : block == 128 ? 3 : 4, lane, one, second);
  }

  static __device__ __forceinline__ int first_column(int lane) { return lane / 4 * 16 + lane % 4 * 4; }
  // From a lane's first rotated columns to where they are stored: pieces of 32 columns, kPiece apart.
  template <int kPiece>
  static __device__ __forceinline__ int first_place(int lane) {
    return lane / 8 * kPiece + lane % 4 * 8 + lane / 4 % 2 * 4;
  }

  // d[j] = p[128 j + first_column + 0..3] of the columns to be rotated, `count` from p on. Of half a chunk, the upper
  // one if `upper`, those of the other half follow.
  static constexpr int kLoads = 8;
  __device__ __forceinline__ void load_d(const float* p, int count, bool upper, int lane, float4 (&d)[kLoads]) const {
    load_all(reinterpret_cast<const float4*>(p + first_column(lane)), count, upper, lane, d,
             std::make_integer_sequence<int, 2 * kPairs>());
  }
  __device__ __forceinline__ void load_x(const T* x, int count, bool upper, int lane, uint2 (&raw)[kLoads]) const {
    load_all(reinterpret_cast<const uint2*>(x + first_column(lane)), count, upper, lane, raw,
             std::make_integer_sequence<int, 2 * kPairs>());
  }
  template <typename V, int... kJ>
  __device__ __forceinline__ void load_all(const V* p, int count, bool upper, int lane, V (&out)[kLoads],
                                           std::integer_sequence<int, kJ...> /*j*/) const {
    if (count >= kColumns) {  // apart, as it takes half the instructions
      (load_if<kJ * 32>(true, p, out[kJ]), ...);
    } else {
      (load_if<kJ * 32>(kJ * 128 < count - first_column(lane), p, out[kJ]), ...);
    }
    if constexpr (kHalf) {
      if (block == kChunk) {
        const V* other = p + (upper ? -kColumns : kColumns) / 4;
        (load_if<kJ * 32>(true, other, out[2 * kPairs + kJ]), ...);
      } else {
        ((out[2 * kPairs + kJ] = {}), ...);
      }
    }
  }

  // x times d, the B operand of the first MMAs.
  __device__ __forceinline__ void multiply(const uint2 (&raw)[kLoads], const float4 (&d)[kLoads], bool upper,
                                           uint2 (&b)[2 * kPairs]) const {
    const uint32_t flips = kHalf && upper && block == kChunk ? 0x80008000u : 0;
#pragma unroll
    for (int j = 0; j < 2 * kPairs; ++j) {
      float4 v = times({}, raw[j], flips, d[j]);
      if constexpr (kHalf) v = times(v, raw[2 * kPairs + j], 0, d[2 * kPairs + j]);
      if constexpr (kHalvesSums) {
        const float half = block == kChunk ? 0.5f : 1.0f;
        v = {v.x * half, v.y * half, v.z * half, v.w * half};
      }
      b[j] = {pack2<T>(v.x, v.y), pack2<T>(v.z, v.w)};
    }
  }
  // sum + x d, with signs of x flipped.
  static __device__ __forceinline__ float4 times(float4 sum, uint2 x, uint32_t flips, float4 d) {
    const float2 lo = unpack2<T>(x.x ^ flips);
    const float2 hi = unpack2<T>(x.y ^ flips);
    return {fmaf(lo.x, d.x, sum.x), fmaf(lo.y, d.y, sum.y), fmaf(hi.x, d.z, sum.z), fmaf(hi.y, d.w, sum.w)};
  }

  __device__ __forceinline__ void rotate(const uint2 (&b)[2 * kPairs], T* out, int lane) const {
    float y[kPairs][2][4];
    rotate(b, y);
    store<32>(y, out, lane);
  }
  template <int kPiece>
  static __device__ __forceinline__ void store(const float (&y)[kPairs][2][4], T* out, int lane) {
#pragma unroll
    for (int i = 0; i < 2 * kPairs; ++i) {
      const auto& part = y[i / 2];
      const int c = i % 2 * 2;
      *reinterpret_cast<uint2*>(out + 4 * i * kPiece + first_place<kPiece>(lane)) = {
          pack2<T>(part[0][c], part[0][c + 1]), pack2<T>(part[1][c], part[1][c + 1])};
    }
  }
  // To y[pair][h][2 c + e]: columns 256 pair + 128 c + first_column + 2 h + e.
  __device__ __forceinline__ void rotate(const uint2 (&b)[2 * kPairs], float (&y)[kPairs][2][4]) const {
    multiply_factors<T>(first, second, b, y);
    if (!kHalf && block > 512) {  // not one after the other, which would take moves of what the second one changes
      across_pairs<1>(y);
      across_pairs<kPairs / 2>(y);
    } else if (block > 256) {
      across_pairs<1>(y);
    }
  }
};

}  // namespace higgs::cuda
