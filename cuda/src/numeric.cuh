// fp32 <-> storage types, one rounding each, and consecutive values at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "higgs/hadamard.h"
#include "higgs/numeric.h"

namespace higgs::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// out[i] = p[i]; Count a multiple of 8, p 16-byte aligned.
template <typename T, int Count>
__device__ __forceinline__ void load_values(const T* p, float (&out)[Count]) {
  constexpr int kPerLoad = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < Count / kPerLoad; ++i) {
    const uint4 raw = reinterpret_cast<const uint4*>(p)[i];
    const T* values = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int j = 0; j < kPerLoad; ++j) out[i * kPerLoad + j] = to_float(values[j]);
  }
}

__device__ __forceinline__ float sign_of_column(uint64_t seed, int64_t column) {
  const uint64_t word = sign_word(seed, static_cast<uint64_t>(column) / 64);
  return ((word >> (column % 64)) & 1) != 0 ? -1.0f : 1.0f;
}

// Calls body.template operator()<T>() with the CUDA type of the dtype.
template <typename Body>
void dispatch(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body.template operator()<float>();
    case DType::f16: return body.template operator()<__half>();
    case DType::bf16: return body.template operator()<__nv_bfloat16>();
  }
}

}  // namespace higgs::cuda
