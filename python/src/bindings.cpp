// higgs._core: adapts types and nothing else.
#include "adapt.h"

void bind_allocate(py::module_& m);  // allocate.cpp

namespace {

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

  py::class_<higgs::Grid>(m, "Grid", "A vector grid, MSE-optimal for N(0, I_p), or a trellis grid (grid.h).")
      .def_property_readonly("name", [](const higgs::Grid& g) { return std::string(g.name); })
      .def_readonly("p", &higgs::Grid::p)
      .def_readonly("n_points", &higgs::Grid::n_points)
      .def_readonly("index_bits", &higgs::Grid::index_bits, "bits stored per p weights")
      .def_readonly("window_bits", &higgs::Grid::window_bits, "bits that choose a point")
      .def_property_readonly("family", [](const higgs::Grid& g) { return g.trellis == nullptr ? "vector" : "trellis"; })
      .def_property_readonly(
          "run_group", [](const higgs::Grid& g) { return g.trellis ? g.trellis->run_group : 0; },
          "columns of a group of runs of a trellis grid (packed_format.h), else 0")
      .def_property_readonly(
          "runs", [](const higgs::Grid& g) { return g.trellis ? g.trellis->runs : 0; }, "of a group")
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
  py::class_<higgs::LayerFormat>(m, "Format", "How a weight matrix is stored; a legal one.")
      .def(py::init(&layer_format), py::arg("grid"), py::arg("n"), py::arg("k"), py::arg("block"), py::arg("group"),
           py::arg("seed"), "Raises ValueError if the format is not legal")
      .def_property_readonly("row_bytes", &higgs::LayerFormat::row_bytes)
      .def_property_readonly("row_groups", &higgs::LayerFormat::row_groups)
      .def("bits", &higgs::LayerFormat::bits);

  m.def(
      "quantize",
      [](const higgs::LayerFormat& f, Address w, int w_dtype, Address column_scale, Address indices, Address scales) {
        return higgs::quantize(in_view(w, w_dtype, f.n, f.k), f, pointer<const std::uint16_t>(column_scale),
                               pointer<std::uint8_t>(indices), pointer<std::uint16_t>(scales))
            .t2();
      },
      ReleaseGil());
  m.def(
      "dequantize",
      [](const higgs::LayerFormat& f, Address indices, Address scales, Address column_scale, Address out,
         int out_dtype) {
        higgs::dequantize(packed_view(f, indices, scales, column_scale), out_view(out, out_dtype, f.n, f.k));
      },
      ReleaseGil());
  m.def(
      "linear",
      [](const higgs::LayerFormat& f, Address indices, Address scales, Address column_scale, Address x, int dtype,
         std::int64_t rows, Address bias, Address y) {
        higgs::matmul(in_view(x, dtype, rows, f.k), packed_view(f, indices, scales, column_scale),
                      pointer<const void>(bias), out_view(y, dtype, rows, f.n));
      },
      ReleaseGil());
  m.def(
      "grouped_linear",
      [](const higgs::LayerFormat& f, Address indices, Address scales, Address column_scale, Address x, int dtype,
         std::int64_t rows, Address offsets, int experts, Address y) {
        const std::span ends(pointer<const std::int32_t>(offsets), static_cast<std::size_t>(experts));
        higgs::grouped_matmul(in_view(x, dtype, rows, f.k), ends, packed_view(f, indices, scales, column_scale),
                              out_view(y, dtype, rows, f.n / experts));
      },
      ReleaseGil());
  m.def(
      "rotate",
      [](Address in, int dtype, std::int64_t rows, std::int64_t cols, int block, std::uint64_t seed, Address out) {
        higgs::rotate(in_view(in, dtype, rows, cols), block, seed, {}, out_view(out, 0, rows, cols));
      },
      ReleaseGil());
  m.def(
      "unrotate",
      [](Address in, std::int64_t rows, std::int64_t cols, int block, std::uint64_t seed, Address out) {
        higgs::unrotate(in_view(in, 0, rows, cols), block, seed, {}, out_view(out, 0, rows, cols));
      },
      ReleaseGil());
  bind_cuda(m);

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
