// Decoders: fields of the tiled layout -> A fragments of mma.m16n8k16 by look-up in shared memory.
//
// The look-up table is replicated so that every lane reads its own bank: no conflicts, whatever the indices. Where the
// table is small its entry stride is 256 bytes, so that the byte of a field placed above the lane's offset *is* the
// address: one PRMT and one load decode a field. Fields of 4 to 7 bits use the same 256 entries, with the bits above
// them as "don't care" copies; those spare bits of a unit's words carry its remaining fields.
//
//   Decoder               words / unit  instructions / look-up (64 KB of shared memory each)
//   PairDecoder<8>        8             PRMT LDS
//   PairDecoder<5, 6, 7>  5, 6, 7       PRMT LDS, 0.2-0.4 more to assemble the remaining fields
//   PairDecoder<9..12>    9..12         SHF LOP3 LDS; 32, 16, 8, 4 copies of the table: some conflicts from 10 bits
//   QuadDecoder<4, 6, 8>  2, 3, 4       PRMT LDS LDS (one 64-bit load would need moves, as the halves of an entry are
//                                       not neighbours in the A operand), 0.1-0.4 more to assemble fields below 8 bits
//   the same in bytes     2, 3, 4       PRMT LDS (byte_fragment)
//   SignedQuadDecoder     6             as QuadDecoder<8>, and SHF LOP3 per pair, or SHF PRMT LOP3 per four bytes
//   SingleDecoder         16            PRMT LDS, and a PRMT per pair
//
// Order of the fields of a lane (rows g and g + 8, columns 16 step + 4 t + 0..3 for steps 0..7 of a unit):
//   pairs:   field 4 step + {0, 1, 2, 3} = (g, 0-1), (g + 8, 0-1), (g, 2-3), (g + 8, 2-3)
//   quads:   field 2 step + {0, 1}       = (g, 0-3), (g + 8, 0-3)
//   singles: the pairs' order, two fields each
// The instruction's k order is a permutation of the columns: its slots 2t, 2t+1, 2t+8, 2t+9 hold columns 4t .. 4t+3,
// for the weights and for x alike.
#pragma once

#include <cstdint>
#include <type_traits>

#include "higgs/cuda/tiled_format.h"

namespace higgs::cuda {

inline constexpr int kSteps = kUnitColumns / 16;  // MMA steps of a unit

// Row (0 or 1: g or g + 8) and first column within the step (0..3, without 4 t) of a field within its step.
__host__ __device__ constexpr int field_row(int weights, int f) {
  return weights == 4 ? f : weights == 2 ? f & 1 : (f >> 1) & 1;
}
__host__ __device__ constexpr int field_column(int weights, int f) {
  return weights == 4 ? 0 : weights == 2 ? (f >> 1) * 2 : (f >> 2) * 2 + (f & 1);
}

// --- field f of the words of a unit, the two directions, for repack -------------------------------------------------

// Where the bits of field f live: bit b of the field is bit bit_position(...) of the unit's words.
__host__ __device__ constexpr int bit_position(FieldShape s, int f, int b) {
  if (s.sign_bits() > 0) {  // entries one after another, then signs (SignedQuadDecoder)
    constexpr int kByte[] = {1, 3, 0, 2};
    if (b < 8) return 8 * f + b;
    return 32 * (4 + f / 8) + 8 * kByte[b - 8] + 7 - f % 8;
  }
  if (s.bits >= 8) return f * s.bits + b;  // plainly one after another
  const int direct = s.unit_words() * 4;   // one field in the low bits of every byte
  const int half = s.bits == 6 ? f / 16 : 0;
  if (s.bits == 6) {  // two halves of three words: 12 direct fields, 4 in the spare bit pairs
    const int i = f % 16;
    return i < 12 ? 8 * (12 * half + i) + b : 32 * (3 * half + b / 2) + 8 * (i - 12) + 6 + b % 2;
  }
  if (f < direct) return 8 * f + b;
  if (s.bits == 4) return 8 * (f - direct) + 4 + b;  // the other half of the byte
  const int byte = 8 * ((f - direct) % 4);
  if (s.bits == 7) return 32 * b + byte + 7;  // bit b in the spare bit of word b
  switch ((f - direct) / 4) {                 // 5 bits: three spare bits in each of five words
    case 0: return b < 3 ? byte + 5 + b : 32 + byte + 5 + (b - 3);
    case 1: return b < 3 ? 64 + byte + 5 + b : 96 + byte + 5 + (b - 3);
    default: return b < 3 ? 128 + byte + 5 + b : b == 3 ? 32 + byte + 7 : 96 + byte + 7;
  }
}

// Where word i of a lane's unit u is among the words of its slice: one after another, but of units with an odd number
// of 8-byte halves the last halves share a 16-byte piece between the two units of a slice.
__host__ __device__ constexpr int slice_word(FieldShape s, int u, int i) {
  const int words = s.unit_words() * s.joined_units();
  if (!s.trellis() || words % 4 == 0) return u * words + i;
  return i < words - 2 ? u * (words + 2) + i : words - 2 + 2 * u + i - (words - 2);
}

// --- decoders -------------------------------------------------------------------------------------------------------

// (a & mask) | (b & ~mask)
__device__ __forceinline__ uint32_t select(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t v;
  asm("lop3.b32 %0, %1, %2, %3, 0xe2;" : "=r"(v) : "r"(a), "r"(mask), "r"(b));
  return v;
}

// A table of T that is addressed from the start of the shared window: `offset` holds its address.
template <typename T>
struct SharedWindow {};

__device__ __forceinline__ uint32_t look_up(const uint8_t* table, uint32_t at) {
  return *reinterpret_cast<const uint32_t*>(table + at);
}
template <typename T>
__device__ __forceinline__ uint32_t look_up(SharedWindow<T>, uint32_t at) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at));
  return v;
}

