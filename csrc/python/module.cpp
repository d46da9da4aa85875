// The Python module vlm_fuse._native: tensors in through torch's DLPack exchange table, pointers out to csrc/cpu.
// Knows Python, but no torch headers: one build serves every torch that has the table.
#include <pybind11/pybind11.h>

#include "../cpu/blocks.h"
#include "../cpu/threads.h"
#include "batch_arguments.h"
#include "functions.h"
#include "method.h"
#include "new_tensors.h"

namespace vlm_fuse {
namespace {

// Returns whether the table is one that can be used. `parallel_for`: the address of torch_parallel_for, 0: one thread.
bool attach(const py::capsule& capsule, uintptr_t parallel_for, py::object raise, py::object recorded_error,
            py::object tensor_type, py::object parameter_type, const py::tuple& row_dtypes, const py::tuple& modes) {
  use_parallel_for(reinterpret_cast<ParallelFor>(parallel_for));
  return attach_to(capsule, {raise, recorded_error, tensor_type, parameter_type, row_dtypes, modes});
}

PyMethodDef methods[] = {
    method<py_count, kBatchFields>("count", "count(*batch)"),
    method<py_plan, kBatchFields + 2>("plan", "plan(*batch, width, status)"),
    method<py_facts, kBatchFields + 3>("facts", "facts(*batch, width, numbers, sequences)"),
    method<py_step_facts, 3>("step_facts", "step_facts(batch, versions, source_index)"),
    method<py_usual_plan, 14>("usual_plan", "usual_plan(input_ids, inputs_embeds, weight, image_embeds, ...)"),
    method<py_rows_of, 6>("rows_of", "rows_of(input_ids, inputs_embeds, weight, image_embeds, out, source_index)"),
    method<py_rows, 12>("rows", "rows(out, text, weight, tokens, scale, features, starts, source_index, ...)"),
    method<py_gradients, 10>("gradients", "gradients(grad, source_index, text_index, ...)"),
    method<py_rows_backward, 10>("rows_backward", "rows_backward(grad, source_index, text_index, ...)"),
    method<py_accumulate_weight, 8>("accumulate_weight", "accumulate_weight(grad, source_index, text_index, ...)"),
    method<py_memory, 0>("memory", "memory()"),
    method<py_reset_peak, 0>("reset_peak", "reset_peak()"),
    method<py_intervals, 10>("intervals", "intervals(document_ids, image_ids, attend, ...)"),
    method<py_dense, 6>("dense", "dense(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, dtype)"),
    method<py_bits, 5>("bits", "bits(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length)"),
    method<py_block_map, 7>("block_map", "block_map(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, q_block, kv_block)"),
    method<py_segments, 5>("segments", "segments(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length)"),
    method<py_mrope_position_ids, 10>("mrope_position_ids", "mrope_position_ids(types, image_grid, video_grid, ...)"),
    method<py_best_fit, 4>("best_fit", "best_fit(needs, order, budgets, rows)"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

// memory() -> (bytes of tensors made here that are alive, the most since reset_peak(), bytes kept for the next call)
PyObject* py_memory(PyObject* const*) {
  const MemoryUse use = memory_use();
  return py::make_tuple(use.held, use.peak, kept_bytes()).release().ptr();
}

PyObject* py_reset_peak(PyObject* const*) {
  reset_peak();
  Py_RETURN_NONE;
}

}  // namespace vlm_fuse

PYBIND11_MODULE(_native, module, pybind11::mod_gil_not_used()) {
  module.def("attach", &vlm_fuse::attach);
  if (PyModule_AddFunctions(module.ptr(), vlm_fuse::methods) != 0) throw pybind11::error_already_set();
}
