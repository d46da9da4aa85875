#include <algorithm>

#include "errors.h"
#include "functions.h"
#include "new_tensors.h"
#include "row_arguments.h"

namespace vlm_fuse {
namespace {

py::object make_rows(PyObject* dtype, std::initializer_list<int64_t> shape, RowTable* table) {
  NewTensor wanted = new_rows(dtype);
  wanted.ndim = static_cast<int32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), wanted.shape);
  PyObject* made = nullptr;
  new_tensors(&wanted, 1, &made);
  table->data = static_cast<char*>(wanted.data);
  table->dtype = new_dtype(wanted);
  table->step = size_of(table->dtype);
  table->row_stride = table->outer_stride = wanted.shape[wanted.ndim - 1] * table->step;
  table->rows = 1;
  for (int32_t i = 0; i + 1 < wanted.ndim; ++i) table->rows *= wanted.shape[i];
  table->inner = table->rows;
  return py::reinterpret_steal<py::object>(made);
}

bool is_dtype(PyObject* object) { return Py_TYPE(object) == Py_TYPE(attached.row_dtypes[0]); }

// A gradient as it was handed in, or in new memory of the (shape, dtype) asked for.
py::object gradient(PyObject* wanted, int64_t dim, const char* name, Gradient* out) {
  if (PyTuple_CheckExact(wanted)) {
    if (PyTuple_GET_SIZE(wanted) != 2) refuse(PyExc_ValueError, std::string(name) + ": expected (shape, dtype)");
    const Items sizes(PyTuple_GET_ITEM(wanted, 0), "a gradient: expected a shape");
    PyObject* const dtype = PyTuple_GET_ITEM(wanted, 1);
    if (sizes.size() < 2 || sizes.size() > 3 || whole(sizes[sizes.size() - 1]) != dim) {
      refuse(PyExc_ValueError, std::string(name) + ": expected two or three dimensions, the last of the hidden size");
    }
    RowTable table;
    py::object made = sizes.size() == 2 ? make_rows(dtype, {whole(sizes[0]), dim}, &table)
                                        : make_rows(dtype, {whole(sizes[0]), whole(sizes[1]), dim}, &table);
    *out = {table.data, table.rows, table.dtype};
    return made;
  }
  *out = read_gradient(wanted, dim, name);
  return py::reinterpret_borrow<py::object>(wanted);
}

}  // namespace

// rows(out, text, weight, tokens, scale, features, starts, source_index, text_index, add, only_features, status) -> out
// `out`: a tensor, or the dtype of one that is made here.
PyObject* py_rows(PyObject* const* args) {
  Merge merge = read_sources(args);
  const dlpack::Tensor index = tensor(args[7], "source_index");
  py::object made = py::reinterpret_borrow<py::object>(args[0]);
  if (is_dtype(args[0])) {
    if (index.ndim != 2) refuse(PyExc_ValueError, "source_index: expected (G, W)");
    made = make_rows(args[0], {index.shape[0], index.shape[1], merge.dim}, &merge.out);
  } else {
    read_output(args[0], &merge);
  }
  read_indexes(args, index, &merge);
  const int64_t bytes = merge.out.rows * merge.dim * size_of(merge.out.dtype);
  if (args[11] != Py_None && merge.tokens) report(without_gil(bytes, [&] { return check_tokens(merge); }), args[11]);
  without_gil(bytes, [&] { merge_rows(merge); });
  return made.release().ptr();
}

// rows_backward(grad, source_index, text_index, tokens, scale, starts, add, grad_text, grad_weight, grad_features)
//   -> (the gradient of the text or weight, *those of the features)
// A gradient: a tensor, the (shape, dtype) of one that is made here, or None where none is wanted.
PyObject* py_rows_backward(PyObject* const* args) {
  MergeBackward backward = read_grad(args);
  int64_t rows = backward.grad.rows;
  backward.wants_text = args[7] != Py_None;
  const Items starts(args[5], "starts: expected a list of ints"), features(args[9], "grad_features: expected a list");
  if (features.size() > starts.size()) refuse(PyExc_ValueError, "starts: fewer than grad_features");
  py::tuple made(features.size() + 1);
  auto given_or_made = [&](int64_t place, PyObject* wanted, const char* name) {
    Gradient out;
    PyTuple_SET_ITEM(made.ptr(), place, gradient(wanted, backward.dim, name, &out).release().ptr());
    return out;
  };
  if (backward.wants_text) backward.text = given_or_made(0, args[7], "grad_text");
  backward.wants_weight = args[8] != Py_None;
  if (backward.wants_text && backward.wants_weight) refuse(PyExc_ValueError, "grad_text, grad_weight: one of them");
  if (!backward.wants_text && !backward.wants_weight) PyTuple_SET_ITEM(made.ptr(), 0, Py_NewRef(Py_None));
  if (backward.wants_weight) {
    backward.weight = given_or_made(0, args[8], "grad_weight");
    read_weight_tokens(args, &backward);
    rows += backward.weight.rows;
  }
  for (int64_t i = 0; i < features.size(); ++i) {
    if (features[i] == Py_None) {
      PyTuple_SET_ITEM(made.ptr(), i + 1, Py_NewRef(Py_None));
      continue;
    }
    const Gradient out = given_or_made(i + 1, features[i], "grad_features");
    if (out.rows > 0) backward.features.push_back({out, whole(starts[i]), owned_rows(starts, i, out.rows)});
  }
  without_gil(rows * backward.dim * 4, [&] { merge_rows_backward(backward); });
  return made.release().ptr();
}

// gradients(as rows_backward) -> the same, or None where `grad` is out of the ordinary
PyObject* py_gradients(PyObject* const* args) {
  dlpack::Tensor grad;
  if (!called_plainly() || !usual(args[0], &grad)) Py_RETURN_NONE;
  return py_rows_backward(args);
}

// accumulate_weight(grad, source_index, text_index, tokens, scale, starts, add, weight_grad) -> None
PyObject* py_accumulate_weight(PyObject* const* args) {
  MergeBackward backward = read_weight_backward(args);
  backward.wants_weight = backward.accumulate = true;
  without_gil(backward.grad.rows * backward.dim * 4, [&] { merge_rows_backward(backward); });
  Py_RETURN_NONE;
}

}  // namespace vlm_fuse
