#include "../../cuda/merge.h"
#include "../../cuda/merge_backward.h"
#include "../row_arguments.h"
#include "call.h"
#include "functions.h"

namespace vlm_fuse {

// rows(out, text, weight, tokens, scale, features, starts, source_index, text_index, add, only_features, status,
// only_check) -> None. `status`: None, or the record that is kept on the device. `only_check`: no row is written.
PyObject* py_cuda_rows(PyObject* const* args) {
  const Call call(args[0], "out");
  Merge merge = read_sources(args);
  read_output(args, &merge);
  read_indexes(args, tensor(args[7], "source_index"), &merge);
  int64_t* const status = status_record(args[11]);
  if (truth(args[12]))
    cuda::check_tokens(merge, status, call.stream());
  else
    cuda::merge_rows(merge, status, call.stream());
  Py_RETURN_NONE;
}

// rows_backward(grad, source_index, text_index, tokens, scale, starts, add, grad_text, grad_features) -> None
PyObject* py_cuda_rows_backward(PyObject* const* args) {
  const Call call(args[0], "grad");
  MergeBackward backward = read_grad(args);
  const Items starts(args[5], "starts: expected a list of ints"), features(args[8], "grad_features: expected a list");
  if (features.size() > starts.size()) refuse(PyExc_ValueError, "starts: fewer than grad_features");
  backward.wants_text = args[7] != Py_None;
  if (backward.wants_text) backward.text = read_gradient(args[7], backward.dim, "grad_text");
  for (int64_t i = 0; i < features.size(); ++i) {
    if (features[i] == Py_None) continue;
    const Gradient out = read_gradient(features[i], backward.dim, "grad_features");
    if (out.rows > 0) backward.features.push_back({out, whole(starts[i]), owned_rows(starts, i, out.rows)});
  }
  cuda::merge_rows_backward(backward, call.stream());
  Py_RETURN_NONE;
}

// weight_ids(grad, source_index, text_index, tokens, scale, starts, add, grad_weight, ids) -> None
PyObject* py_cuda_weight_ids(PyObject* const* args) {
  const Call call(args[0], "grad");
  MergeBackward backward = read_grad(args);
  read_weight_tokens(args, &backward);
  backward.weight = read_gradient(args[7], backward.dim, "grad_weight");
  cuda::weight_ids(backward, flat<int32_t>(args[8], backward.grad.rows, "ids"), call.stream());
  Py_RETURN_NONE;
}

// weight_gradient(grad, source_index, text_index, tokens, scale, starts, add, grad_weight, ids, order, accumulate)
// -> None. `ids`: those of weight_ids, sorted, and `order`: the rows that they belong to.
PyObject* py_cuda_weight_gradient(PyObject* const* args) {
  const Call call(args[0], "grad");
  MergeBackward backward = read_grad(args);
  read_weight_tokens(args, &backward);
  backward.weight = read_gradient(args[7], backward.dim, "grad_weight");
  const int32_t* ids = flat<int32_t>(args[8], backward.grad.rows, "ids");
  const int64_t* order = flat<int64_t>(args[9], backward.grad.rows, "order");
  cuda::weight_gradient(backward, ids, order, truth(args[10]), call.stream());
  Py_RETURN_NONE;
}

}  // namespace vlm_fuse
