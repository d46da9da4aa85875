#include <algorithm>

#include "../cpu/merge.h"
#include "arguments.h"
#include "errors.h"
#include "functions.h"
#include "new_tensors.h"
#include "tensors.h"

namespace vlm_fuse {
namespace {

// Rows that have numbers of their own: a table may be longer than what the plan gave its kind.
int64_t owned_rows(const Items& starts, int64_t index, int64_t rows) {
  if (index + 1 >= starts.size()) return rows;
  return std::clamp<int64_t>(whole(starts[index + 1]) - whole(starts[index]), 0, rows);
}

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
  const dlpack::Tensor found = tensor(wanted, name);
  if (!contiguous(found) || last_size(found, name) != dim) {
    refuse(PyExc_ValueError, std::string(name) + ": expected contiguous rows of the hidden size");
  }
  int64_t rows = 1;
  for (int32_t i = 0; i + 1 < found.ndim; ++i) rows *= found.shape[i];
  *out = {static_cast<char*>(found.data), rows, row_dtype(found, name)};
  return py::reinterpret_borrow<py::object>(wanted);
}

}  // namespace

// rows(out, text, weight, tokens, scale, features, starts, source_index, text_index, add, only_features, status) -> out
// `out`: a tensor, or the dtype of one that is made here.
PyObject* py_rows(PyObject* const* args) {
  Merge merge;
  const bool from_weight = args[2] != Py_None;
  const char* const name = from_weight ? "weight" : "text";
  const dlpack::Tensor table = tensor(args[from_weight ? 2 : 1], name);
  merge.dim = last_size(table, name);
  merge.text = row_table(table, merge.dim, name);
  const dlpack::Tensor index = tensor(args[7], "source_index");
  py::object made = py::reinterpret_borrow<py::object>(args[0]);
  if (is_dtype(args[0])) {
    if (index.ndim != 2) refuse(PyExc_ValueError, "source_index: expected (G, W)");
    made = make_rows(args[0], {index.shape[0], index.shape[1], merge.dim}, &merge.out);
  } else {
    merge.out = row_table(tensor(args[0], "out"), merge.dim, "out");
  }
  if (merge.out.step != size_of(merge.out.dtype)) refuse(PyExc_ValueError, "out: its rows are not contiguous");
  if (from_weight) {
    const dlpack::Tensor tokens = tensor(args[3], "tokens");
    merge.tokens = integers(tokens, 8, "tokens");
    merge.token_count = elements(tokens);
    merge.scaled = args[4] != Py_None;
    if (merge.scaled) merge.scale = PyFloat_AsDouble(args[4]);
    if (merge.scaled && PyErr_Occurred()) throw py::error_already_set();
  }
  const Items features(args[5], "features: expected a list of tensors"),
      starts(args[6], "starts: expected a list of ints");
  if (features.size() > starts.size()) refuse(PyExc_ValueError, "starts: fewer than features");
  for (int64_t i = 0; i < features.size(); ++i) {
    RowTable table = row_table(tensor(features[i], "features"), merge.dim, "features");
    table.rows = owned_rows(starts, i, table.rows);
    merge.features.append(table, whole(starts[i]), merge.dim);
  }
  merge.source_index = flat<int32_t>(index, merge.out.rows, "source_index");
  merge.text_index = flat_or_null<int32_t>(args[8], merge.out.rows, "text_index");
  merge.add = truth(args[9]);
  merge.only_features = truth(args[10]);
  const int64_t bytes = merge.out.rows * merge.dim * size_of(merge.out.dtype);
  if (args[11] != Py_None && merge.tokens) report(without_gil(bytes, [&] { return check_tokens(merge); }), args[11]);
  without_gil(bytes, [&] { merge_rows(merge); });
  return made.release().ptr();
}

// rows_backward(grad, source_index, text_index, tokens, scale, starts, add, grad_text, grad_weight, grad_features)
//   -> (the gradient of the text or weight, *those of the features)
// A gradient: a tensor, the (shape, dtype) of one that is made here, or None where none is wanted.
PyObject* py_rows_backward(PyObject* const* args) {
  MergeBackward backward;
  const dlpack::Tensor grad = tensor(args[0], "grad");
  backward.dim = last_size(grad, "grad");
  backward.grad = row_table(grad, backward.dim, "grad");
  backward.source_index = flat<int32_t>(args[1], backward.grad.rows, "source_index");
  backward.text_index = flat_or_null<int32_t>(args[2], backward.grad.rows, "text_index");
  backward.add = truth(args[6]);
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
    const dlpack::Tensor tokens = tensor(args[3], "tokens");
    backward.tokens = integers(tokens, 8, "tokens");
    backward.token_count = elements(tokens);
    backward.scaled = args[4] != Py_None;
    if (backward.scaled) backward.scale = PyFloat_AsDouble(args[4]);
    if (backward.scaled && PyErr_Occurred()) throw py::error_already_set();
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

}  // namespace vlm_fuse
