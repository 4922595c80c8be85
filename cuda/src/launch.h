// Kernel launches with error checks.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <string>

#include "gemv_params.h"
#include "higgs/cuda/plan.h"
#include "higgs/error.h"

namespace higgs::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw Error(ErrorCode::cuda, std::string(what) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

inline cudaStream_t to_stream(Stream stream) { return static_cast<cudaStream_t>(stream); }

// Raises the dynamic shared memory limit of a kernel, once per kernel and device.
template <auto kKernel>
void allow_shared(int bytes) {
  static std::atomic<std::uint64_t> done{0};
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::uint64_t bit = std::uint64_t{1} << (device & 63);
  if ((done.load(std::memory_order_relaxed) & bit) != 0) return;
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
  done.fetch_or(bit, std::memory_order_relaxed);
}

struct LaunchShape {
  int blocks = 0;
  int threads = 0;
  int shared_bytes = 0;
  int cluster = 1;
};

// A launch that may start while the kernel before it runs: its prologue must end with wait_for_primary().
template <auto kKernel, typename... Arguments>
void launch_dependent(const LaunchShape& shape, Stream stream, const Arguments&... arguments) {
  if (shape.shared_bytes > 0) allow_shared<kKernel>(current_device().shared_bytes_per_block);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(shape.blocks);
  config.blockDim = static_cast<unsigned>(shape.threads);
  config.dynamicSmemBytes = static_cast<std::size_t>(shape.shared_bytes);
  config.stream = to_stream(stream);
  config.attrs = attributes;
  config.numAttrs = !current_device().has_clusters() ? 0 : shape.cluster > 1 ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kKernel, arguments...), "launch");
}

}  // namespace higgs::cuda
