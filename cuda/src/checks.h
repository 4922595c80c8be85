// Argument checks shared by the launchers.
#pragma once

#include <bit>
#include <cstdint>
#include <string>

#include "higgs/error.h"
#include "higgs/grid.h"

namespace higgs::cuda {

inline void check_pointer(const char* op, const char* what, const void* p) {
  if (p == nullptr) throw Error(ErrorCode::invalid_argument, std::string(op) + ": " + what + " is null");
  if (reinterpret_cast<std::uintptr_t>(p) % 16 != 0) {
    throw Error(ErrorCode::invalid_argument, std::string(op) + ": " + what + " is not 16-byte aligned");
  }
}

// The decode kernel, which rotates x while it multiplies, knows no blocks with an odd factor (hadamard.h).
inline bool supports_block(int block) { return std::has_single_bit(static_cast<unsigned>(block)); }

inline void check_block(const char* op, int block) {
  if (!supports_block(block)) {
    throw Error(ErrorCode::unsupported, std::string(op) + ": block " + std::to_string(block) +
                                            " has an odd factor; use rotate, dequantize_rotated and a GEMM");
  }
}

}  // namespace higgs::cuda
