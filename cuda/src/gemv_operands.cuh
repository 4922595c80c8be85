// What a warp of the decode kernel holds in registers: its role, words, scales, fragments of x, sums. See gemv.cuh.
#pragma once

#include <type_traits>

#include "gemv_config.cuh"
#include "gemv_params.h"
#include "numeric.cuh"
#include "ptx.cuh"
#include "rotate_x.cuh"
#include "trellis.cuh"

namespace higgs::cuda {

// What a warp works on, the same for all its row blocks.
struct WarpRole {
  int lane = 0;
  int slice = 0;
  int units = 0;              // 0: this warp has no columns
  int loads = 0;              // 16-byte loads of the slice and row tile
  int first_group = 0;        // scale group of the slice's first column
  int segments = 0;           // scale groups the slice touches
  uint32_t segment_ends = 0;  // bit h: a scale group (or the slice) ends after half unit h
};

template <typename Config>
__device__ __forceinline__ WarpRole make_role(const GemvParams& p, int slice, int lane) {
  WarpRole role;
  role.lane = lane;
  role.slice = slice;
  if (slice >= p.slices) return role;
  role.units = slice == p.slices - 1 ? p.last_units : p.units_per_slice;
  role.loads = (role.units * Config::kUnitWords + 3) / 4;
  const int first = slice * p.units_per_slice * kUnitColumns;
  role.first_group = small_divide(first / kMinBlock, p.group / kMinBlock);
  if constexpr (!Config::kRegular) {
    for (int h = 0; h < 2 * role.units; ++h) {
      const int end = first + (h + 1) * (kUnitColumns / 2);
      const bool ends = h == 2 * role.units - 1 || (end % p.group == 0 && end < p.k);
      role.segments += ends;
      role.segment_ends |= static_cast<uint32_t>(ends) << h;
    }
  }
  return role;
}

// The row blocks of a warp. Where a row block has no second row tile the first is read twice; those sums are not
// stored.
struct RowBlocks {
  int count;  // 0 if the warp has no columns
  bool odd;   // the last one has no second row tile

  // Distance of the second row tile of row block `i` of the warp.
  __device__ __forceinline__ int second(int i) const { return odd && i == count - 1 ? 0 : 1; }
};

// Scales of a row tile for one slice. Regular: those of rows g and g + 8. Otherwise lane l holds values 4 l .. 4 l + 3
// of [segment][16 rows], to be handed out by shuffles.
template <typename Config>
struct TileScales {
  uint2 raw = {};

  static __device__ __forceinline__ int first(int lane) { return Config::kRegular ? lane / 4 : lane * 4; }
  // s: value first(lane) of the slice's first scale group.
  __device__ __forceinline__ void load(const uint16_t* s, const WarpRole& role) {
    if constexpr (Config::kRegular) {
      raw.x = __ldg(s);
      raw.y = __ldg(s + 8);
    } else if (role.lane * 4 < role.segments * kTileRows) {
      raw = __ldg(reinterpret_cast<const uint2*>(s));
    }
  }
  __device__ __forceinline__ float2 rows(int segment, int lane) const {
    if constexpr (Config::kRegular) {
      return {half_bits(raw.x), half_bits(raw.y)};
    } else {
      const int g = lane / 4;
      const uint32_t shift = (g & 1) * 16;
      float2 out;
      const int source = segment * 4 + g / 4;
      uint32_t lo = __shfl_sync(~0u, raw.x, source), hi = __shfl_sync(~0u, raw.y, source);
      out.x = half_bits(((g & 2) != 0 ? hi : lo) >> shift);
      lo = __shfl_sync(~0u, raw.x, source + 2), hi = __shfl_sync(~0u, raw.y, source + 2);
      out.y = half_bits(((g & 2) != 0 ? hi : lo) >> shift);
      return out;
    }
  }
  static __device__ __forceinline__ float half_bits(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits & 0xffffu)));
  }
};

// The next kWindow 16-byte loads of each row tile, in registers: load i of an iteration lives in q[i % kWindow], and is
// replaced as soon as it has been consumed.
template <typename Config>
struct WordWindow {
  uint4 q[Config::kTiles][Config::kWindow];
  const uint8_t* at;  // this lane's words of the iteration, first row tile
  int to_second;      // bytes from the first row tile of the next iteration's row block to the second
  int left;           // iterations after this one
  int iteration;      // within the row block
  int step;           // held: from an iteration to the next one, in loads of a warp

