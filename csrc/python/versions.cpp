#include "versions.h"

namespace vlm_fuse {

py::tuple versions(PyObject* const* tensors) {
  static PyObject* const name = PyUnicode_InternFromString("_version");
  constexpr int kCount = 4;
  py::tuple found(kCount);
  for (int i = 0; i < kCount; ++i) {
    PyObject* version = tensors[i] == Py_None ? Py_NewRef(Py_True) : PyObject_GetAttr(tensors[i], name);
    if (version == nullptr) {
      PyErr_Clear();
      return py::tuple();
    }
    PyTuple_SET_ITEM(found.ptr(), i, version);
  }
  return found;
}

}  // namespace vlm_fuse
