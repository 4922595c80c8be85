// Compile-time shape of a decode kernel instance.
#pragma once

#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "decode.cuh"
#include "gemv_params.h"

namespace higgs::cuda {

// See gemv.cuh. Halves: token_tiles = 1 (m <= 8) or 2 (m <= 16; not held, for want of registers). Bytes: 1 (m <= 4), 2
// (m <= 8) or 4 (m <= 16; not held). Prepared loops hold 16 rows: see kWide.
enum class Loop { general, held, paired, prepared };

template <typename Decoder_, typename T_, int TokenTiles_, Loop kLoop>
struct GemvConfig {
  using Decoder = Decoder_;
  using T = T_;
  static constexpr bool kBytes = uses_bytes(Decoder::kShape, kLoop != Loop::general);
  static constexpr int kDigits = kBytes ? 2 : 1;  // of a row of x: columns of the MMA
  static constexpr int kTokenTiles = TokenTiles_;
  static constexpr int kTokens = 8 / kDigits;  // rows of x in a token tile
  static constexpr int kLaneTokens = 2 / kDigits;
  static constexpr int kPieces = kUnitColumns * 2 / kDigits / 64;  // of 64 bytes, of a unit of a row of x
  // Tables in the tiled buffer: fp16, bf16, bytes, then the scales.
  static constexpr int kTableIndex = kBytes ? 2 : std::is_same_v<T_, __half> ? 0 : 1;
  static constexpr int kTableOffset = kTableIndex * Decoder::kShape.value_table_bytes();
  static constexpr int kScalesOffset = 2 * Decoder::kShape.value_table_bytes() + Decoder::kShape.byte_tables_bytes();
  using TablePlace = std::conditional_t<kLoop == Loop::prepared, SharedStart, const uint8_t*>;
  using Table = std::conditional_t<kBytes, ByteTable<Decoder::kShape.entry_bits()>, Decoder>;
  static constexpr bool kRegular = kLoop != Loop::general;
  static constexpr int kUnitWords = Decoder::kShape.unit_words();
  static constexpr bool kPaired = kLoop == Loop::paired;
  static constexpr bool kPrepared = kLoop == Loop::prepared;
  // x of 16 rows takes 128 registers: eight warps fill a multiprocessor. A scheduler has but two of them to hide
  // latencies, so words come a round before they are needed.
  static constexpr bool kWide = kPrepared && wide_loop(Decoder::kShape, kTokens* TokenTiles_);
  static constexpr int kMaxThreads = kLoop == Loop::general || kWide ? 256 : 512;
  static constexpr int kCtas = kLoop == Loop::general ? 2 : 1;  // of a multiprocessor: 128 registers, wide 255
  static constexpr int kUnits =
      kPrepared ? prepared_units(Decoder::kShape, kTokens* TokenTiles_) : iteration_units(Decoder::kShape, kPaired);
  static constexpr int kHalfParts = half_parts(adds_halves(Decoder::kShape, kLoop != Loop::general), kUnits);
  static constexpr bool kHalves = kHalfParts > 0;
  static constexpr int kRotatedColumns = rotated_columns(Decoder::kShape);
  static constexpr int kScaleColumns = kHalves ? kUnits * kUnitColumns : kRotatedColumns;  // of x with one scale
  // Short rounds: scales come from memory a round before they are needed.
  static constexpr bool kEarlyScales = kPrepared && kTokens * TokenTiles_ > 8;
  static constexpr int kTiles = kPrepared ? 1 : block_tiles(Decoder::kShape, kPaired);
  static constexpr int kLoads = (kUnits * kUnitWords + 3) / 4;  // per row tile
  static constexpr bool kHeld = kLoop == Loop::held || kPrepared;
  // Rows of x that a warp rotates at a time: two where there may be many, unless registers spill.
  static constexpr int kRotatedRows = kHeld && kUnits == 4 && kTokens * TokenTiles_ == 8 && !kHalves ? 2 : 1;
  // Scales of x stay in registers, too.
  static constexpr bool kHoldsScales = kPrepared || (kHeld && kHalves);
  // Loads in flight per row tile: all, where eight rows of x as digits leave the registers.
  static constexpr bool kWholeWindow = !kHeld || kWide || (kBytes && TokenTiles_ <= 2);
  static constexpr int kWindow = kWholeWindow ? kLoads : std::min(kLoads, held_window(Decoder::kShape));
  // Loads of which the words are taken out of their registers together, so that the next ones begin together, long
  // before they are needed: the assembler tracks loads by few scoreboards, and to wait for the oldest may be to wait
  // for the newest, just begun. 0: one by one; bytes where registers would spill or that was faster.
  static constexpr int kHalfSlice = kLoads % 2 == 0 ? kLoads / 2 : kLoads;
  static constexpr bool kTakes =
      kHeld && 4 * kHalfSlice % kUnitWords == 0 && (!kBytes || kHalves == (TokenTiles_ == 1));
  static constexpr int kTaken = kWide ? kLoads : kTakes ? kHalfSlice : 0;
  // Whether a warp brings the rest of its first slice to the L2 while it waits for x: where memory bounds the loop, and
  // not look-ups.
  static constexpr bool kPrefetchesRest = kHeld && kWindow < kLoads && kUnitWords >= 8;
  static constexpr int kRows = kTiles * kTileRows;
  static constexpr int kPartialStride = kRows + 4;  // floats per x row of a partial sum: spreads x rows over banks
  static_assert(TokenTiles_ == 1 || (TokenTiles_ == 2 && (kBytes || kLoop != Loop::held)) ||
                (TokenTiles_ == 4 && kBytes && kLoop != Loop::held));
  static_assert(kTaken <= kWindow);
  static_assert(sizeof(T_) == 2);
  static_assert(Table::kTableBytes == 65536);
};

// a / b for 0 <= a < 2^16 and b < 2^16, without the integer division sequence: a relative error of 2^-22 does no harm.
__device__ __forceinline__ int small_divide(int a, int b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(static_cast<float>(b)));
  return __float2int_rd((static_cast<float>(a) + 0.5f) * inverse);
}

}  // namespace higgs::cuda
