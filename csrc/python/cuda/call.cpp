#include "call.h"

namespace vlm_fuse {
namespace {

int device_of(PyObject* like, const char* name) {
  dlpack::Tensor found;
  if (attached.table->tensor_from_py_object_no_sync(like, &found) != 0) throw py::error_already_set();
  if (found.device.device_type != attached.device_type) {
    refuse(PyExc_ValueError, std::string(name) + ": not on a device of this module");
  }
  return found.device.device_id;
}

}  // namespace

Call::Call(PyObject* like, const char* name) : device_(device_of(like, name)), on_device_(device_) {
  device_of_call = device_;
  if (attached.device_type != dlpack::kCUDA) return;
  if (attached.table->current_work_stream(dlpack::kCUDA, device_, &stream_) != 0) throw py::error_already_set();
}

bool at_device_of(PyObject* like) {
  dlpack::Tensor found;
  if (Py_TYPE(like) != attached.tensor_type) return false;
  if (attached.table->tensor_from_py_object_no_sync(like, &found) != 0) {
    PyErr_Clear();
    return false;
  }
  device_of_call = found.device.device_id;
  return found.device.device_type == attached.device_type;
}

int64_t* status_record(PyObject* object) { return flat_or_null<int64_t>(object, 8, "status"); }

}  // namespace vlm_fuse
