// Random layers and device memory for the CUDA tests.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "higgs/cuda/ops.h"
#include "higgs/higgs.h"

namespace higgs::cuda::test {

inline void ok(cudaError_t status) { ASSERT_EQ(status, cudaSuccess) << cudaGetErrorString(status); }

#define HIGGS_NEEDS_GPU() \
  if (device_count() == 0) GTEST_SKIP() << "no CUDA device"

// Tests with the number of a grid as parameter.
class GridTest : public testing::TestWithParam<int> {
 protected:
  const Grid& grid = grids()[static_cast<std::size_t>(GetParam())];
};
inline std::vector<int> grid_numbers(bool (*wanted)(const Grid&)) {
  std::vector<int> numbers;
  for (std::size_t i = 0; i < grids().size(); ++i) {
    if (wanted(grids()[i])) numbers.push_back(static_cast<int>(i));
  }
  return numbers;
}
inline std::string grid_name(const testing::TestParamInfo<int>& number) {
  return std::string(grids()[static_cast<std::size_t>(number.param)].name);
}

// Device memory, filled with 0xff bytes: NaN in every float type.
template <typename T>
class Buffer {
 public:
  explicit Buffer(std::size_t count) : count_(count) {
    ok(cudaMalloc(reinterpret_cast<void**>(&data_), bytes() + 16));
    poison();
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    ok(cudaMemcpy(data_, host.data(), bytes(), cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }

  void poison() { ok(cudaMemset(data_, 0xff, bytes())); }
  [[nodiscard]] T* data() const { return data_; }
  [[nodiscard]] std::vector<T> host() const {
    std::vector<T> out(count_);
    ok(cudaDeviceSynchronize());
    ok(cudaMemcpy(out.data(), data_, bytes(), cudaMemcpyDeviceToHost));
    return out;
  }

 private:
  [[nodiscard]] std::size_t bytes() const { return count_ * sizeof(T); }
  T* data_ = nullptr;
  std::size_t count_ = 0;
};

inline std::mt19937& generator() {
  static std::mt19937 g(std::random_device{}());
  return g;
}

inline std::vector<float> gaussian(std::size_t count, float sigma = 1.0f) {
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<float> out(count);
  for (float& v : out) v = normal(generator());
  return out;
}

// Values as they are stored in `dtype`: bytes, 2 or 4 each.
inline std::vector<std::uint8_t> stored(const std::vector<float>& values, DType dtype) {
  std::vector<std::uint8_t> out(values.size() * size_of(dtype));
  for (std::size_t i = 0; i < values.size(); ++i) store_f32(out.data(), dtype, static_cast<std::int64_t>(i), values[i]);
  return out;
}
inline std::vector<float> loaded(const std::vector<std::uint8_t>& bytes, DType dtype) {
  std::vector<float> out(bytes.size() / size_of(dtype));
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = load_f32(bytes.data(), dtype, static_cast<std::int64_t>(i));
  return out;
}
inline float rounded(float v, DType dtype) {
  return dtype == DType::f16 ? f16_to_f32(f32_to_f16(v)) : dtype == DType::bf16 ? bf16_to_f32(f32_to_bf16(v)) : v;
}

// A layer with random indices, scales and column scales, on the host and on the device.
struct Layer {
  LayerFormat format;
  std::vector<std::uint8_t> indices;
  std::vector<std::uint16_t> scales;
  std::vector<std::uint16_t> column_scale;
  Buffer<std::uint8_t> device_indices;
  Buffer<std::uint16_t> device_scales;
  Buffer<std::uint16_t> device_column_scale;

  Layer(const Grid& grid, std::int64_t n, std::int64_t k, int block, std::int64_t group)
      : format{&grid, n, k, block, group, generator()()},
        indices(random_bytes(static_cast<std::size_t>(format.index_bytes()))),
        scales(random_f16(static_cast<std::size_t>(n * format.row_groups()))),
        column_scale(random_f16(static_cast<std::size_t>(k))),
        device_indices(indices),
        device_scales(scales),
        device_column_scale(column_scale) {}

  [[nodiscard]] PackedView host() const { return {format, indices.data(), scales.data(), column_scale.data()}; }
  [[nodiscard]] PackedView device() const {
    return {format, device_indices.data(), device_scales.data(), device_column_scale.data()};
  }
  [[nodiscard]] std::string name() const {
    return std::string(format.grid->name) + " n=" + std::to_string(format.n) + " k=" + std::to_string(format.k) +
           " block=" + std::to_string(format.block) + " group=" + std::to_string(format.group);
  }

 private:
  static std::vector<std::uint8_t> random_bytes(std::size_t count) {
    std::vector<std::uint8_t> out(count);
    for (auto& b : out) b = static_cast<std::uint8_t>(generator()());
    return out;
  }
  static std::vector<std::uint16_t> random_f16(std::size_t count) {
    std::uniform_real_distribution<float> uniform(0.5f, 2.0f);
    std::vector<std::uint16_t> out(count);
    for (auto& s : out) s = f32_to_f16(uniform(generator()));
    return out;
  }
};

struct Shape {
  std::int64_t n;
  std::int64_t k;
  int block;
  std::int64_t group;
};

}  // namespace higgs::cuda::test
