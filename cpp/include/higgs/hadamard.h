// Randomised block Hadamard rotation (arXiv 2411.17525, section 4.1).
//
// With signs e_j = +-1 and an orthonormal symmetric matrix T per block (so T is its own inverse):
//   rotate:    r = T (e * v)          unrotate:  v = e * (T r)
// A block of 2^a columns has T = H / sqrt(2^a), the Sylvester-Hadamard matrix H[i][j] = (-1)^popcount(i & j). A block
// of r * 2^a columns, r odd in 3..15, has T = C (x) H / sqrt(2^a) with the discrete Hartley transform C of length r,
// C[i][j] = (cos + sin)(2 pi i j / r) / sqrt(r), which is for odd lengths what Hadamard is for powers of two: real,
// symmetric, orthonormal, its own inverse and nearly flat. Widths such as 576 = 9 * 64 then mix whole rows, not runs
// of 64.
//
// All arithmetic runs in fp32 in the order of FORMAT.md, so that every instruction set and the GPU give the same bits.
#pragma once

#include <cstdint>
#include <span>

#include "higgs/tensor_view.h"

namespace higgs {

// 64 sign bits for columns 64 * word .. 64 * word + 63; bit j set means -1 for column 64 * word + j. The SplitMix64
// output function on a counter: a pure function of (seed, column), so layers that read the same input share signs.
[[nodiscard]] constexpr std::uint64_t sign_word(std::uint64_t seed, std::uint64_t word) noexcept {
  std::uint64_t z = seed + (word + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}
[[nodiscard]] constexpr float sign_of(std::uint64_t seed, std::int64_t column) noexcept {
  const auto c = static_cast<std::uint64_t>(column);
  return ((sign_word(seed, c / 64) >> (c % 64)) & 1u) != 0 ? -1.0f : 1.0f;
}

// T of every `block` consecutive floats, in place. block is a multiple of 64 in [64, 1024] that divides data.size().
void fwht(std::span<float> data, int block);

// out[i, :] = T (e * column_scale * in[i, :]), the transform of weights. in: [rows, k] of any dtype,
// out: [rows, k] fp32; column_scale: k floats or empty (ones).
void rotate(ConstMatrixView in, int block, std::uint64_t seed, std::span<const float> column_scale, MatrixView out);

// The inverse of rotate: out[i, :] = e / column_scale * (T in[i, :]). in: fp32, out: any dtype.
void unrotate(ConstMatrixView in, int block, std::uint64_t seed, std::span<const float> column_scale, MatrixView out);

// d[j] = e_j / column_scale[j]: what the matmul kernels multiply x by before rotating it.
void input_vector(std::uint64_t seed, std::span<const float> column_scale, std::span<float> d);

namespace detail {

// The matrix C of odd length r in 3..15, [r, r].
[[nodiscard]] const float* hartley_table(int r) noexcept;

}  // namespace detail
}  // namespace higgs
