// Walsh-Hadamard transform of 1024 consecutive values by one warp. The butterflies run in the order of strides
// 1, 2, 4, ... in fp32, so every kernel here gives the bits of FORMAT.md.
#pragma once

#include <cstdint>

#include "higgs/cuda/plan.h"

namespace higgs::cuda {

inline constexpr int kChunkScratch = 32 * 33;  // fp32 words of shared memory per warp

__host__ __device__ inline float hadamard_norm(int block) {
  // fp32(1 / sqrt(block)), exact for even powers of two
  switch (block) {
    case 64: return 0x1p-3f;
    case 128: return 0x1.6a09e6p-4f;
    case 256: return 0x1p-4f;
    case 512: return 0x1.6a09e6p-5f;
    default: return 0x1p-5f;
  }
}

template <int Stride>
__device__ __forceinline__ void butterflies(float (&v)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    if ((i & Stride) == 0) {
      const float a = v[i];
      const float b = v[i | Stride];
      v[i] = __fadd_rn(a, b);
      v[i | Stride] = __fsub_rn(a, b);
    }
  }
}

// In: lane l holds values 32 l .. 32 l + 31. Out: lane l holds values l, l + 32, l + 64, ..., transformed in blocks and
// normalised. scratch: kChunkScratch words of this warp; rows of 33 words keep both directions free of bank conflicts.
__device__ __forceinline__ void warp_fwht(float (&v)[32], int block, float* scratch, int lane) {
  butterflies<1>(v);
  butterflies<2>(v);
  butterflies<4>(v);
  butterflies<8>(v);
  butterflies<16>(v);
#pragma unroll
  for (int j = 0; j < 32; ++j) scratch[lane * 33 + j] = v[j];
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 32; ++j) v[j] = scratch[j * 33 + lane];
  __syncwarp();
  butterflies<1>(v);  // stride 32: blocks have at least 64 values
  if (block > 64) butterflies<2>(v);
  if (block > 128) butterflies<4>(v);
  if (block > 256) butterflies<8>(v);
  if (block > 512) butterflies<16>(v);
  const float norm = hadamard_norm(block);
#pragma unroll
  for (int j = 0; j < 32; ++j) v[j] = __fmul_rn(v[j], norm);
}

}  // namespace higgs::cuda
