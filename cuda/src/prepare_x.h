// Rotated x as the fragments that the decode kernel's prepared loops hold in registers.
#pragma once

#include <cstdint>

#include "higgs/cuda/device.h"
#include "higgs/numeric.h"

namespace higgs::cuda {

struct PrepareParams {
  const void* x = nullptr;  // [m, k] fp16 or bf16
  const float* d = nullptr;
  void* out = nullptr;  // prepared_x_bytes(), 16-byte aligned
  int m = 0;
  int k = 0;
  int block = 0;
  bool digits = false;           // for loops over bytes
  bool chunks = false;           // whose digits share a scale; otherwise those of half a chunk do
  int half_parts = 0;            // of a chunk, where those lack half a step
  int free_multiprocessors = 0;  // of the decode kernel's launch
};

// out = rotate(x * d) as rotate_x.cuh has it. Chunks of 1024 columns, the last one padded, of tiles of 8 rows; a row is
// one of x, or of the two digits of one (and then a piece has 64 columns):
//
//   [tile][piece of 32 columns][row][lane t: columns 4 t .. + 3 and 16 + 4 t .. + 3]
//   [m][chunk or half of one] fp32 scales, if digits; with half sums [chunk][part][m] {scale, half the sum of x over
//   the part}: all warps read these at once, from as few lines of the L2 cache as can be
//
// A warp reads a piece as it is: 16 bytes a lane. Rows from m on are not written.
void prepare_x(const PrepareParams& params, DType dtype, Stream stream);

// scale_floats: of a chunk of a row (digit_scale_floats), if digits.
[[nodiscard]] std::int64_t prepared_x_bytes(std::int64_t m, std::int64_t k, bool digits, int scale_floats);

}  // namespace higgs::cuda
