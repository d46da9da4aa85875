#include "../../cuda/merge.h"
#include "../../cuda/merge_backward.h"
#include "../row_arguments.h"
#include "call.h"
#include "functions.h"
#include "torch_tensors.h"

namespace vlm_fuse {
namespace {

// A tensor as it was handed in, or a new one of the (shape, dtype) asked for; None stays None.
py::object given_or_new(PyObject* like, PyObject* wanted) {
  if (!PyTuple_CheckExact(wanted)) return py::reinterpret_borrow<py::object>(wanted);
  if (PyTuple_GET_SIZE(wanted) != 2) refuse(PyExc_ValueError, "gradient: expected a tensor or (shape, dtype)");
  return new_tensor(like, PyTuple_GET_ITEM(wanted, 0), PyTuple_GET_ITEM(wanted, 1));
}

}  // namespace

// rows(out, text, weight, tokens, scale, features, starts, source_index, text_index, add, only_features, status,
// only_check) -> out. `out`: a tensor, or the dtype of one that is made here. `status`: None, or the record that is
// kept on the device. `only_check`: no row is written.
PyObject* py_cuda_rows(PyObject* const* args) {
  const Call call(args[7], "source_index");
  Merge merge = read_sources(args);
  const dlpack::Tensor index = tensor(args[7], "source_index");
  if (index.ndim != 2) refuse(PyExc_ValueError, "source_index: expected (G, W)");
  const py::object out = given_or_new_rows(args[7], args[0], {index.shape[0], index.shape[1], merge.dim});
  read_output(out.ptr(), &merge);
  read_indexes(args, index, &merge);
  int64_t* const status = status_record(args[11]);
  if (truth(args[12]))
    cuda::check_tokens(merge, status, call.stream());
  else
    cuda::merge_rows(merge, status, call.stream());
  return py::object(out).release().ptr();
}

// rows_backward(grad, source_index, text_index, tokens, scale, starts, add, grad_text, grad_features) -> (the gradient
// of the text, *those of the features). A gradient: a tensor, the (shape, dtype) of one that is made here, or None
// where none is wanted.
PyObject* py_cuda_rows_backward(PyObject* const* args) {
  const Call call(args[0], "grad");
  MergeBackward backward = read_grad(args);
  const Items starts(args[5], "starts: expected a list of ints"), features(args[8], "grad_features: expected a list");
  if (features.size() > starts.size()) refuse(PyExc_ValueError, "starts: fewer than grad_features");
  py::tuple made(static_cast<size_t>(features.size()) + 1);
  auto given_or_made = [&](int64_t place, PyObject* wanted) {
    PyObject* const tensor = given_or_new(args[0], wanted).release().ptr();
    PyTuple_SET_ITEM(made.ptr(), place, tensor);
    return tensor;
  };
  PyObject* const text = given_or_made(0, args[7]);
  backward.wants_text = text != Py_None;
  if (backward.wants_text) backward.text = read_gradient(text, backward.dim, "grad_text");
  for (int64_t i = 0; i < features.size(); ++i) {
    PyObject* const feature = given_or_made(i + 1, features[i]);
    if (feature == Py_None) continue;
    const Gradient out = read_gradient(feature, backward.dim, "grad_features");
    if (out.rows > 0) backward.features.push_back({out, whole(starts[i]), owned_rows(starts, i, out.rows)});
  }
  cuda::merge_rows_backward(backward, call.stream());
  return made.release().ptr();
}

// gradients(as rows_backward) -> the same, or None where `grad` is not an ordinary tensor or a mode of torch is active
PyObject* py_cuda_gradients(PyObject* const* args) {
  dlpack::Tensor grad;
  if (!called_plainly() || !at_device_of(args[0]) || !usual(args[0], &grad)) Py_RETURN_NONE;
  return py_cuda_rows_backward(args);
}

// weight_ids(grad, source_index, text_index, tokens, scale, starts, add, grad_weight, ids) -> None
PyObject* py_cuda_weight_ids(PyObject* const* args) {
  const Call call(args[0], "grad");
  const MergeBackward backward = read_weight_backward(args);
  cuda::weight_ids(backward, flat<int32_t>(args[8], backward.grad.rows, "ids"), call.stream());
  Py_RETURN_NONE;
}

// weight_gradient(grad, source_index, text_index, tokens, scale, starts, add, grad_weight, ids, order, accumulate)
// -> None. `ids`: those of weight_ids, sorted, and `order`: the rows that they belong to.
PyObject* py_cuda_weight_gradient(PyObject* const* args) {
  const Call call(args[0], "grad");
  const MergeBackward backward = read_weight_backward(args);
  const int32_t* ids = flat<int32_t>(args[8], backward.grad.rows, "ids");
  const int64_t* order = flat<int64_t>(args[9], backward.grad.rows, "order");
  cuda::weight_gradient(backward, ids, order, truth(args[10]), call.stream());
  Py_RETURN_NONE;
}

}  // namespace vlm_fuse
