// Decode kernel for additive trellis grids: as gemv.cuh (partition, rotation, reduction), with products of integers.
//
//   bytes   regular: looked-up bytes are the A operand of the integer MMA as they are, two windows' worth in one
//           (trellis.cuh); a row of x takes two columns, the digits of 16-bit integers. All sums within a chunk of x
//           and a scale group are exact
//   halves  not regular: two look-ups make fp16 integers; x in fp16, sums in fp32
//
// x fragments stay in registers: of two units of 256 columns per warp, or one where m > 8. For m > 4 a kernel of its
// own has rotated x (prepare_x.h).
//
// Template values: Decoder = TrellisDecoder of instances.h; T = __half, __nv_bfloat16; Tokens = 4, 8 or 16; Regular:
// every slice is full, inside one scale group and one chunk. Not regular: 16.
#pragma once

#include "gemv.cuh"
#include "trellis.cuh"

namespace higgs::cuda {

template <typename Decoder_, typename T_, int Tokens, bool Regular_>
struct TrellisConfig {
  using T = T_;
  static constexpr FieldShape kShape = Decoder_::kShape;
  static constexpr int kBits = kShape.bits;
  static constexpr int kShift = kShape.shift;
  static constexpr bool kBytes = Regular_;
  static constexpr int kTokenTiles = Tokens / (kBytes ? 4 : 8);  // of 8 columns of the MMA
  static constexpr bool kRegular = Regular_;
  static constexpr bool kPrepared = Regular_ && prepares_x(kShape, Tokens);
  static constexpr int kUnits = trellis_slice_units(Tokens, Regular_);
  static constexpr int kPieces = kBits / 2;            // 16-byte pieces of a unit's words; 8 bytes more if kBits is odd
  static constexpr bool kLate = kBytes && kBits == 8;  // words are the windows: replaced as they have been used
  // Few bits and columns leave registers for both pieces of all steps.
  static constexpr bool kPermuteHere = kBits > 4 || kTokenTiles > 1;
  static constexpr int kRows = kTileRows;
  static constexpr int kPartialStride = kRows + 4;
  static constexpr int kTableOffset = kBytes ? 0 : kShape.byte_tables_bytes() / 2;
  static constexpr int kScalesOffset = kShape.byte_tables_bytes();
  static_assert(Tokens == 4 || Tokens == 8 || Tokens == 16);
  static_assert(Regular_ || Tokens == 16);
};

// The words of a lane for one unit. Places as in slice_word.
template <typename Config>
struct UnitWords {
  uint4 q[Config::kPieces];
  uint2 rest;

  __device__ __forceinline__ void load_piece(int i, const uint8_t* slice, int unit, int lane) {
    constexpr int kStep = Config::kPieces + Config::kBits % 2;
    q[i] = load_streaming(reinterpret_cast<const uint4*>(slice) + (unit * kStep + i) * kLanes + lane);
  }
  __device__ __forceinline__ void load(const uint8_t* slice, int unit, int lane) {
#pragma unroll
    for (int i = 0; i < Config::kPieces; ++i) load_piece(i, slice, unit, lane);
    if constexpr (Config::kBits % 2 != 0) {
      rest = load_streaming(reinterpret_cast<const uint2*>(slice) + 2 * (Config::kPieces * kLanes + lane) + unit);
    }
  }
  // Word i of row g (0) or g + 8 (1).
  __device__ __forceinline__ uint32_t word(int row, int i) const {
    if (i / 2 == Config::kPieces) return row == 0 ? rest.x : rest.y;
    const uint4& v = q[i / 2];
    return i % 2 == 0 ? (row == 0 ? v.x : v.y) : (row == 0 ? v.z : v.w);
  }
};

// What a warp works on, the same for all its row tiles. Blocks are of 64 columns.
struct TrellisRole {
  int lane = 0;
  int slice = 0;
  int first_column = 0;  // in shared memory
  int blocks = 0;        // 0: no columns
  int first_group = 0;
  uint32_t ends = 0;    // bit i: a scale group, a chunk or the slice ends after block i
  uint32_t groups = 0;  // bit i: a scale group ends
};

template <typename Config>
__device__ __forceinline__ TrellisRole make_trellis_role(const GemvParams& p, int slice, int lane) {
  TrellisRole role;
  role.lane = lane;
  role.slice = slice;
  if (slice >= p.slices) return role;
  const int first = slice * p.units_per_slice * 2;
  role.blocks = min(p.units_per_slice * 2, p.k / kMinBlock - first);
  const int group = p.group / kMinBlock;
  role.first_group = small_divide(first, group);
  if constexpr (!Config::kRegular) {
    for (int i = 0; i < role.blocks; ++i) {
      const bool group_ends = (first + i + 1) % group == 0;
      const bool ends = group_ends || (first + i + 1) % (kChunk / kMinBlock) == 0 || i == role.blocks - 1;
      role.ends |= static_cast<uint32_t>(ends) << i;
      role.groups |= static_cast<uint32_t>(group_ends) << i;
    }
  }
  return role;
}

// x of a warp and the products with it, in either kind of operand:
//   store      a rotated chunk -> shared memory
//   load       the x fragments of unit u
//   begin      a unit: what comes before its first step
//   two_steps  steps s and s + 1 of unit u
//   flush      multiplies the sums of a segment with their scales
//   write      the sums of a row tile -> partials
template <typename Config>
struct ByteProducts {
  static constexpr int kTiles = Config::kTokenTiles;
  static constexpr int kChains = kTiles == 1 ? 2 : 1;
  uint32_t x[kTiles][Config::kUnits][kRunSteps];
  int acc[kTiles][kChains][4] = {};
  float sum[kTiles][2] = {};

