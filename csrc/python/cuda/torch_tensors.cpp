#include "torch_tensors.h"

#include <algorithm>
#include <memory>

#include "../arguments.h"

namespace vlm_fuse {
namespace {

constexpr size_t kMostDims = 8;

// An exception of torch, such as that it is out of memory, is for new_empty to raise: then null.
PyObject* from_functions(const int64_t* sizes, size_t dims, PyObject* dtype) {
  const auto* found = std::find(allocation.dtypes, allocation.dtypes + Allocation::kDTypes, dtype);
  const auto number = static_cast<size_t>(found - allocation.dtypes);
  if (allocation.empty == nullptr || number == Allocation::kDTypes) return nullptr;
  int64_t strides[kMostDims], stride = 1;
  for (size_t i = dims; i-- > 0;) {
    if (sizes[i] < 0) return nullptr;
    strides[i] = stride;
    if (__builtin_mul_overflow(stride, std::max<int64_t>(sizes[i], 1), &stride)) return nullptr;
  }
  TensorHandle made = nullptr;
  if (allocation.empty(static_cast<int64_t>(dims), sizes, strides, allocation.codes[number], allocation.device_type,
                       device_of_call, &made) != 0) {
    return nullptr;
  }
  const std::unique_ptr<OpaqueTensor, int32_t (*)(TensorHandle)> owned(made, allocation.release);
  PyObject* object = allocation.to_python(made);
  if (object == nullptr) throw py::error_already_set();
  return object;
}

PyObject* from_new_empty(PyObject* like, const int64_t* sizes, size_t dims, PyObject* dtype) {
  py::tuple shape(dims);
  for (size_t i = 0; i < dims; ++i) shape[i] = sizes[i];
  return py::reinterpret_borrow<py::object>(like)
      .attr("new_empty")(shape, py::arg("dtype") = py::reinterpret_borrow<py::object>(dtype))
      .release()
      .ptr();
}

py::object make(PyObject* like, const int64_t* sizes, size_t dims, PyObject* dtype) {
  PyObject* made = from_functions(sizes, dims, dtype);
  if (made == nullptr) made = from_new_empty(like, sizes, dims, dtype);
  return py::reinterpret_steal<py::object>(made);
}

// A function of torch by its address.
template <class Function>
void set(Function* function, const py::handle& address) {
  *function = reinterpret_cast<Function>(PyLong_AsVoidPtr(address.ptr()));
}

}  // namespace

void attach_allocation(const py::tuple& dtypes, const py::tuple& codes, int32_t device_type,
                       const py::tuple& functions) {
  for (size_t i = 0; i < Allocation::kDTypes; ++i) {
    allocation.dtypes[i] = py::object(dtypes[i]).release().ptr();  // kept for good
    allocation.codes[i] = codes[i].cast<int32_t>();
  }
  allocation.device_type = device_type;
  set(&allocation.release, functions[1]);
  set(&allocation.to_python, functions[2]);
  set(&allocation.empty, functions[0]);
}

py::object new_tensor(PyObject* like, std::initializer_list<int64_t> shape, PyObject* dtype) {
  return make(like, shape.begin(), shape.size(), dtype);
}

py::object new_tensor(PyObject* like, PyObject* shape, PyObject* dtype) {
  const Items items(shape, "shape: expected a tuple");
  const auto dims = static_cast<size_t>(items.size());
  if (dims > kMostDims) refuse(PyExc_ValueError, "shape: more dimensions than any tensor here has");
  int64_t sizes[kMostDims];
  for (size_t i = 0; i < dims; ++i) sizes[i] = whole(items[static_cast<int64_t>(i)]);
  return make(like, sizes, dims, dtype);
}

py::object given_or_new_rows(PyObject* like, PyObject* out, std::initializer_list<int64_t> shape) {
  const bool is_dtype = Py_TYPE(out) == Py_TYPE(allocation.int32());
  return is_dtype ? new_tensor(like, shape, out) : py::reinterpret_borrow<py::object>(out);
}

}  // namespace vlm_fuse