// Dynamic shared memory begins here: 1 KB is the system's.
inline constexpr int kSharedBase = 1024;
// A table at its start. The look-up adds kSharedBase, the offset holds the rest of its address, and no register or
// special register is needed for where shared memory begins.
struct SharedStart {
  __device__ __forceinline__ explicit SharedStart(const uint8_t* /*shared*/) {}
};
__device__ __forceinline__ uint32_t look_up(SharedStart, uint32_t at) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1+%2];" : "=r"(v) : "r"(at), "n"(kSharedBase));
  return v;
}

// `offset` with byte `b` of `word` as its second byte: entry address in a table of 256-byte stride.
__device__ __forceinline__ uint32_t byte_address(uint32_t word, int b, uint32_t offset) {
  return __byte_perm(word, offset, 0x7604 | (b << 4));
}

// Words with one field in every byte, from the words of a unit.
template <int Bits, int Words, int Expanded>
__device__ __forceinline__ void expand(const uint32_t (&w)[Words], uint32_t (&e)[Expanded]) {
  static_assert(Bits >= 4 && Bits <= 8 && Words * 8 == Expanded * Bits);
  if constexpr (Bits == 6) {
#pragma unroll
    for (int h = 0; h < Words / 3; ++h) {
      const uint32_t a = w[3 * h], b = w[3 * h + 1], c = w[3 * h + 2];
      e[4 * h] = a;
      e[4 * h + 1] = b;
      e[4 * h + 2] = c;
      e[4 * h + 3] = select(0x0f0f0f0f, select(0x03030303, a >> 6, b >> 4), c >> 2);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Words; ++i) e[i] = w[i];
    if constexpr (Bits == 7) {
      e[7] = 0;
#pragma unroll
      for (int i = 0; i < 7; ++i) e[7] |= (w[i] >> (7 - i)) & (0x01010101u << i);
    } else if constexpr (Bits == 5) {
      e[5] = select(0x07070707, w[0] >> 5, w[1] >> 2);
      e[6] = select(0x07070707, w[2] >> 5, w[3] >> 2);
      e[7] = select(0x07070707, w[4] >> 5, select(0x08080808, w[1] >> 4, w[3] >> 3));
    } else if constexpr (Bits == 4) {
#pragma unroll
      for (int i = 0; i < Words; ++i) e[Words + i] = w[i] >> 4;
    }
  }
}

template <int Bits>
struct PairDecoder {
  static_assert(Bits >= 5 && Bits <= 12);
  static constexpr FieldShape kShape{Bits, 2};
  static constexpr bool kByteFields = Bits <= 8;
  static constexpr int kStrideLog = kByteFields ? 8 : 16 - Bits;
  static constexpr int kTableEntries = kByteFields ? 256 : 1 << Bits;
  static constexpr int kTableBytes = kTableEntries << kStrideLog;
  static constexpr int kCopies = kStrideLog >= 7 ? 32 : 1 << (kStrideLog - 2);  // of a 4-byte entry

  uint32_t words[kByteFields ? 8 : Bits];

  __device__ __forceinline__ explicit PairDecoder(const uint32_t (&w)[Bits]) {
    if constexpr (kByteFields) {
      expand<Bits>(w, words);
    } else {
#pragma unroll
      for (int i = 0; i < Bits; ++i) words[i] = w[i];
    }
  }
  static __device__ __forceinline__ uint32_t lane_offset(int lane) { return (lane % kCopies) * 4; }

