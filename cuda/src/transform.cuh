// The orthonormal transform of any Hadamard block (hadamard.h) by one warp, with the bits of FORMAT.md: Walsh-Hadamard
// in runs of a power of two, then, where the block has an odd factor, the Hartley transform across the runs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fwht.cuh"
#include "higgs/hadamard.h"
#include "numeric.cuh"

namespace higgs::cuda {

// A kernel argument: launchers copy nothing to the device.
struct BlockTransform {
  int size = 0;     // of a run: the power of two in the block
  int runs = 0;     // the odd factor
  int columns = 0;  // of a chunk, what a warp transforms at once: as many whole blocks as fit
  float hartley[15 * 15] = {};
};

inline BlockTransform block_transform(int block) {
  BlockTransform t;
  t.size = block & -block;
  t.runs = block / t.size;
  t.columns = kChunk / block * block;
  if (t.runs > 1) std::copy_n(detail::hartley_table(t.runs), t.runs * t.runs, t.hartley);
  return t;
}

// Number of chunks of a row.
__host__ __device__ inline std::int64_t chunks_of(const BlockTransform& t, std::int64_t k) {
  return (k + t.columns - 1) / t.columns;
}

// v[j] = vector[32 lane + j] * in[32 lane + j] of a chunk with `count` columns (beyond them anything), a multiple of 8;
// vector may be null. Loads are coalesced, the products change lanes through scratch (kChunkScratch words of this
// warp).
template <typename In>
__device__ __forceinline__ void load_chunk(const In* in, const float* vector, int count, float* scratch, int lane,
                                           float (&v)[32]) {
  constexpr int kPieces = 4;  // of 8 values per lane
  constexpr int kWords = 8 * sizeof(In) / sizeof(uint4);
  const auto place = [&](int i) { return min(8 * (lane + kLanes * i), count - 8); };
  uint4 raw[kPieces][kWords];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {  // no branches: all under way at once
#pragma unroll
    for (int w = 0; w < kWords; ++w) raw[i][w] = reinterpret_cast<const uint4*>(in + place(i))[w];
  }
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int column = 8 * (lane + kLanes * i);
    float x[8];
    load_values(reinterpret_cast<const In*>(raw[i]), x);
    if (vector != nullptr) {
      float d[8];
      load_values(vector + place(i), d);
#pragma unroll
      for (int j = 0; j < 8; ++j) x[j] = __fmul_rn(d[j], x[j]);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) scratch[column / 32 * 33 + column % 32 + j] = x[j];
  }
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 32; ++j) v[j] = scratch[lane * 33 + j];
  __syncwarp();
}

// In and out as in warp_fwht; values from t.columns on are not transformed.
__device__ __forceinline__ void warp_transform(float (&v)[32], const BlockTransform& t, float* scratch, int lane) {
  warp_fwht(v, t.size, scratch, lane);
  if (t.runs == 1) return;
  // v[j] is value 32 j + lane and a run a multiple of 32 values, so a lane has all that its values meet.
#pragma unroll
  for (int j = 0; j < 32; ++j) scratch[j * 32 + lane] = v[j];
  const int stride = t.size / 32;
  const int block = t.runs * stride;
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    if (j * 32 >= t.columns) break;
    const int first = j / block * block;
    const float* x = scratch + (first + j % stride) * 32 + lane;
    const float* c = t.hartley + (j - first) / stride * t.runs;
    float sum = __fmul_rn(c[0], x[0]);
    for (int b = 1; b < t.runs; ++b) sum = __fmaf_rn(c[b], x[b * t.size], sum);
    v[j] = sum;
  }
  __syncwarp();
}

}  // namespace higgs::cuda
