// The functions of the Python module vlm_fuse._native, arguments by position.
#pragma once

#include "attached.h"

namespace vlm_fuse {

PyObject* py_count(PyObject* const* args);
PyObject* py_plan(PyObject* const* args);
PyObject* py_facts(PyObject* const* args);
PyObject* py_step_facts(PyObject* const* args);
PyObject* py_usual_plan(PyObject* const* args);
PyObject* py_rows_of(PyObject* const* args);
PyObject* py_rows(PyObject* const* args);
PyObject* py_gradients(PyObject* const* args);
PyObject* py_rows_backward(PyObject* const* args);
PyObject* py_accumulate_weight(PyObject* const* args);
PyObject* py_intervals(PyObject* const* args);
PyObject* py_dense(PyObject* const* args);
PyObject* py_bits(PyObject* const* args);
PyObject* py_block_map(PyObject* const* args);
PyObject* py_segments(PyObject* const* args);
PyObject* py_mrope_position_ids(PyObject* const* args);
PyObject* py_best_fit(PyObject* const* args);
PyObject* py_memory(PyObject* const* args);
PyObject* py_reset_peak(PyObject* const* args);

}  // namespace vlm_fuse
