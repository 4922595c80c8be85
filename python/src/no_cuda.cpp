// The functions of higgs::cuda in a build without it.
#include "higgs/cuda/grouped.h"
#include "higgs/cuda/ops.h"
#include "higgs/error.h"

namespace higgs::cuda {

namespace {

[[noreturn]] void unsupported() {
  throw Error(ErrorCode::unsupported,
              "this build of higgs has no CUDA kernels; use the CPU, or install with "
              "pip install . -C cmake.define.HIGGS_CUDA=ON");
}

}  // namespace

int device_count() noexcept { return 0; }
const DeviceProperties& current_device() { unsupported(); }
TiledFormat tiled_format(const LayerFormat&) { unsupported(); }
GemmPlan plan_gemm(const LinearProblem&, const DeviceProperties&) { unsupported(); }
LaunchPlan plan(const LinearProblem&, const DeviceProperties&) { unsupported(); }
std::string LaunchPlan::to_string() const { unsupported(); }
std::string GemmPlan::to_string() const { unsupported(); }
void rotation_vector(VectorKind, std::uint64_t, const std::uint16_t*, std::int64_t, float*, Stream) { unsupported(); }
void rotate(const void*, DType, std::int64_t, std::int64_t, int, const float*, void*, DType, Stream) { unsupported(); }
void dequantize(const PackedView&, void*, DType, Stream) { unsupported(); }
void dequantize_rotated(const PackedView&, void*, DType, Stream) { unsupported(); }
void dequantize_rotated(const TiledView&, std::int64_t, std::int64_t, void*, DType, Stream) { unsupported(); }
void quantize(const void*, DType, const LayerFormat&, const std::uint16_t*, std::uint8_t*, std::uint16_t*, double*,
              Stream) {
  unsupported();
}
void repack(const PackedView&, std::byte*, Stream) { unsupported(); }
void unrepack(const TiledView&, std::uint8_t*, std::uint16_t*, Stream) { unsupported(); }
void linear(const void*, DType, std::int64_t, const float*, std::span<const LinearPart>, void*, Stream,
            const DeviceProperties&) {
  unsupported();
}
GroupedPlan plan_grouped(const GroupedProblem&, const DeviceProperties&) { unsupported(); }
std::string GroupedPlan::to_string() const { unsupported(); }
void grouped_linear(const GroupedProblem&, const std::byte*, const void*, const float*, const std::int32_t*, void*,
                    void*, Stream, const DeviceProperties&) {
  unsupported();
}
std::int64_t grouped_linear_max_rows(const LayerFormat&, int, DType, const DeviceProperties&) { unsupported(); }
std::int64_t linear_max_rows(DType, const LayerFormat&, const DeviceProperties&) { unsupported(); }
std::int64_t linear_workspace_bytes(std::int64_t, DType, std::span<const LinearPart>, const DeviceProperties&) {
  unsupported();
}

}  // namespace higgs::cuda
