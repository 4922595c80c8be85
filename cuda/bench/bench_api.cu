// C interface of the kernels for bench/python/bench_kernels.py, and the read-only kernel that gives the memory limit.
// Functions return 0 or set higgs_last_error.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "higgs/cuda/ops.h"
#include "higgs/higgs.h"

namespace {

std::string last_error;
higgs::cuda::DeviceProperties planned_for;  // by higgs_plan_for; no multiprocessors: the current device

template <typename Body>
int guarded(const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    last_error = e.what();
    return 1;
  }
}

const higgs::cuda::DeviceProperties& device() {
  return planned_for.multiprocessors > 0 ? planned_for : higgs::cuda::current_device();
}

higgs::LayerFormat make_format(const char* grid, long long n, long long k) {
  const int block = static_cast<int>(std::min<std::int64_t>(1024, k & -k));  // powers of two only on the GPU
  return {&higgs::find_grid(grid), n, k, block, higgs::default_group(k, block), 1};
}

__global__ void __launch_bounds__(512) read_kernel(const uint4* p, long long count, uint32_t* out) {
  uint4 sum = {};
  const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
  long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 7 * stride < count; i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = __ldcs(p + i + j * stride);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum.x ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < count; i += stride) {
    const uint4 v = __ldcs(p + i);
    sum.x ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum.x == 0x12345678) *out = sum.x;
}

}  // namespace

extern "C" {

// Plans from now on as for sm_`sm` with `shared_kb` KB of shared memory per block; 0: as for the current device.
int higgs_plan_for(int sm, int shared_kb) {
  return guarded([&] {
    planned_for = {};
    if (sm == 0) return;
    planned_for.name = "sm_" + std::to_string(sm);
    planned_for.sm_major = sm / 10;
    planned_for.sm_minor = sm % 10;
    planned_for.multiprocessors = higgs::cuda::current_device().multiprocessors;
    planned_for.shared_bytes_per_block = shared_kb * 1024;
  });
}

const char* higgs_last_error() { return last_error.c_str(); }

// Bytes of the stored indices, the scales, the tiled buffer and the weights within it.
int higgs_sizes(const char* grid, long long n, long long k, long long* out) {
  return guarded([&] {
    const auto f = make_format(grid, n, k);
    const auto t = higgs::cuda::tiled_format(f);
    out[0] = f.index_bytes();
    out[1] = 2 * n * f.row_groups();
    out[2] = t.bytes;
    out[3] = f.stored_bytes(false);
  });
}

int higgs_repack(const char* grid, long long n, long long k, const void* indices, const void* scales, void* tiled,
                 void* stream) {
  return guarded([&] {
    higgs::cuda::repack({make_format(grid, n, k), static_cast<const std::uint8_t*>(indices),
                         static_cast<const std::uint16_t*>(scales), nullptr},
                        static_cast<std::byte*>(tiled), stream);
  });
}

int higgs_vector(long long k, void* out, void* stream) {
  return guarded([&] {
    higgs::cuda::rotation_vector(higgs::cuda::VectorKind::input, 1, nullptr, k, static_cast<float*>(out), stream);
  });
}

int higgs_linear(const char* grid, int parts, const long long* n, long long k, int dtype, long long m, const void* x,
                 const void* d, void* const* tiled, void* const* y, void* workspace, void* stream) {
  return guarded([&] {
    std::vector<higgs::cuda::LinearPart> list;
    for (int i = 0; i < parts; ++i) {
      list.push_back({{make_format(grid, n[i], k), static_cast<const std::byte*>(tiled[i])}, nullptr, y[i]});
    }
    higgs::cuda::linear(x, static_cast<higgs::DType>(dtype), m, static_cast<const float*>(d), list, workspace, stream,
                        device());
  });
}

int higgs_linear_workspace(const char* grid, int parts, const long long* n, long long k, int dtype, long long m,
                           long long* bytes) {
  return guarded([&] {
    std::vector<higgs::cuda::LinearPart> list;
    for (int i = 0; i < parts; ++i) list.push_back({{make_format(grid, n[i], k), nullptr}, nullptr, nullptr});
    *bytes = higgs::cuda::linear_workspace_bytes(m, static_cast<higgs::DType>(dtype), list, device());
  });
}

const char* higgs_plan(const char* grid, int parts, const long long* n, long long k, int dtype, long long m) {
  static std::string text;
  guarded([&] {
    std::vector<higgs::LayerFormat> list;
    for (int i = 0; i < parts; ++i) list.push_back(make_format(grid, n[i], k));
    const higgs::cuda::LinearProblem problem{m, static_cast<higgs::DType>(dtype), list};
    text = m > higgs::cuda::kMaxDecodeRows ? higgs::cuda::plan_gemm(problem, device()).to_string()
                                           : higgs::cuda::plan(problem, device()).to_string();
  });
  return text.c_str();
}

int higgs_quantize(const char* grid, long long n, long long k, int dtype, const void* w, void* indices, void* scales,
                   void* stream) {
  return guarded([&] {
    higgs::cuda::quantize(w, static_cast<higgs::DType>(dtype), make_format(grid, n, k), nullptr,
                          static_cast<std::uint8_t*>(indices), static_cast<std::uint16_t*>(scales), nullptr, stream);
  });
}

int higgs_rotate(const void* x, int dtype, long long m, long long k, const void* d, void* out, void* stream) {
  return guarded([&] {
    const auto type = static_cast<higgs::DType>(dtype);
    higgs::cuda::rotate(x, type, m, k, static_cast<int>(std::min<std::int64_t>(1024, k & -k)),
                        static_cast<const float*>(d), out, type, stream);
  });
}

int higgs_dequantize_rotated(const char* grid, long long n, long long k, const void* tiled, void* out, int dtype,
                             void* stream) {
  return guarded([&] {
    higgs::cuda::dequantize_rotated(
        higgs::cuda::TiledView{make_format(grid, n, k), static_cast<const std::byte*>(tiled)}, out,
        static_cast<higgs::DType>(dtype), stream);
  });
}

int higgs_read(const void* p, long long bytes, void* out, void* stream) {
  read_kernel<<<264, 512, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const uint4*>(p), bytes / 16,
                                                                  static_cast<uint32_t*>(out));
  return static_cast<int>(cudaGetLastError());
}

}  // extern "C"
