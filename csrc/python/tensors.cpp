#include "tensors.h"

namespace vlm_fuse {

dlpack::Tensor tensor(PyObject* object, const char* name) {
  if (attached.table == nullptr) refuse(PyExc_RuntimeError, "vlm_fuse._native: attach() has not been called");
  dlpack::Tensor found;
  if (attached.table->tensor_from_py_object_no_sync(object, &found) != 0) throw py::error_already_set();
  if (found.device.device_type != attached.device_type || found.device.device_id != device_of_call) {
    refuse(PyExc_ValueError, std::string(name) + ": not on the device of this call");
  }
  found.data = static_cast<char*>(found.data) + found.byte_offset;
  return found;
}

int64_t elements(const dlpack::Tensor& found) {
  int64_t count = 1;
  for (int32_t i = 0; i < found.ndim; ++i) count *= found.shape[i];
  return count;
}

bool contiguous(const dlpack::Tensor& found) {
  if (elements(found) == 0) return true;
  int64_t expected = 1;
  for (int32_t i = found.ndim - 1; i >= 0; --i) {
    if (found.shape[i] != 1 && found.strides[i] != expected) return false;
    expected *= found.shape[i];
  }
  return true;
}

int64_t last_size(const dlpack::Tensor& found, const char* name) {
  if (found.ndim < 1) refuse(PyExc_ValueError, std::string(name) + ": has no dimensions");
  return found.shape[found.ndim - 1];
}

DType row_dtype(const dlpack::Tensor& found, const char* name) {
  if (found.dtype.lanes == 1 && found.dtype.code == dlpack::kFloat) {
    if (found.dtype.bits == 32) return DType::kF32;
    if (found.dtype.bits == 16) return DType::kF16;
    if (found.dtype.bits == 64) return DType::kF64;
  }
  if (found.dtype.lanes == 1 && found.dtype.code == dlpack::kBfloat && found.dtype.bits == 16) return DType::kBF16;
  refuse(PyExc_TypeError, std::string(name) + ": expected float32, bfloat16, float16 or float64");
}

RowTable row_table(const dlpack::Tensor& found, int64_t dim, const char* name) {
  if (found.ndim < 2 || found.ndim > 3 || last_size(found, name) != dim) {
    refuse(PyExc_ValueError, std::string(name) + ": expected two or three dimensions, the last of the hidden size");
  }
  RowTable table;
  table.data = static_cast<char*>(found.data);
  table.dtype = row_dtype(found, name);
  const int64_t size = size_of(table.dtype);
  table.step = dim > 1 ? found.strides[found.ndim - 1] * size : size;
  table.inner = found.shape[found.ndim - 2];
  table.row_stride = found.strides[found.ndim - 2] * size;
  table.rows = table.inner;
  if (found.ndim == 2) return table;
  const int64_t outer = found.shape[0];
  table.rows *= outer;
  table.outer_stride = found.strides[0] * size;
  if (table.inner == 1) table.row_stride = table.outer_stride;
  if (outer <= 1 || table.outer_stride == table.inner * table.row_stride) table.inner = table.rows;
  return table;
}

bool is_integer(const dlpack::Tensor& found, int bits) {
  return found.dtype.lanes == 1 && found.dtype.code == dlpack::kInt && found.dtype.bits == bits;
}

Integers integers(const dlpack::Tensor& found, int least, const char* name) {
  const uint8_t code = found.dtype.code, bits = found.dtype.bits;
  const bool byte = bits == 8 && (code == dlpack::kBool || code == dlpack::kUInt);
  const bool whole = code == dlpack::kInt && (bits == 8 || bits == 16 || bits == 32 || bits == 64);
  if (!(byte || whole) || found.dtype.lanes != 1 || bits < least) {
    refuse(PyExc_TypeError, std::string(name) + ": of a type that is not taken here");
  }
  if (!contiguous(found)) refuse(PyExc_ValueError, std::string(name) + ": not contiguous");
  static const int64_t nothing = 0;  // an empty tensor has no memory, but is not absent
  return {found.data == nullptr ? &nothing : found.data, bits / 8};
}

Integers integers_or_none(PyObject* object, int least, int64_t count, const char* name) {
  if (object == Py_None) return {};
  const dlpack::Tensor found = tensor(object, name);
  if (elements(found) != count) refuse(PyExc_ValueError, std::string(name) + ": not of the size of the tokens");
  return integers(found, least, name);
}

namespace {

bool plain_tensor(PyObject* object) {
  return Py_TYPE(object) == attached.tensor_type || Py_TYPE(object) == attached.parameter_type;
}

// Negated lazily: torch's dispatcher resolves that, whoever reads the memory sees the values before.
bool negated(PyObject* object) {
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* found = PyObject_CallMethodNoArgs(object, is_neg);
  const bool yes = found != Py_False;
  if (found == nullptr) PyErr_Clear();
  Py_XDECREF(found);
  return yes;
}

}  // namespace

bool usual(PyObject* object, dlpack::Tensor* found) {
  if (!plain_tensor(object)) return false;
  if (attached.table->tensor_from_py_object_no_sync(object, found) != 0) {
    PyErr_Clear();
    return false;
  }
  if (found->device.device_type != attached.device_type || found->device.device_id != device_of_call) return false;
  if (found->dtype.lanes != 1) return false;
  return !is_row_type(*found) || !negated(object);
}

bool called_plainly() {
  for (PyObject* mode : attached.modes) {
    PyObject* found = mode == Py_None ? nullptr : PyObject_CallNoArgs(mode);
    const bool none = found == Py_None || (found != nullptr && PyLong_CheckExact(found) && PyLong_AsLong(found) == 0);
    if (found == nullptr) PyErr_Clear();
    Py_XDECREF(found);
    if (!none) return false;
  }
  return true;
}

bool is_whole(const dlpack::Tensor& found, int least) {
  if (found.dtype.code == dlpack::kInt) return found.dtype.bits >= least;
  return least == 8 && found.dtype.bits == 8 &&
         (found.dtype.code == dlpack::kBool || found.dtype.code == dlpack::kUInt);
}

bool is_row_type(const dlpack::Tensor& found) {
  const int bits = found.dtype.bits;
  return (found.dtype.code == dlpack::kFloat && (bits == 16 || bits == 32 || bits == 64)) ||
         (found.dtype.code == dlpack::kBfloat && bits == 16);
}

}  // namespace vlm_fuse
