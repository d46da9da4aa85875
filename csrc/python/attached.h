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
  int32_t device_type = dlpack::kCPU;  // of the tensors that this module takes
};

inline Attached attached;

// The device of the call that runs, for tensors that are not on the CPU.
inline thread_local int32_t device_of_call = 0;

struct FromPython {
  py::object raise, recorded_error, tensor_type, parameter_type;
  py::tuple row_dtypes, modes;
};

// Returns whether the table is one that can be used.
bool attach_to(const py::capsule& table, const FromPython& from);

[[noreturn]] inline void refuse(PyObject* type, const std::string& message) {
  PyErr_SetString(type, message.c_str());
  throw py::error_already_set();
}

}  // namespace vlm_fuse
