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
};

// out = rotate(x * d) as higgs::rotate, rounded once; each run of 64 columns is a 128-byte row in the k order of
// decode.cuh, its 16-byte pieces swizzled by the row's number modulo 8.
void pack_x(const PackParams& params, DType dtype, Stream stream);

}  // namespace higgs::cuda