  // Load i of the iteration at `from`.
  __device__ __forceinline__ void load(int r, int i, const uint8_t* from, const WarpRole& role) {
    if (Config::kRegular || i < role.loads) {
      q[r][i % Config::kWindow] =
          load_streaming(reinterpret_cast<const uint4*>(from + (r == 0 ? 0 : to_second)) + i * kLanes);
    }
  }
  // Load i has been consumed.
  __device__ __forceinline__ void replace(int r, int i, const uint8_t* next, const WarpRole& role) {
    const int ahead = i + Config::kWindow;
    if (ahead < Config::kLoads) {
      load(r, ahead, at, role);
    } else if (left > 0) {
      load(r, ahead - Config::kLoads, next, role);
    }
  }
  __device__ __forceinline__ const uint8_t* next(const GemvPart& part, int iterations) const {
    if constexpr (Config::kHeld) return at + static_cast<long long>(step) * (16 * kLanes);
    const uint8_t* end = at + Config::kLoads * 16 * kLanes;
    return iteration + 1 == iterations ? end + part.to_next_block : end;
  }
  __device__ __forceinline__ void advance(const uint8_t* next, const RowBlocks& blocks, int iterations) {
    at = next;
    --left;
    if (!Config::kHeld && ++iteration == iterations) iteration = 0;
    if (blocks.odd && left == iterations) to_second = 0;
  }
  // Brings to the L2 what the first loads leave of an iteration.
  __device__ __forceinline__ void prefetch_rest(int lane) const {
    constexpr int kLines = Config::kLoads * 16 * kLanes / kLineBytes;
#pragma unroll
    for (int i = 0; i < 2 * kLines; i += kLanes) {
      const int line = Config::kWindow * kLines / Config::kLoads + i + lane;
      if (line < kLines) prefetch_line(at - lane * 16 + line * kLineBytes);
    }
  }
  // Held: the same and what follows, a line a lane, up to the next slice.
  __device__ __forceinline__ void prefetch_ahead(int lane) const {
    constexpr int kFirst = Config::kWindow * 16 * kLanes / kLineBytes;
    constexpr int kLines = Config::kLoads * 16 * kLanes / kLineBytes;
    static_assert(kFirst < kLines && kLines <= kFirst + kLanes);
    const uint8_t* line = at - lane * 16 + (kFirst + lane) * kLineBytes;
    if (kFirst + lane >= kLines) line += static_cast<long long>(step - Config::kLoads) * (16 * kLanes);
    prefetch_line(line);
  }
  // Brings the words of the next iteration to the L2.
  __device__ __forceinline__ void prefetch_next(const GemvPart& part, int iterations, int lane) const {
    constexpr int kLines = Config::kLoads * 16 * kLanes / kLineBytes;  // of a row tile
    const uint8_t* from = next(part, iterations) - lane * 16;
    for (int i = lane; i < Config::kTiles * kLines; i += kLanes)
      prefetch_line(from + i * kLineBytes + (i < kLines ? 0 : to_second - kLines * kLineBytes));
  }
  __device__ __forceinline__ uint32_t word(int r, int i) const {
    const uint4& v = q[r][i / 4 % Config::kWindow];
    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
  }
};

// Row `i` of x of those that a lane has sums for in token tile t.
template <typename Config>
__device__ __forceinline__ int token_of(int t, int i, int lane) {
  return t * Config::kTokens + lane % 4 * Config::kLaneTokens + i;
}

// With bytes: for the columns of an iteration, the scales of the rows of x that a lane has sums for and, where the
// bytes lack halves, what these add.
template <typename Config>
struct XScales {
  float of_tile[Config::kTokenTiles];
  float halves[Config::kTokenTiles];
};

// From those of all rows (store_digits): entry `first` is that of row 0, `step` of them further is the next row's.
// load(pointer) reads.
template <typename Config, typename Load>
__device__ __forceinline__ XScales<Config> load_x_scales(const float* scales, int first, int step, int m, int lane,
                                                         const Load& load) {
  XScales<Config> out;
#pragma unroll
  for (int t = 0; t < Config::kTokenTiles; ++t) {
    const int row = min(token_of<Config>(t, 0, lane), m - 1) * step;
    if constexpr (Config::kHalves) {
      const float2 v = load(reinterpret_cast<const float2*>(scales) + (row + first));
      out.of_tile[t] = v.x;
      out.halves[t] = v.y;
    } else {
      out.of_tile[t] = load(scales + row + first);
    }
  }
  return out;
}

// x of the CTA's columns in shared memory, rotated: fp16 or bf16 (rotate_x.cuh), or two planes of digits per row and
// scales per chunk (trellis.cuh), which come first.
template <typename Config>
struct SharedX {
  static constexpr int kScales = digit_scale_floats(Config::Decoder::kShape, Config::kHalfParts);
  float* scales;  // [m][chunks][kScales], if digits
  uint8_t* rows;
  int chunks;

