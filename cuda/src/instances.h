// The one table of decode kernel instances, by decoder. A new decoder is one new line; a new grid that fits a decoder
// needs none. CMake reads this file: every line gives one translation unit.
//   X(name, Decoder, grids it serves)
#pragma once

#define HIGGS_DECODERS(X)                            \
  X(quad4, QuadDecoder<4>, "p4_n16")                 \
  X(quad6, QuadDecoder<6>, "p4_n64")                 \
  X(quad8, QuadDecoder<8>, "p4_n256, p2_n16, p1_n4") \
  X(quad12, SignedQuadDecoder, "p4_n4096")           \
  X(pair5, PairDecoder<5>, "p2_n32")                 \
  X(pair6, PairDecoder<6>, "p2_n64, p1_n8")          \
  X(pair7, PairDecoder<7>, "p2_n128")                \
  X(pair8, PairDecoder<8>, "p2_n256, p1_n16")        \
  X(pair9, PairDecoder<9>, "p2_n512")                \
  X(pair10, PairDecoder<10>, "p2_n1024, p1_n32")     \
  X(pair11, PairDecoder<11>, "p2_n2048")             \
  X(pair12, PairDecoder<12>, "p2_n4096, p1_n64")     \
  X(single8, SingleDecoder, "p1_n256, ch8")          \
  X(trellis4, TrellisDecoder<4>, "a2_b4")            \
  X(trellis5, TrellisDecoder<5>, "a2_b5")            \
  X(trellis6, TrellisDecoder<6>, "a2_b6")            \
  X(trellis7, TrellisDecoder<7>, "a2_b7")            \
  X(trellis8, TrellisDecoder<8>, "a2_b8")