  static __device__ __forceinline__ void store(const float (&y)[4][2][4], uint8_t* xs, int row, int chunk, int chunks,
                                               float* scale, int lane) {
    uint8_t* hi = xs + 2 * row * plane_bytes(chunks) + chunk * kChunk;
    store_digits(y, hi, hi + plane_bytes(chunks), scale, 0, 0, lane);
  }
  __device__ __forceinline__ void load(const GemvParams& p, const uint8_t* xs, const TrellisRole& role, int u) {
    hold(u, [&](int t, int i) {  // rows beyond m: the sums of any other row do
      const int row = min(8 * t + role.lane / 4, 2 * p.m - 1);
      return *reinterpret_cast<const uint4*>(xs + row * plane_bytes(p.chunks) + role.lane % 4 * 16 + role.first_column +
                                             u * 256 + i * 64);
    });
  }
  // As prepare_x leaves it.
  __device__ __forceinline__ void load_prepared(const GemvParams& p, const TrellisRole& role, int u) {
    hold(u, [&](int t, int i) {
      const int piece = t * tile_pieces(p) + (role.slice * Config::kUnits + u) * kPieces + i;
      return load_global_if(8 * t + role.lane / 4 < 2 * p.m,
                            static_cast<const uint4*>(p.x) + piece * kLanes + role.lane);
    });
  }
  // Those of the CTA's chunks, from chunk0 on.
  static __device__ __forceinline__ void load_prepared_scales(const GemvParams& p, int chunk0, float* x_scales) {
    const int chunks = tile_pieces(p) / (kChunk / 64);
    const int tiles = (2 * p.m + 7) / 8;
    const auto* scales =
        reinterpret_cast<const float*>(static_cast<const uint4*>(p.x) + tiles * tile_pieces(p) * kLanes);
    for (int i = threadIdx.x; i < p.m * p.chunks; i += blockDim.x) {
      const int row = small_divide(i, p.chunks);
      const int chunk = chunk0 + i - row * p.chunks;
      if (chunk < chunks) x_scales[i] = __ldcg(scales + row * chunks + chunk);
    }
  }
  __device__ __forceinline__ void begin(const RunWindows<Config::kBits> (& /*rows*/)[2], const uint8_t* /*table*/,
                                        uint32_t /*offset*/) {}
  __device__ __forceinline__ void two_steps(const RunWindows<Config::kBits> (&rows)[2], int u, int s,
                                            const uint8_t* table, uint32_t offset) {
#pragma unroll
    for (int product = 0; product < 2; ++product) {
      uint32_t a[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int window = window_of_product<Config::kShift>(s, product, j / 2);
        a[j] = look_up(table, byte_address(rows[j % 2].word_of(window), window / 2 % 4, offset));
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        mma_m16n8k32(acc[t][product % kChains], a,
                     x_operand<Config::kShift, Config::kPermuteHere>(x[t][u], s, product));
      }
    }
  }
  // x_scales: of the chunk, row by row.
  __device__ __forceinline__ void flush(const GemvParams& p, float s0, float s1, const float* x_scales, int lane) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const float x_scale = x_scales[min(4 * t + lane % 4, p.m - 1) * p.chunks];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int digits[2] = {};
#pragma unroll
        for (int c = 0; c < kChains; ++c) {
          digits[0] += acc[t][c][2 * r];
          digits[1] += acc[t][c][2 * r + 1];
          acc[t][c][2 * r] = acc[t][c][2 * r + 1] = 0;
        }
        const float value = fmaf(256.0f, static_cast<float>(digits[0]), static_cast<float>(digits[1]));
        sum[t][r] = fmaf(value * x_scale, r == 0 ? s0 : s1, sum[t][r]);
      }
    }
  }
  __device__ __forceinline__ void write(const GemvParams& p, float* out, int lane) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int token = 4 * t + lane % 4;
      if (token < p.m) {
        out[token * Config::kPartialStride + lane / 4] = sum[t][0];
        out[token * Config::kPartialStride + lane / 4 + 8] = sum[t][1];
      }
      sum[t][0] = sum[t][1] = 0;
    }
  }

 private:
  static constexpr int kPieces = kTrellisColumns / 64;  // of a unit

  static __device__ __forceinline__ int tile_pieces(const GemvParams& p) {
    return (p.k + kChunk - 1) / kChunk * (kChunk / 64);
  }
  // piece(t, i): of columns 64 i .. + 63 of unit u.
  template <typename Piece>
  __device__ __forceinline__ void hold(int u, const Piece& piece) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const uint4 v = piece(t, i);
        x[t][u][4 * i] = v.x;
        x[t][u][4 * i + 1] = v.y;
        x[t][u][4 * i + 2] = v.z;
        x[t][u][4 * i + 3] = v.w;
      }
      order_pieces<Config::kShift>(x[t][u]);
    }
  }
};

