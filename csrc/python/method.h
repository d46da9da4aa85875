// Functions of the modules as Python calls them.
#pragma once

#include "attached.h"

namespace vlm_fuse {

// Arguments come by position, unparsed: a third of the cost of a small call.
template <PyObject* (*Function)(PyObject* const*), int Arguments>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != Arguments) {
    PyErr_Format(PyExc_TypeError, "expected %d arguments, got %zd", Arguments, count);
    return nullptr;
  }
  try {
    return Function(args);
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <PyObject* (*Function)(PyObject* const*), int Arguments>
PyMethodDef method(const char* name, const char* doc) {
  auto* pointer = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<Function, Arguments>));
  return {name, pointer, METH_FASTCALL, doc};
}

}  // namespace vlm_fuse
