// Tensors as the caller gives them, read through torch's DLPack exchange table.
#pragma once

#include <string>

#include "../cpu/batch.h"
#include "../cpu/table.h"
#include "attached.h"

namespace vlm_fuse {

// A view of the tensor, which must be on the device of the call. Valid as long as the tensor.
dlpack::Tensor tensor(PyObject* object, const char* name);

int64_t elements(const dlpack::Tensor& found);
bool contiguous(const dlpack::Tensor& found);
int64_t last_size(const dlpack::Tensor& found, const char* name);
bool is_integer(const dlpack::Tensor& found, int bits);

DType row_dtype(const dlpack::Tensor& found, const char* name);

// (n, D) or (i, P, D) of any strides.
RowTable row_table(const dlpack::Tensor& found, int64_t dim, const char* name);

// Contiguous integers (or bools) of one of several widths. `least`: the narrowest one that is taken.
Integers integers(const dlpack::Tensor& found, int least, const char* name);
Integers integers_or_none(PyObject* object, int least, int64_t count, const char* name);

template <class Value>
Value* flat(const dlpack::Tensor& found, int64_t count, const char* name) {
  const bool is_byte = sizeof(Value) == 1 && (found.dtype.code == dlpack::kBool || found.dtype.code == dlpack::kUInt) &&
                       found.dtype.bits == 8;
  if (!is_byte && !is_integer(found, 8 * sizeof(Value))) {
    refuse(PyExc_TypeError, std::string(name) + ": expected int" + std::to_string(8 * sizeof(Value)));
  }
  if ((count >= 0 && elements(found) != count) || !contiguous(found)) {
    refuse(PyExc_ValueError, std::string(name) + ": expected " + std::to_string(count) + " contiguous elements");
  }
  return static_cast<Value*>(found.data);
}

template <class Value>
Value* flat(PyObject* object, int64_t count, const char* name) {
  return flat<Value>(tensor(object, name), count, name);
}

template <class Value>
Value* flat_or_null(PyObject* object, int64_t count, const char* name) {
  return object == Py_None ? nullptr : flat<Value>(object, count, name);
}

// A tensor of the usual kind: plain, with memory of its own, on the device of the call. False where it is not; never an
// error.
bool usual(PyObject* object, dlpack::Tensor* found);

// Outside of every mode of torch (FakeTensorMode, tracing, torch.func, ...), under which memory is not to be touched.
bool called_plainly();

bool is_whole(const dlpack::Tensor& found, int least);
bool is_row_type(const dlpack::Tensor& found);

}  // namespace vlm_fuse