template <typename Config>
struct HalfProducts {
  static constexpr int kTiles = Config::kTokenTiles;
  uint2 x[kTiles][Config::kUnits][kRunSteps];
  uint32_t before[Config::kShift][2];  // entries of the last windows, the oldest first
  float acc[kTiles][4] = {};
  float sum[kTiles][4] = {};

  static __device__ __forceinline__ void store(const float (&y)[4][2][4], uint8_t* xs, int row, int chunk, int chunks,
                                               float* scale, int lane) {
    store_halves(y, reinterpret_cast<__half*>(xs + 2 * row * plane_bytes(chunks)) + chunk * kChunk, scale, lane);
  }
  __device__ __forceinline__ void load(const GemvParams& p, const uint8_t* xs, const TrellisRole& role, int u) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint8_t* from = xs + 2 * min(t * 8 + role.lane / 4, p.m - 1) * plane_bytes(p.chunks) +
                            (role.first_column + u * 256) * 2 + role.lane % 4 * 16;
#pragma unroll
      for (int pair = 0; pair < kRunSteps / 2; ++pair) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + pair * 64);
        x[t][u][2 * pair] = make_uint2(v.x, v.y);
        x[t][u][2 * pair + 1] = make_uint2(v.z, v.w);
      }
    }
  }
  __device__ __forceinline__ void begin(const RunWindows<Config::kBits> (&rows)[2], const uint8_t* table,
                                        uint32_t offset) {
#pragma unroll
    for (int i = 0; i < Config::kShift; ++i) {  // the run is circular
#pragma unroll
      for (int r = 0; r < 2; ++r) before[i][r] = entry(rows[r], 2 * kRunSteps - Config::kShift + i, table, offset);
    }
  }
  __device__ __forceinline__ void two_steps(const RunWindows<Config::kBits> (&rows)[2], int u, int s,
                                            const uint8_t* table, uint32_t offset) {
    step(rows, u, s, table, offset);
    step(rows, u, s + 1, table, offset);
  }
  __device__ __forceinline__ void step(const RunWindows<Config::kBits> (&rows)[2], int u, int s, const uint8_t* table,
                                       uint32_t offset) {
    uint32_t a[4];
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t e = entry(rows[r], 2 * s + odd, table, offset);
        a[2 * odd + r] = WindowPair<__half>::sum(e, before[0][r]);
#pragma unroll
        for (int n = 0; n + 1 < Config::kShift; ++n) before[n][r] = before[n + 1][r];
        before[Config::kShift - 1][r] = e;
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) mma_m16n8k16<__half>(acc[t], a, x[t][u][s]);
  }
  __device__ __forceinline__ void flush(const GemvParams& p, float s0, float s1, const float* x_scales, int lane) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x_scale = x_scales[min(t * 8 + lane % 4 * 2 + i % 2, p.m - 1) * p.chunks];
        sum[t][i] = fmaf(acc[t][i] * x_scale, i < 2 ? s0 : s1, sum[t][i]);
        acc[t][i] = 0;
      }
    }
  }
  __device__ __forceinline__ void write(const GemvParams& p, float* out, int lane) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = t * 8 + lane % 4 * 2 + i % 2;
        if (token < p.m) out[token * Config::kPartialStride + lane / 4 + i / 2 * 8] = sum[t][i];
        sum[t][i] = 0;
      }
    }
  }

 private:
  static __device__ __forceinline__ uint32_t entry(const RunWindows<Config::kBits>& row, int window,
                                                   const uint8_t* table, uint32_t offset) {
    return look_up(table, byte_address(row.word_of(window), window / 2 % 4, offset));
  }
};

