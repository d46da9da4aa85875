// The Python module vlm_fuse._native: tensors in through torch's DLPack exchange table, pointers out to csrc/cpu.
// Knows Python, but no torch headers: one build serves every torch that has the table.
#include <pybind11/pybind11.h>

#include "../cpu/blocks.h"
#include "../cpu/dtype.h"
#include "../cpu/threads.h"
#include "batch_arguments.h"
#include "functions.h"
#include "new_tensors.h"

namespace vlm_fuse {
namespace {

bool usable(const dlpack::ExchangeTable& table) {
  return table.tensor_from_py_object_no_sync && table.managed_tensor_to_py_object_no_sync;
}

// The newest table in the chain that this file knows; null: none.
const dlpack::ExchangeTable* known_table(const py::capsule& capsule) {
  auto* header = static_cast<dlpack::ExchangeHeader*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (header == nullptr) throw py::error_already_set();
  while (header != nullptr && header->version.major != dlpack::kMajorVersion) header = header->prev_api;
  auto* table = reinterpret_cast<const dlpack::ExchangeTable*>(header);
  return table != nullptr && usable(*table) ? table : nullptr;
}

// Returns whether the table is one that can be used. `parallel_for`: the address of torch_parallel_for, 0: one thread.
bool attach(const py::capsule& capsule, uintptr_t parallel_for, py::object raise, py::object recorded_error,
            py::object tensor_type, py::object parameter_type, const py::tuple& row_dtypes, const py::tuple& modes) {
  attached.table = known_table(capsule);
  attached.raise = raise.release().ptr();  // kept for good
  attached.recorded_error = recorded_error.release().ptr();
  attached.tensor_type = reinterpret_cast<PyTypeObject*>(tensor_type.release().ptr());
  attached.parameter_type = reinterpret_cast<PyTypeObject*>(parameter_type.release().ptr());
  for (size_t i = 0; i < kDTypes; ++i) attached.row_dtypes[i] = py::object(row_dtypes[i]).release().ptr();
  for (size_t i = 0; i < 3; ++i) attached.modes[i] = py::object(modes[i]).release().ptr();
  use_parallel_for(reinterpret_cast<ParallelFor>(parallel_for));
  return attached.table != nullptr;
}

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
    method<py_memory, 0>("memory", "memory()"),
    method<py_reset_peak, 0>("reset_peak", "reset_peak()"),
    method<py_intervals, 10>("intervals", "intervals(document_ids, image_ids, attend, ...)"),
    method<py_dense, 6>("dense", "dense(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, dtype)"),
    method<py_bits, 5>("bits", "bits(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length)"),
    method<py_block_map, 7>("block_map", "block_map(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, q_block, kv_block)"),
    method<py_segments, 5>("segments", "segments(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length)"),
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
