// What Python hands over once, when the module is attached to torch.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../dlpack.h"

namespace vlm_fuse {

namespace py = pybind11;

struct Attached {
  const dlpack::ExchangeTable* table = nullptr;
  PyObject* raise = nullptr;           // the status RAISE
  PyObject* recorded_error = nullptr;  // the exception type that carries a record
  PyTypeObject* tensor_type = nullptr;
  PyTypeObject* parameter_type = nullptr;
  PyObject* row_dtypes[4] = {};  // torch's dtypes, in the order of DType
  PyObject* modes[3] = {};       // functions that return 0 or None where no mode of torch is active
};

inline Attached attached;

[[noreturn]] inline void refuse(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw py::error_already_set();
}

}  // namespace vlm_fuse