__device__ __forceinline__ float half_bits(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// Scales of rows g and g + 8 for a scale group.
struct RowPairScales {
  const uint16_t* at;
  uint16_t raw[2];

  __device__ __forceinline__ void load() {
    raw[0] = __ldg(at);
    raw[1] = __ldg(at + 8);
  }
};

// Unit u of a row tile. replace(piece) loads the same piece of the unit that comes next; piece -1: all of them.
template <typename Config, typename Products, typename Replace>
__device__ __forceinline__ void multiply_unit(const GemvParams& p, UnitWords<Config>& words, const TrellisRole& role,
                                              int u, const uint8_t* table, uint32_t offset, RowPairScales& scales,
                                              const float* x_scales, Products& products, const Replace& replace) {
  const RunWindows<Config::kBits> rows[2] = {RunWindows<Config::kBits>([&](int i) { return words.word(0, i); }),
                                             RunWindows<Config::kBits>([&](int i) { return words.word(1, i); })};
  if constexpr (!Config::kLate) replace(-1);
  products.begin(rows, table, offset);
  if constexpr (Config::kBytes) {  // words become free early
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; j += 2) products.two_steps(rows, u, 4 * i + j, table, offset);
      if constexpr (Config::kLate) {
        if (i % 2 == 1) {
          replace(i / 2);
          replace(2 + i / 2);
          __syncwarp();
        }
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int block = 4 * u + j;
      if (block >= role.blocks) break;
#pragma unroll
      for (int i = 0; i < 4; i += 2) products.two_steps(rows, u, 4 * j + i, table, offset);
      if ((role.ends >> block & 1) == 0) continue;
      products.flush(p, half_bits(scales.raw[0]) * p.norm, half_bits(scales.raw[1]) * p.norm,
                     x_scales + (role.first_column + block * kMinBlock) / kChunk, role.lane);
      if ((role.groups >> block & 1) != 0 && block + 1 < role.blocks) {
        scales.at += kTileRows;
        scales.load();
      }
    }
  }
  __syncwarp();  // keeps the loads here
}

