// higgs._core: adapts types and nothing else. Buffers come as integer addresses, dtypes as 0 = float32, 1 = float16,
// 2 = bfloat16; _ops.py has checked device, dtype and contiguity. Every call that works on buffers releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "higgs/higgs.h"

namespace py = pybind11;

void bind_allocate(py::module_& m);  // allocate.cpp

namespace {

using higgs::DType;
using Address = std::uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT: what an address from Python is
}

DType dtype_of(int code) {
  if (code < 0 || code > 2) {
    throw higgs::Error(higgs::ErrorCode::type, "dtype code " + std::to_string(code) + "; use 0, 1 or 2");
  }
  return static_cast<DType>(code);
}

higgs::ConstMatrixView in_view(Address data, int dtype, std::int64_t rows, std::int64_t cols) {
  return {pointer<const std::byte>(data), dtype_of(dtype), rows, cols};
}
higgs::MatrixView out_view(Address data, int dtype, std::int64_t rows, std::int64_t cols) {
  return {pointer<std::byte>(data), dtype_of(dtype), rows, cols};
}

higgs::LayerFormat layer_format(const std::string& grid, std::int64_t n, std::int64_t k, int block, std::int64_t group,
                                std::uint64_t seed) {
  higgs::LayerFormat f{&higgs::find_grid(grid), n, k, block, group, seed};
  higgs::validate(f);
  return f;
}

higgs::PackedView packed_view(const higgs::LayerFormat& format, Address indices, Address scales, Address column_scale) {
  return {format, pointer<const std::uint8_t>(indices), pointer<const std::uint16_t>(scales),
          pointer<const std::uint16_t>(column_scale)};
}

PyObject* python_exception(higgs::ErrorCode code, const py::module_& errors) {
  switch (code) {
    case higgs::ErrorCode::invalid_argument: return PyExc_ValueError;
    case higgs::ErrorCode::type: return PyExc_TypeError;
    case higgs::ErrorCode::unsupported: return errors.attr("UnsupportedError").ptr();
    case higgs::ErrorCode::format: return errors.attr("FormatError").ptr();
    case higgs::ErrorCode::io: return PyExc_OSError;
    case higgs::ErrorCode::cuda: return errors.attr("CudaError").ptr();
  }
  return PyExc_RuntimeError;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const higgs::Error& e) {
      PyErr_SetString(python_exception(e.code(), py::module_::import("higgs.errors")), e.what());
    }
  });

  m.attr("version") = HIGGS_VERSION;
  m.attr("format_version") = higgs::kFormatVersion;
#ifdef HIGGS_WITH_CUDA
  m.attr("with_cuda") = true;
#else
  m.attr("with_cuda") = false;