  // The A fragment of step `step`, a constant after unrolling.
  template <typename Table>
  __device__ __forceinline__ void fragment(int step, Table table, uint32_t offset, uint32_t (&a)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) a[j] = look_up(table, address(4 * step + j, offset));
  }

 private:
  __device__ __forceinline__ uint32_t address(int f, uint32_t offset) const {
    if constexpr (kByteFields) {
      return byte_address(words[f / 4], f % 4, offset);
    } else {
      constexpr uint32_t kMask = ((1u << Bits) - 1) << kStrideLog;
      const int word = f * Bits / 32;
      const int shift = f * Bits % 32 - kStrideLog;
      uint32_t shifted;
      if (shift < 0) {
        shifted = words[word] << -shift;
      } else if (shift + kStrideLog + Bits <= 32) {
        shifted = words[word] >> shift;
      } else {
        shifted = __funnelshift_r(words[word], words[(word + 1) % Bits], shift);
      }
      return (shifted & kMask) | offset;
    }
  }
};

template <int Bits>
struct QuadDecoder {
  static_assert(Bits == 4 || Bits == 6 || Bits == 8);
  static constexpr FieldShape kShape{Bits, 4};
  static constexpr int kStrideLog = 8;
  static constexpr int kTableEntries = 256;
  static constexpr int kTableBytes = kTableEntries << kStrideLog;
  static constexpr int kCopies = 32;
  static constexpr int kSecondHalf = 128;  // columns 2-3 of all copies follow columns 0-1

  uint32_t words[4];

  __device__ __forceinline__ explicit QuadDecoder(const uint32_t (&w)[Bits / 2]) { expand<Bits>(w, words); }
  static __device__ __forceinline__ uint32_t lane_offset(int lane) { return lane * 4; }

  template <typename Table>
  __device__ __forceinline__ void fragment(int step, Table table, uint32_t offset, uint32_t (&a)[4]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t at = byte_address(words[step / 2], step % 2 * 2 + r, offset);
      a[r] = look_up(table, at);
      a[2 + r] = look_up(table, at + kSecondHalf);
    }
  }

  // The A fragment of steps 2 i and 2 i + 1 for the integer MMA, from a ByteTable.
  template <typename Table>
  __device__ __forceinline__ void byte_fragment(int i, Table table, uint32_t offset, uint32_t (&a)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) a[j] = look_up(table, byte_address(words[i], j, offset));
  }
};

// Fields of four magnitudes of 8 bits (words 0-3) and their signs (words 4 and 5). Word 4 + f / 8, shifted by f % 8,
// has the signs of columns 0, 1, 2 and 3 of field f at bits 15, 31, 7 and 23: where 16-bit values of a pair have
// theirs, of the second pair after a shift by 8 more.
struct SignedQuadDecoder : QuadDecoder<8> {
  static constexpr FieldShape kShape{12, 4};

  uint32_t signs[2];

  __device__ __forceinline__ explicit SignedQuadDecoder(const uint32_t (&w)[6])
      : QuadDecoder<8>({w[0], w[1], w[2], w[3]}), signs{w[4], w[5]} {}

  template <typename Table>
  __device__ __forceinline__ void fragment(int step, Table table, uint32_t offset, uint32_t (&a)[4]) const {
    QuadDecoder<8>::fragment(step, table, offset, a);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t s = signs_of(2 * step + r);
      a[r] ^= s & 0x80008000;
      a[2 + r] ^= s << 8 & 0x80008000;
    }
    // Here and not later, next to an MMA behind a branch.
    asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]));
  }

  // ~b instead of b where a sign is set (kQuadStep).
  template <typename Table>
  __device__ __forceinline__ void byte_fragment(int i, Table table, uint32_t offset, uint32_t (&a)[4]) const {
    QuadDecoder<8>::byte_fragment(i, table, offset, a);
#pragma unroll
    for (int j = 0; j < 4; ++j) a[j] ^= byte_signs(signs_of(4 * i + j));
  }

 private:
  __device__ __forceinline__ uint32_t signs_of(int f) const { return signs[f / 8] << f % 8; }
  // The upper bits of bytes 1, 3, 0 and 2, eight times each.
  static __device__ __forceinline__ uint32_t byte_signs(uint32_t s) {
    uint32_t v;
    asm("prmt.b32 %0, %1, 0, 0xa8b9;" : "=r"(v) : "r"(s));
    return v;
  }
};