template <typename Config>
__global__ void __launch_bounds__(512, 1) gemv_trellis_kernel(const __grid_constant__ GemvParams p) {
  using T = typename Config::T;
  using Products = std::conditional_t<Config::kBytes, ByteProducts<Config>, HalfProducts<Config>>;
  extern __shared__ __align__(1024) uint8_t shared[];
  launch_dependents();
  const int lane = kept(threadIdx.x % kLanes);
  __builtin_assume(0 <= lane && lane < kLanes);            // what the compiler knew of the special register
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // the same for all lanes, as the compiler should know
  const uint32_t rank = p.cluster > 1 ? cluster_rank() : 0;
  const int cluster_index = p.cluster > 1 ? small_divide(blockIdx.x, p.cluster) : blockIdx.x;
  int which = 0;
  while (which + 1 < p.part_count && cluster_index >= p.parts[which + 1].first_cluster) ++which;
  const GemvPart& part = p.parts[which];

  const int first_slice = p.first_slice + rank * p.cta_slices;
  const int row_group = small_divide(warp, p.cta_slices);
  TrellisRole role = make_trellis_role<Config>(p, first_slice + warp - row_group * p.cta_slices, lane);
  const int row_tiles = (part.n + kTileRows - 1) / kTileRows;
  const int first_block = (cluster_index - part.first_cluster) * p.cta_row_groups;
  if (first_block >= row_tiles) {  // a cluster without work keeps its place, so that those of the next kernel spread
    wait_for_primary();
    return;
  }
  const int stride = part.clusters * p.cta_row_groups;
  const int first_tile = first_block + row_group;
  const int count = role.blocks > 0 ? max(0, row_tiles - first_tile + stride - 1) / stride : 0;
  const int units = Config::kRegular ? Config::kUnits : (role.blocks + 3) / 4;

  // Where the words of unit u are: unit (first_unit + u) of a slice of the layout.
  const int all_units = role.slice * p.units_per_slice / 2;
  const int layout_slice = small_divide(all_units, p.layout_units);
  const int first_unit = Config::kUnits == 2 ? 0 : all_units - layout_slice * p.layout_units;
  const uint8_t* at = part.data + static_cast<long long>(part.weights_offset) * kTiledAlignment +
                      layout_slice * p.slice_bytes + static_cast<long long>(first_tile) * p.tile_bytes;
  const long long to_next = static_cast<long long>(stride) * p.tile_bytes;
  UnitWords<Config> words;
  RowPairScales next_scales;
  next_scales.at = reinterpret_cast<const uint16_t*>(part.data + Config::kScalesOffset) +
                   (static_cast<long long>(first_tile) * p.row_groups_of_scales + role.first_group) * kTileRows +
                   lane / 4;
  if (count > 0) {
    words.load(at, first_unit, lane);
    next_scales.load();
  }
  const int warps = p.cta_slices * p.cta_row_groups;
  const int first_fill = 2 * p.rotate_warps <= warps ? p.rotate_warps : 0;
  TableFill<ByteTable<8>> table(part.data + Config::kTableOffset, static_cast<int>(threadIdx.x) - first_fill * kLanes,
                                (warps - first_fill) * kLanes);

  auto* barrier = reinterpret_cast<uint64_t*>(shared + ByteTable<8>::kTableBytes);
  auto* inbox = reinterpret_cast<float4*>(barrier + 2);
  auto* x_scales = reinterpret_cast<float*>(inbox) + p.inbox_floats;
  auto* xs = reinterpret_cast<uint8_t*>(x_scales + (p.m * p.chunks + 3) / 4 * 4);
  if (p.cluster > 1) {
    if (threadIdx.x == 0) mbarrier_init(barrier);
    __syncthreads();
    cluster_arrive();
  }
  const int chunk0 = first_slice * p.units_per_slice * kUnitColumns / kChunk;
  role.first_column = role.slice * p.units_per_slice * kUnitColumns - chunk0 * kChunk;
  Products products;
  if constexpr (Config::kPrepared) {
    table.store(shared);
    wait_for_primary();
    Products::load_prepared_scales(p, chunk0, x_scales);
#pragma unroll
    for (int u = 0; u < Config::kUnits; ++u) {
      if (role.blocks > 0) products.load_prepared(p, role, u);
    }
  } else {
    const RotateRole<T, 4> rotate(p, first_slice, warp, lane);
    table.store(shared);
    rotate.template run<1>(p, lane, [&](const uint2(&b)[8], int r, int c) {
      float y[4][2][4];
      rotate.rotation.rotate(b, y);
      Products::store(y, xs, r, c, p.chunks, x_scales + r * p.chunks + c, lane);
    });
    __syncthreads();
#pragma unroll
    for (int u = 0; u < Config::kUnits; ++u) {
      if (u < units && role.blocks > 0) products.load(p, xs, role, u);
    }
  }
  __syncthreads();                    // x is in registers: partial sums take its place
  if (p.cluster > 1) cluster_wait();  // the other CTAs have started: their inboxes may be written
  auto* partials = reinterpret_cast<float*>(xs);
  const Reduction reduction{reinterpret_cast<float4*>(partials), inbox, barrier, first_block};
  const uint32_t offset = lane * 4;
  uint32_t parity = 0;
  for (int round = 0; round < part.rounds; round += p.batch, parity ^= 1) {
    const int rounds = min(p.batch, part.rounds - round);
    float* out = partials + warp * p.m * Config::kPartialStride;
    for (int slot = 0; slot < rounds; ++slot) {
      const int left = count - 1 - (round + slot);  // row tiles after this one
      if (left >= 0) {
        RowPairScales scales = next_scales;
        next_scales.at += part.scales_step;
        if (left > 0) next_scales.load();
        const uint8_t* next = at + to_next;
#pragma unroll
        for (int u = 0; u < Config::kUnits; ++u) {
          const bool last = u + 1 == Config::kUnits;
          const bool more = !last || left > 0;
          multiply_unit(p, words, role, u, shared, offset, scales, x_scales, products, [&](int piece) {
            if (!more) return;
            const uint8_t* from = last ? next : at;
            const int unit = last ? first_unit : u + 1;
            piece < 0 ? words.load(from, unit, lane) : words.load_piece(piece, from, unit, lane);
          });
        }
        if constexpr (Config::kRegular) {
          products.flush(p, half_bits(scales.raw[0]) * p.norm, half_bits(scales.raw[1]) * p.norm,
                         x_scales + role.first_column / kChunk, lane);
        }
        at = next;
      }
      products.write(p, out, lane);
      out += warps * p.m * Config::kPartialStride;
    }
    reduce_batch<Config>(p, part, reduction, round, rounds, stride, parity);
  }
}

}  // namespace higgs::cuda
