// higgs::cuda in Python: device addresses and a stream as integers; the caller has made the tensors' device current.
#include <vector>

#include "adapt.h"
#include "higgs/cuda/grouped.h"
#include "higgs/cuda/ops.h"

namespace {

namespace cuda = higgs::cuda;
using higgs::LayerFormat;
using Formats = std::vector<const LayerFormat*>;
using Addresses = std::vector<Address>;

cuda::Stream stream_of(Address stream) { return pointer<void>(stream); }

cuda::TiledView tiled_view(const LayerFormat& format, Address data) { return {format, pointer<const std::byte>(data)}; }

std::vector<cuda::LinearPart> linear_parts(const Formats& formats, const Addresses& tiled, const Addresses& biases,
                                           const Addresses& ys) {
  std::vector<cuda::LinearPart> parts;
  for (std::size_t i = 0; i < formats.size(); ++i) {
    parts.push_back({tiled_view(*formats[i], tiled.at(i)), pointer<const void>(biases.at(i)), pointer<void>(ys.at(i))});
  }
  return parts;
}

std::string plan_text(const Formats& formats, std::int64_t m, int dtype) {
  std::vector<LayerFormat> matrices;
  for (const LayerFormat* f : formats) matrices.push_back(*f);
  const cuda::LinearProblem problem{m, dtype_of(dtype), matrices};
  const cuda::DeviceProperties& device = cuda::current_device();
  return m > cuda::kMaxDecodeRows ? cuda::plan_gemm(problem, device).to_string()
                                  : cuda::plan(problem, device).to_string();
}

py::dict current_device() {
  const cuda::DeviceProperties& p = cuda::current_device();
  py::dict d;
  d["name"] = p.name;
  d["sm"] = p.sm();
  d["multiprocessors"] = p.multiprocessors;
  d["shared_bytes_per_block"] = p.shared_bytes_per_block;
  return d;
}

void bind_layouts(py::module_& m) {
  m.def("cuda_tiled_bytes", [](const LayerFormat& f) { return cuda::tiled_format(f).bytes; });
  m.def(
      "cuda_repack",
      [](const LayerFormat& f, Address indices, Address scales, Address tiled, Address stream) {
        cuda::repack(packed_view(f, indices, scales, 0), pointer<std::byte>(tiled), stream_of(stream));
      },
      ReleaseGil());
  m.def(
      "cuda_unrepack",
      [](const LayerFormat& f, Address tiled, Address indices, Address scales, Address stream) {
        cuda::unrepack(tiled_view(f, tiled), pointer<std::uint8_t>(indices), pointer<std::uint16_t>(scales),
                       stream_of(stream));
      },
      ReleaseGil());
  m.def(
      "cuda_quantize",
      [](const LayerFormat& f, Address w, int w_dtype, Address column_scale, Address indices, Address scales,
         Address row_stats, Address stream) {
        cuda::quantize(pointer<const void>(w), dtype_of(w_dtype), f, pointer<const std::uint16_t>(column_scale),
                       pointer<std::uint8_t>(indices), pointer<std::uint16_t>(scales), pointer<double>(row_stats),
                       stream_of(stream));
      },
      ReleaseGil());
  m.def(
      "cuda_dequantize",
      [](const LayerFormat& f, Address indices, Address scales, Address column_scale, Address out, int out_dtype,
         Address stream) {
        cuda::dequantize(packed_view(f, indices, scales, column_scale), pointer<void>(out), dtype_of(out_dtype),
                         stream_of(stream));
      },
      ReleaseGil());
  m.def(
      "cuda_dequantize_rotated",
      [](const LayerFormat& f, Address indices, Address scales, Address out, int out_dtype, Address stream) {
        cuda::dequantize_rotated(packed_view(f, indices, scales, 0), pointer<void>(out), dtype_of(out_dtype),
                                 stream_of(stream));
      },
      ReleaseGil());
  m.def(
      "cuda_dequantize_rotated_tiled",
      [](const LayerFormat& f, Address tiled, std::int64_t first_row, std::int64_t rows, Address out, int out_dtype,
         Address stream) {
        cuda::dequantize_rotated(tiled_view(f, tiled), first_row, rows, pointer<void>(out), dtype_of(out_dtype),
                                 stream_of(stream));
      },
      ReleaseGil());
}

void bind_linear(py::module_& m) {
  m.def(
      "cuda_input_vector",
      [](const LayerFormat& f, Address column_scale, Address out, Address stream) {
        cuda::rotation_vector(cuda::VectorKind::input, f.seed, pointer<const std::uint16_t>(column_scale), f.k,
                              pointer<float>(out), stream_of(stream));
      },
      ReleaseGil());
  m.def(
      "cuda_rotate",
      [](Address in, int in_dtype, std::int64_t rows, std::int64_t k, int block, Address vector, Address out,
         int out_dtype, Address stream) {
        cuda::rotate(pointer<const void>(in), dtype_of(in_dtype), rows, k, block, pointer<const float>(vector),
                     pointer<void>(out), dtype_of(out_dtype), stream_of(stream));
      },
      ReleaseGil());
  m.def("cuda_linear_max_rows",
        [](const LayerFormat& f, int dtype) { return cuda::linear_max_rows(dtype_of(dtype), f); });
  m.def("cuda_linear_workspace_bytes", [](const Formats& formats, std::int64_t rows, int dtype) {
    const Addresses none(formats.size());
    return cuda::linear_workspace_bytes(rows, dtype_of(dtype), linear_parts(formats, none, none, none));
  });
  m.def(
      "cuda_linear",
      [](const Formats& formats, const Addresses& tiled, const Addresses& biases, const Addresses& ys, Address x,
         int dtype, std::int64_t rows, Address input_vector, Address workspace, Address stream) {
        cuda::linear(pointer<const void>(x), dtype_of(dtype), rows, pointer<const float>(input_vector),
                     linear_parts(formats, tiled, biases, ys), pointer<void>(workspace), stream_of(stream));
      },
      ReleaseGil());
  m.def("cuda_plan", &plan_text, "The launch that `cuda_linear` would make on the current device, in words");
}

void bind_grouped(py::module_& m) {
  m.def(
      "cuda_grouped_linear",
      [](const LayerFormat& f, int experts, Address tiled, Address x, int dtype, std::int64_t rows,
         Address input_vector, Address offsets, Address y, Address workspace, Address stream) {
        cuda::grouped_linear({f, experts, rows, dtype_of(dtype)}, pointer<const std::byte>(tiled),
                             pointer<const void>(x), pointer<const float>(input_vector),
                             pointer<const std::int32_t>(offsets), pointer<void>(y), pointer<void>(workspace),
                             stream_of(stream));
      },
      ReleaseGil());
  m.def("cuda_grouped_linear_max_rows", [](const LayerFormat& f, int experts, int dtype) {
    return cuda::grouped_linear_max_rows(f, experts, dtype_of(dtype));
  });
  m.def(
      "cuda_grouped_plan",
      [](const LayerFormat& f, int experts, std::int64_t rows, int dtype) {
        return cuda::plan_grouped({f, experts, rows, dtype_of(dtype)}, cuda::current_device()).to_string();
      },
      "The launch that `cuda_grouped_linear` would make on the current device, in words");
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_device_count", &cuda::device_count);
  m.def("cuda_current_device", &current_device);
  bind_layouts(m);
  bind_linear(m);
  bind_grouped(m);
}