#endif

  py::class_<higgs::Grid>(m, "Grid", "A grid: n_points points in R^p, MSE-optimal for N(0, I_p).")
      .def_property_readonly("name", [](const higgs::Grid& g) { return std::string(g.name); })
      .def_readonly("p", &higgs::Grid::p)
      .def_readonly("n_points", &higgs::Grid::n_points)
      .def_readonly("index_bits", &higgs::Grid::index_bits)
      .def_readonly("t2", &higgs::Grid::t2, "E ||x - Q(x)||^2 / p for x ~ N(0, I_p)")
      .def_property_readonly("rate", &higgs::Grid::rate, "bits per weight without scales")
      .def_property_readonly("points",
                             [](const higgs::Grid& g) {
                               py::list rows;
                               for (int i = 0; i < g.n_points; ++i) {
                                 py::list row;
                                 for (int c = 0; c < g.p; ++c)
                                   row.append(g.points[static_cast<std::size_t>(i) * g.p + c]);
                                 rows.append(row);
                               }
                               return rows;
                             })
      .def("__repr__", [](const higgs::Grid& g) { return "<higgs grid " + std::string(g.name) + ">"; });
  m.def("grids", [] {
    py::list list;
    for (const higgs::Grid& g : higgs::grids()) list.append(py::cast(g, py::return_value_policy::reference));
    return list;
  });
  m.def(
      "find_grid", [](const std::string& name) { return &higgs::find_grid(name); }, py::return_value_policy::reference);
  m.def("grid_for_bits", [](double bits) { return &higgs::grid_for_bits(bits); }, py::return_value_policy::reference);

  m.def("default_block", &higgs::default_block);
  m.def("default_group", &higgs::default_group);
  m.def(
      "check_format",
      [](const std::string& grid, std::int64_t n, std::int64_t k, int block, std::int64_t group) {
        const higgs::LayerFormat f = layer_format(grid, n, k, block, group, 0);
        return py::make_tuple(f.row_bytes(), f.row_groups());
      },
      "(bytes of indices, number of scales) of one row; raises ValueError if the format is not legal");
  m.def("format_bits", [](const std::string& grid, std::int64_t n, std::int64_t k, int block, std::int64_t group,
                          bool column_scale) { return layer_format(grid, n, k, block, group, 0).bits(column_scale); });

  m.def("quantize",
        [](const std::string& grid, std::int64_t n, std::int64_t k, int block, std::int64_t group, std::uint64_t seed,
           Address w, int w_dtype, Address column_scale, Address indices, Address scales) {
          const higgs::LayerFormat f = layer_format(grid, n, k, block, group, seed);
          const py::gil_scoped_release release;
          const higgs::QuantizeResult r =
              higgs::quantize(in_view(w, w_dtype, n, k), f, pointer<const std::uint16_t>(column_scale),
                              pointer<std::uint8_t>(indices), pointer<std::uint16_t>(scales));
          return r.t2();
        });
  m.def("dequantize",
        [](const std::string& grid, std::int64_t n, std::int64_t k, int block, std::int64_t group, std::uint64_t seed,
           Address indices, Address scales, Address column_scale, Address out, int out_dtype) {
          const higgs::LayerFormat f = layer_format(grid, n, k, block, group, seed);
          const py::gil_scoped_release release;
          higgs::dequantize(packed_view(f, indices, scales, column_scale), out_view(out, out_dtype, n, k));
        });
  m.def("linear", [](const std::string& grid, std::int64_t n, std::int64_t k, int block, std::int64_t group,
                     std::uint64_t seed, Address indices, Address scales, Address column_scale, Address x, int x_dtype,
                     std::int64_t rows, Address bias, Address y, int y_dtype) {
    const higgs::LayerFormat f = layer_format(grid, n, k, block, group, seed);
    const py::gil_scoped_release release;
    higgs::matmul(in_view(x, x_dtype, rows, k), packed_view(f, indices, scales, column_scale),
                  pointer<const void>(bias), out_view(y, y_dtype, rows, n));
  });
  m.def("rotate",
        [](Address in, int dtype, std::int64_t rows, std::int64_t cols, int block, std::uint64_t seed, Address out) {
          const py::gil_scoped_release release;
          higgs::rotate(in_view(in, dtype, rows, cols), block, seed, {}, out_view(out, 0, rows, cols));
        });
  m.def("unrotate", [](Address in, std::int64_t rows, std::int64_t cols, int block, std::uint64_t seed, Address out) {
    const py::gil_scoped_release release;
    higgs::unrotate(in_view(in, 0, rows, cols), block, seed, {}, out_view(out, 0, rows, cols));
  });

  bind_allocate(m);

  m.def("num_threads", &higgs::num_threads);
  m.def("set_num_threads", &higgs::set_num_threads);
  m.def("supported_isas", [] {
    py::list names;
    for (const higgs::Isa isa : higgs::supported_isas()) names.append(higgs::name_of(isa));
    return names;
  });
  m.def("current_isa", [] { return higgs::name_of(higgs::current_isa()); });
  m.def("set_isa", [](const std::string& name) {
    for (const higgs::Isa isa : {higgs::Isa::portable, higgs::Isa::avx2, higgs::Isa::avx512}) {
      if (name == higgs::name_of(isa)) return higgs::set_isa(isa);
    }
    throw higgs::Error(higgs::ErrorCode::invalid_argument, "isa '" + name + "'; use portable, avx2 or avx512");
  });
}
