// What Python passes, in C++ terms: buffers as integer addresses, dtypes as 0 = float32, 1 = float16, 2 = bfloat16;
// higgs/_ops.py and its like have checked device, dtype and contiguity.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "higgs/higgs.h"

namespace py = pybind11;

using Address = std::uintptr_t;
using ReleaseGil = py::call_guard<py::gil_scoped_release>;  // for every call that works on buffers

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT: what an address from Python is
}

inline higgs::DType dtype_of(int code) {
  if (code < 0 || code > 2) {
    throw higgs::Error(higgs::ErrorCode::type, "dtype code " + std::to_string(code) + "; use 0, 1 or 2");
  }
  return static_cast<higgs::DType>(code);
}

inline higgs::PackedView packed_view(const higgs::LayerFormat& format, Address indices, Address scales,
                                     Address column_scale) {
  return {format, pointer<const std::uint8_t>(indices), pointer<const std::uint16_t>(scales),
          pointer<const std::uint16_t>(column_scale)};
}

void bind_cuda(py::module_& m);
