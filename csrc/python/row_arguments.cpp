#include "row_arguments.h"

#include <algorithm>

namespace vlm_fuse {

bool read_scale(PyObject* object, double* scale) {
  if (object == Py_None) return false;
  *scale = PyFloat_AsDouble(object);
  if (PyErr_Occurred()) throw py::error_already_set();
  return true;
}

int64_t owned_rows(const Items& starts, int64_t index, int64_t rows) {
  if (index + 1 >= starts.size()) return rows;
  return std::clamp<int64_t>(whole(starts[index + 1]) - whole(starts[index]), 0, rows);
}

Merge read_sources(PyObject* const* args) {
  Merge merge;
  const bool from_weight = args[2] != Py_None;
  const char* const name = from_weight ? "weight" : "text";
  const dlpack::Tensor table = tensor(args[from_weight ? 2 : 1], name);
  merge.dim = last_size(table, name);
  merge.text = row_table(table, merge.dim, name);
  if (from_weight) {
    const dlpack::Tensor tokens = tensor(args[3], "tokens");
    merge.tokens = integers(tokens, 8, "tokens");
    merge.token_count = elements(tokens);
    merge.scaled = read_scale(args[4], &merge.scale);
  }
  const Items features(args[5], "features: expected a list of tensors"),
      starts(args[6], "starts: expected a list of ints");
  if (features.size() > starts.size()) refuse(PyExc_ValueError, "starts: fewer than features");
  for (int64_t i = 0; i < features.size(); ++i) {
    RowTable rows = row_table(tensor(features[i], "features"), merge.dim, "features");
    rows.rows = owned_rows(starts, i, rows.rows);
    merge.features.append(rows, whole(starts[i]), merge.dim);
  }
  merge.add = truth(args[9]);
  merge.only_features = truth(args[10]);
  return merge;
}

void read_output(PyObject* out, Merge* merge) {
  merge->out = row_table(tensor(out, "out"), merge->dim, "out");
  if (merge->out.step != size_of(merge->out.dtype)) refuse(PyExc_ValueError, "out: its rows are not contiguous");
}

void read_indexes(PyObject* const* args, const dlpack::Tensor& index, Merge* merge) {
  merge->source_index = flat<int32_t>(index, merge->out.rows, "source_index");
  merge->text_index = flat_or_null<int32_t>(args[8], merge->out.rows, "text_index");
}

MergeBackward read_grad(PyObject* const* args) {
  MergeBackward backward;
  const dlpack::Tensor grad = tensor(args[0], "grad");
  backward.dim = last_size(grad, "grad");
  backward.grad = row_table(grad, backward.dim, "grad");
  backward.source_index = flat<int32_t>(args[1], backward.grad.rows, "source_index");
  backward.text_index = flat_or_null<int32_t>(args[2], backward.grad.rows, "text_index");
  backward.add = truth(args[6]);
  return backward;
}

void read_weight_tokens(PyObject* const* args, MergeBackward* backward) {
  const dlpack::Tensor tokens = tensor(args[3], "tokens");
  backward->tokens = integers(tokens, 8, "tokens");
  backward->token_count = elements(tokens);
  backward->scaled = read_scale(args[4], &backward->scale);
}

Gradient read_gradient(PyObject* object, int64_t dim, const char* name) {
  const dlpack::Tensor found = tensor(object, name);
  if (!contiguous(found) || last_size(found, name) != dim) {
    refuse(PyExc_ValueError, std::string(name) + ": expected contiguous rows of the hidden size");
  }
  int64_t rows = 1;
  for (int32_t i = 0; i + 1 < found.ndim; ++i) rows *= found.shape[i];
  return {static_cast<char*>(found.data), rows, row_dtype(found, name)};
}

MergeBackward read_weight_backward(PyObject* const* args) {
  MergeBackward backward = read_grad(args);
  read_weight_tokens(args, &backward);
  backward.weight = read_gradient(args[7], backward.dim, "grad_weight");
  return backward;
}

}  // namespace vlm_fuse