  __device__ __forceinline__ SharedX(float* at, int m, int chunks)
      : scales(at),
        rows(reinterpret_cast<uint8_t*>(at + (Config::kBytes ? (m * chunks * kScales + 3) / 4 * 4 : 0))),
        chunks(chunks) {}
  // Rows as the tensor cores see them: a digit is one.
  __device__ __forceinline__ int row_bytes() const {
    return Config::kBytes ? plane_bytes(chunks) : xs_stride(chunks) * 2;
  }
  __device__ __forceinline__ uint8_t* row(int r) const { return rows + r * row_bytes(); }
  __device__ __forceinline__ uint8_t* end(int m) const { return row(m * Config::kDigits); }

  __device__ __forceinline__ XScales<Config> scales_of(int column, int m, int lane) const {
    return load_x_scales<Config>(scales, column / Config::kScaleColumns, chunks * kChunk / Config::kScaleColumns, m,
                                 lane, [](const auto* at) { return *at; });
  }

  // The half `half` of the chunks of row r.
  template <typename T>
  __device__ __forceinline__ void store(const Rotation<T, 2>& rotation, const uint2 (&b)[4], int r, int half,
                                        int lane) const {
    const int column = half * rotation.kColumns;
    if constexpr (Config::kBytes) {
      float y[2][2][4];
      rotation.rotate(b, y);
      store_digits<64, Config::kHalfParts / 2>(y, row(2 * r) + column, row(2 * r + 1) + column,
                                               scales + (r * chunks * 2 + half) * (kScales / 2), 0, 1, lane);
    } else {
      rotation.rotate(b, reinterpret_cast<T*>(row(r)) + column, lane);
    }
  }
};

// x as prepare_x leaves it in memory.
template <typename Config>
struct PreparedX {
  const uint4* pieces;  // [token tile][tile_pieces][lane]
  int m;
  int chunks;
  int tile_pieces;

  __device__ __forceinline__ explicit PreparedX(const GemvParams& p)
      : pieces(static_cast<const uint4*>(p.x)),
        m(p.m),
        chunks((p.k + kChunk - 1) / kChunk),
        tile_pieces(chunks * (kChunk / kUnitColumns) * Config::kPieces) {}
  // Whether a row of x (or a digit of one) is the lane's of token tile t.
  __device__ __forceinline__ bool has_row(int t, int lane) const { return t * 8 + lane / 4 < m * Config::kDigits; }
  __device__ __forceinline__ XScales<Config> scales_of(int column, int lane) const {
    if constexpr (!Config::kBytes) return {};
    const auto* scales = reinterpret_cast<const float*>(pieces + (m * Config::kDigits + 7) / 8 * tile_pieces * kLanes);
    const int part = column / Config::kScaleColumns;
    return load_x_scales<Config>(scales, Config::kHalves ? part * m : part, Config::kHalves ? 1 : 2 * chunks, m, lane,
                                 [](const auto* at) { return __ldcg(at); });
  }
};

// The B fragments in pieces of 16 bytes, two MMAs each: of a whole slice in registers, or from shared memory as they
// are needed.
template <typename Config>
struct XFragments {
  static constexpr int kPieceBytes = 64;  // of a row of x
  static constexpr int kUnitBytes = Config::kPieces * kPieceBytes;
  static constexpr int kCount = Config::kHeld ? Config::kUnits * Config::kPieces : 1;
  const uint8_t* from[Config::kTokenTiles];  // the lane's first piece of the iteration
  bool needed[Config::kTokenTiles];          // whether its row is one of x: sums of others are not stored
  uint4 held[Config::kTokenTiles][kCount];

  __device__ __forceinline__ void hold() {
    if constexpr (Config::kHeld) {
#pragma unroll
      for (int t = 0; t < Config::kTokenTiles; ++t) {
        if (!needed[t]) continue;  // and not for every load, as the assembler would have it
#pragma unroll
        for (int i = 0; i < kCount; ++i) held[t][i] = load_shared(from[t] + i * kPieceBytes);
      }
    }
  }
  __device__ __forceinline__ void hold(const PreparedX<Config>& x, int slice, int lane) {
#pragma unroll
    for (int t = 0; t < Config::kTokenTiles; ++t) {
      if (!x.has_row(t, lane)) continue;
      const uint4* piece = x.pieces + (t * x.tile_pieces + slice * kCount) * kLanes + lane;
#pragma unroll
      for (int i = 0; i < kCount; ++i) held[t][i] = load_global_if(true, piece + i * kLanes);
    }
  }
  __device__ __forceinline__ uint4 of(int tile, int unit, int piece) const {
    if constexpr (Config::kHeld) return held[tile][unit * Config::kPieces + piece];
    return *reinterpret_cast<const uint4*>(from[tile] + unit * kUnitBytes + piece * kPieceBytes);
  }
  __device__ __forceinline__ void move(int iterations) {
#pragma unroll
    for (int t = 0; t < Config::kTokenTiles; ++t) from[t] += iterations * Config::kUnits * kUnitBytes;
  }
};