// A table of four bytes an entry, replicated for the lanes.
template <int Bits>
struct ByteTable {
  static constexpr FieldShape kShape{Bits, 2};  // as entries of two 16-bit values
  static constexpr int kStrideLog = 8;
  static constexpr int kTableEntries = 256;
  static constexpr int kTableBytes = kTableEntries << kStrideLog;
  static constexpr int kCopies = 32;
};

// Quads for integer products in the GEMM kernel: steps of 32 columns, in order.
template <typename Decoder>
struct ByteQuadDecoder : Decoder {
  static constexpr bool kIntegers = true;
  static constexpr bool kHalves = Decoder::kShape.sign_bits() > 0;  // bytes lack half a step of every weight
  static constexpr float kHalfUnit = 1;

  using Decoder::Decoder;

  template <typename T>
  __device__ __forceinline__ void fragment(int step, SharedWindow<T> table, uint32_t offset, uint32_t (&a)[4]) const {
    this->byte_fragment(step, table, offset, a);
    if constexpr (kHalves) asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3]));  // here, as above
  }
};

struct SingleDecoder {
  static constexpr FieldShape kShape{8, 1};
  static constexpr int kStrideLog = 8;
  static constexpr int kTableEntries = 256;
  static constexpr int kTableBytes = kTableEntries << kStrideLog;
  static constexpr int kCopies = 32;

  uint32_t words[16];

  __device__ __forceinline__ explicit SingleDecoder(const uint32_t (&w)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) words[i] = w[i];
  }
  static __device__ __forceinline__ uint32_t lane_offset(int lane) { return lane * 4; }

  // The A fragment of step `step`, a constant after unrolling.
  template <typename Table>
  __device__ __forceinline__ void fragment(int step, Table table, uint32_t offset, uint32_t (&a)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t v[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t at = byte_address(words[2 * step + j / 2], j % 2 * 2 + i, offset);
        v[i] = look_up(table, at);
      }
      a[j] = __byte_perm(v[0], v[1], 0x5410);
    }
  }
};

// Copies the table of a matrix (entries in field order) into shared memory, replicated for the lanes. Two steps, so
// that the first load is under way early. A task is half the copies of an entry (or all, if they are 16 bytes); of
// QuadDecoder's 8-byte entry, the copies of one half.
template <typename Decoder>
class TableFill {
  static constexpr int kEntryBytes = Decoder::kShape.entry_bytes();
  static constexpr int kPieces = Decoder::kCopies * kEntryBytes / 16;  // 16-byte stores that make one entry's copies
  static constexpr int kSplit = kPieces > 1 ? 2 : 1;
  static constexpr uint32_t kTasks = Decoder::kTableEntries * kSplit;

 public:
  // Thread `thread` of `threads`; a negative one has nothing to do.
  __device__ __forceinline__ TableFill(const uint8_t* table, int thread, int threads)
      : table_(table), task_(thread >= 0 ? thread : kTasks), threads_(threads) {
    if (task_ < kTasks) entry_ = load(task_);
  }
  __device__ __forceinline__ void store(uint8_t* shared) {
#pragma unroll 1
    while (task_ < kTasks) {
      store_task(shared, task_, entry_);
      task_ += threads_;
      if (task_ < kTasks) entry_ = load(task_);
    }
  }

 private:
  __device__ __forceinline__ uint32_t load(uint32_t task) const {
    const uint32_t half = kEntryBytes == 8 ? task % 2 * 4 : 0;
    const uint32_t entry = __ldg(
        reinterpret_cast<const uint32_t*>(table_ + task / kSplit % Decoder::kShape.entries() * kEntryBytes + half));
    if constexpr (requires { Decoder::prepared(entry); }) return Decoder::prepared(entry);
    return entry;
  }
  // Neighbouring threads start at different pieces: 8 threads cover all banks.
  static __device__ __forceinline__ void store_task(uint8_t* shared, uint32_t task, uint32_t e) {
    constexpr int kEach = kPieces / kSplit;
    uint8_t* to = shared + (task / kSplit << Decoder::kStrideLog) + task % kSplit * kEach * 16;
#pragma unroll
    for (uint32_t i = 0; i < kEach; ++i) {
      *reinterpret_cast<uint4*>(to + (i + (kEach == 8 ? task : task / kSplit)) % kEach * 16) = make_uint4(e, e, e, e);
    }
  }

  const uint8_t* table_;
  uint32_t task_;
  uint32_t threads_;
  uint32_t entry_ = 0;
};

}  // namespace higgs::cuda
