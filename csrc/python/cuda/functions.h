// The functions of the Python module vlm_fuse._cuda, arguments by position. Outputs are tensors of the caller's, but
// for those that usual_tokens, merge_tokens and gradients make by torch's allocator.
#pragma once

#include "../attached.h"

namespace vlm_fuse {

PyObject* py_cuda_plan_scratch(PyObject* const* args);
PyObject* py_cuda_count(PyObject* const* args);
PyObject* py_cuda_plan(PyObject* const* args);
PyObject* py_cuda_usual_tokens(PyObject* const* args);
PyObject* py_cuda_rows_of(PyObject* const* args);
PyObject* py_cuda_merge_tokens(PyObject* const* args);
PyObject* py_cuda_rows(PyObject* const* args);
PyObject* py_cuda_rows_backward(PyObject* const* args);
PyObject* py_cuda_gradients(PyObject* const* args);
PyObject* py_cuda_weight_ids(PyObject* const* args);
PyObject* py_cuda_weight_gradient(PyObject* const* args);
PyObject* py_cuda_intervals_workspace(PyObject* const* args);
PyObject* py_cuda_intervals(PyObject* const* args);
PyObject* py_cuda_dense(PyObject* const* args);
PyObject* py_cuda_bits(PyObject* const* args);
PyObject* py_cuda_block_map(PyObject* const* args);

}  // namespace vlm_fuse
