// Rotated x in the layout of the GEMM kernel's B operand.
#pragma once

#include <cstdint>

#include "higgs/cuda/device.h"
#include "higgs/numeric.h"

namespace higgs::cuda {

struct PackParams {
  const void* x = nullptr;  // [m, k] fp16 or bf16
  const float* d = nullptr;
  void* out = nullptr;  // [k / 64][padded_m][64], x's type; rows from m on are not written
  std::uint32_t* flags = nullptr;
  int flag_count = 0;  // flags to clear
  int m = 0;
  int padded_m = 0;
  int k = 0;
  int block = 0;
  bool digits = false;
  bool crossed = false;  // digits: FieldShape::crossed()
};

// out = rotate(x * d) in two steps, as rotate_x.cuh has it, or as higgs::rotate where the block has an odd factor; each
// run of 64 columns is a 128-byte row in the k order of decode.cuh, its 16-byte pieces swizzled by the row's number
// modulo 8.
//
// Digits (m <= gemm_byte_tokens(), a block of a power of two): columns of a row are rounded to integers 256 hi + lo of
// a scale of their own, hi and lo in rows digit_row(row) and + 1 of 2 padded_m, [k / 512]{[4][2 padded_m][128
// columns], [padded_m] scales, [padded_m] half sums of x}. Rows of 128 bytes are swizzled again, and columns are in
// order; crossed, word t of an even 16 columns and of the next 16 have exchanged halves, the upper one for the lower
// one.
void pack_x(const PackParams& params, DType dtype, Stream stream);

}  // namespace higgs::cuda
