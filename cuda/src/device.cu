#include <cuda_runtime.h>

#include <mutex>
#include <vector>

#include "higgs/cuda/device.h"
#include "launch.h"

namespace higgs::cuda {
namespace {

__global__ void whole_multiprocessor() {}  // launched nowhere

// Asks the driver with a kernel that, by its shared memory, has a multiprocessor to itself.
std::array<int, 9> resident_clusters(const cudaDeviceProp& p) {
  std::array<int, 9> out{};
  if (p.major < 9) return out;
  const int shared = static_cast<int>(p.sharedMemPerBlockOptin);
  check(cudaFuncSetAttribute(whole_multiprocessor, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "cudaFuncSetAttribute");
  for (unsigned size = 1; size <= 8; ++size) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {size, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = size;
    config.blockDim = 128;
    config.dynamicSmemBytes = static_cast<std::size_t>(shared);
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaOccupancyMaxActiveClusters(&out[size], whole_multiprocessor, &config), "cudaOccupancyMaxActiveClusters");
  }
  return out;
}

}  // namespace

int device_count() noexcept {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

const DeviceProperties& current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  static std::mutex mutex;
  static std::vector<DeviceProperties*> known;  // never freed: references are handed out
  const std::lock_guard lock(mutex);
  if (known.size() <= static_cast<std::size_t>(device)) known.resize(static_cast<std::size_t>(device) + 1);
  DeviceProperties*& slot = known[static_cast<std::size_t>(device)];
  if (slot == nullptr) {
    cudaDeviceProp p;
    check(cudaGetDeviceProperties(&p, device), "cudaGetDeviceProperties");
    slot = new DeviceProperties{p.name,
                                p.major,
                                p.minor,
                                p.multiProcessorCount,
                                static_cast<int>(p.sharedMemPerBlockOptin),
                                resident_clusters(p)};
  }
  return *slot;
}

}  // namespace higgs::cuda