// Sums of a row block, before and after multiplication with the scales. A lane holds rows g and g + 8 of each row tile:
// of two rows of x per token tile (halves), or of the two digits of one row (bytes).
template <typename Config>
struct BlockSums {
  using Acc = std::conditional_t<Config::kBytes, int, float>;
  // Two independent accumulators at least hide the latency of the MMA, four where a scheduler has but two warps.
  static constexpr int kChains = Config::kTiles * Config::kTokenTiles == (Config::kWide ? 2 : 1) ? 2 : 1;
  static constexpr int kLaneTokens = Config::kLaneTokens;
  Acc acc[kChains][Config::kTiles][Config::kTokenTiles][4] = {};
  float sum[Config::kTiles][Config::kTokenTiles][2 * kLaneTokens] = {};

  static_assert(!Config::kBytes || Config::kUnits * kUnitColumns * 128 * 127 * 256LL <= 0x7fffffff);  // exact sums

  // MMA `i`, on row tile r.
  __device__ __forceinline__ void multiply(int i, int r, const uint32_t (&a)[4],
                                           const uint4 (&x)[Config::kTokenTiles]) {
#pragma unroll
    for (int t = 0; t < Config::kTokenTiles; ++t) {
      const uint2 b = i % 2 == 0 ? make_uint2(x[t].x, x[t].y) : make_uint2(x[t].z, x[t].w);
      if constexpr (Config::kBytes) {
        mma_m16n8k32(acc[i % kChains][r][t], a, b);
      } else {
        mma_m16n8k16<typename Config::T>(acc[i % kChains][r][t], a, b);
      }
    }
  }

  // A scale group ends or, with bytes, an iteration.
  __device__ __forceinline__ void flush(const TileScales<Config> (&scales)[Config::kTiles], int segment, float norm,
                                        const XScales<Config>& x, int lane) {
#pragma unroll
    for (int r = 0; r < Config::kTiles; ++r) {
      float2 s = scales[r].rows(segment, lane);
      s.x *= norm;
      s.y *= norm;
#pragma unroll
      for (int t = 0; t < Config::kTokenTiles; ++t) {
        Acc value[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          value[i] = kChains == 2 ? acc[0][r][t][i] + acc[kChains - 1][r][t][i] : acc[0][r][t][i];
#pragma unroll
          for (int c = 0; c < kChains; ++c) acc[c][r][t][i] = 0;
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          const float by = row == 0 ? s.x : s.y;
          if constexpr (Config::kBytes) {
            const float whole = static_cast<float>(256 * value[2 * row] + value[2 * row + 1]);
            const float v = Config::kHalves ? fmaf(whole, x.of_tile[t], x.halves[t]) : whole * x.of_tile[t];
            sum[r][t][row] = fmaf(v, by, sum[r][t][row]);
          } else {
#pragma unroll
            for (int i = 2 * row; i < 2 * row + 2; ++i) sum[r][t][i] = fmaf(value[i], by, sum[r][t][i]);
          }
        }
      }
    }
  }

  // Index in partials [m][kPartialStride] of sum i of token tile t, of row tile 0.
  static __device__ __forceinline__ int place(int t, int i, int lane) {
    return token_of<Config>(t, i, lane) * Config::kPartialStride + lane / 4;
  }
  // store(t, i, offset, value) puts a sum `offset` behind place(t, i, lane).
  template <typename Store>
  __device__ __forceinline__ void write(int m, int lane, const Store& store) const {
#pragma unroll
    for (int t = 0; t < Config::kTokenTiles; ++t) {
#pragma unroll
      for (int i = 0; i < kLaneTokens; ++i) {
        if (token_of<Config>(t, i, lane) >= m) continue;
#pragma unroll
        for (int r = 0; r < Config::kTiles; ++r) {
          store(t, i, r * kTileRows, sum[r][t][i]);
          store(t, i, r * kTileRows + 8, sum[r][t][kLaneTokens + i]);
        }
      }
    }
  }
};

}  // namespace higgs::cuda
