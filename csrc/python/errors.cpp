#include "errors.h"

#include <cstring>

#include "tensors.h"

namespace vlm_fuse {
namespace {

py::object as_tuple(const Record& record) {
  return py::make_tuple(record.code, record.sample, record.kind, record.placeholders, record.rows,
                        record.total_placeholders, record.total_rows, record.extra);
}

}  // namespace

void report(const Record& record, PyObject* status) {
  if (record.code == kFine || status == Py_None) return;
  if (status == attached.raise) {
    py::object error = py::reinterpret_steal<py::object>(
        PyObject_CallFunctionObjArgs(attached.recorded_error, as_tuple(record).ptr(), nullptr));
    if (error) PyErr_SetObject(attached.recorded_error, error.ptr());
    throw py::error_already_set();
  }
  int64_t* kept = flat<int64_t>(status, 8, "status");
  if (kept[0] != kFine) return;
  const int64_t fields[] = {record.code,         record.sample, record.kind,
                            record.placeholders, record.rows,   record.total_placeholders,
                            record.total_rows,   record.extra};
  std::memcpy(kept, fields, sizeof fields);
}

}  // namespace vlm_fuse
