// New tensors of torch's own allocator, which knows streams and graphs, at half the cost of calling new_empty: through
// the C functions that torch's compiled models use (stable since torch 2.2), where this torch has them.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../attached.h"

namespace vlm_fuse {

// torch's tensor behind a handle of its C functions.
using TensorHandle = struct OpaqueTensor*;

// How torch is asked. Without the functions: by new_empty.
struct Allocation {
  static constexpr size_t kDTypes = 8;
  PyObject* dtypes[kDTypes] = {};  // int32, int64, bool, uint8, and those of rows
  int32_t codes[kDTypes] = {};     // what the functions call them
  int32_t device_type = 0;         // what they call the device of this module
  int32_t (*empty)(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type,
                   int32_t device, TensorHandle* made) = nullptr;  // aoti_torch_empty_strided
  int32_t (*release)(TensorHandle) = nullptr;                      // aoti_torch_delete_tensor_object
  PyObject* (*to_python)(TensorHandle) = nullptr;                  // THPVariable_Wrap(const at::TensorBase&)

  PyObject* int32() const { return dtypes[0]; }
  PyObject* int64() const { return dtypes[1]; }
  PyObject* boolean() const { return dtypes[2]; }
  PyObject* uint8() const { return dtypes[3]; }
};

inline Allocation allocation;

// `functions`: the addresses of empty, release and to_python, or three times 0.
void attach_allocation(const py::tuple& dtypes, const py::tuple& codes, int32_t device_type,
                       const py::tuple& functions);

// On the device of the call, which is that of `like`. `dtype`: one of Allocation's.
py::object new_tensor(PyObject* like, std::initializer_list<int64_t> shape, PyObject* dtype);

// `shape`: a tuple of ints.
py::object new_tensor(PyObject* like, PyObject* shape, PyObject* dtype);

// Rows as they were handed in, or new ones where `out` is a dtype.
py::object given_or_new_rows(PyObject* like, PyObject* out, std::initializer_list<int64_t> shape);

}  // namespace vlm_fuse
