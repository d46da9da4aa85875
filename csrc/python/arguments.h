// Plain Python arguments.
#pragma once

#include <optional>

#include "attached.h"

namespace vlm_fuse {

constexpr int64_t kHoldGil = 64 * 1024;  // bytes of output up to which giving the GIL away costs more than it frees

inline int64_t whole(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline bool truth(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw py::error_already_set();
  return value != 0;
}

// A tuple or list, read in place.
class Items {
 public:
  Items(PyObject* object, const char* name) : owned_(PySequence_Fast(object, name)) {
    if (owned_ == nullptr) throw py::error_already_set();
  }
  Items(const Items&) = delete;
  Items& operator=(const Items&) = delete;
  ~Items() { Py_DECREF(owned_); }

  PyObject* const* begin() const { return PySequence_Fast_ITEMS(owned_); }
  int64_t size() const { return PySequence_Fast_GET_SIZE(owned_); }
  PyObject* operator[](int64_t index) const { return PySequence_Fast_GET_ITEM(owned_, index); }

 private:
  PyObject* owned_;
};

template <class Work>
auto without_gil(int64_t bytes, Work&& work) {
  std::optional<py::gil_scoped_release> released;
  if (bytes > kHoldGil) released.emplace();
  return work();
}

}  // namespace vlm_fuse
