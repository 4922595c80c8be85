#include "tensor_map.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstring>

namespace higgs::cuda {
namespace {

// From the driver that the runtime has loaded: nothing here links to it.
PFN_cuTensorMapEncodeTiled_v12000 find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  if (status == cudaSuccess && result == cudaDriverEntryPointSuccess) {
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }
  cudaGetLastError();  // not the next launch's
  return nullptr;
}

}  // namespace

bool map_output(TensorMap& map, void* y, DType dtype, std::int64_t m, std::int64_t n, int rows) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encode();
  constexpr std::int64_t kAlignment = 16;  // bytes, of y and its rows
  if (encode == nullptr || n % (kAlignment / 2) != 0 || reinterpret_cast<std::uintptr_t>(y) % kAlignment != 0) {
    return false;
  }
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(n), static_cast<cuuint64_t>(m)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(n) * 2};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(rows)};
  const cuuint32_t steps[] = {1, 1};
  CUtensorMap encoded;
  static_assert(sizeof(map) == sizeof(encoded));
  const CUresult status =
      encode(&encoded, dtype == DType::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, y,
             sizes, row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  std::memcpy(&map, &encoded, sizeof(map));
  return status == CUDA_SUCCESS;
}

}  // namespace higgs::cuda
