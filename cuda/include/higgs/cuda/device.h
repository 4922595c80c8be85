// The device a launch is planned for, and the stream it goes to.
#pragma once

#include <array>
#include <string>

namespace higgs::cuda {

// A cudaStream_t; opaque so that callers need no CUDA headers. Null is the legacy default stream.
using Stream = void*;

struct DeviceProperties {
  std::string name;
  int sm_major = 0;
  int sm_minor = 0;
  int multiprocessors = 0;
  int shared_bytes_per_block = 0;  // opt-in limit
  // Clusters of 1..8 CTAs that can be resident at once, one CTA per multiprocessor: fewer than multiprocessors / size
  // where a processing cluster of the chip does not hold a multiple of the size. 0: unknown.
  std::array<int, 9> resident_clusters{};

  [[nodiscard]] int sm() const noexcept { return 10 * sm_major + sm_minor; }
  [[nodiscard]] bool has_clusters() const noexcept { return sm_major >= 9; }  // and programmatic dependent launch
  [[nodiscard]] int max_clusters(int size) const noexcept {
    const int known = resident_clusters[static_cast<std::size_t>(size)];
    return known > 0 ? known : multiprocessors / size > 0 ? multiprocessors / size : 1;
  }
};

// Number of usable CUDA devices; 0 (no exception) on a machine without driver or GPU.
[[nodiscard]] int device_count() noexcept;

// Properties of the current device, read once per device. Throws Error(cuda).
[[nodiscard]] const DeviceProperties& current_device();

}  // namespace higgs::cuda
