// The Python module vlm_fuse._cuda: tensors in through torch's DLPack exchange table, pointers out to csrc/cuda.
// Knows Python, but no torch headers and no CUDA: one build serves every torch that has the table.
#include "../../cuda/device.h"
#include "../batch_arguments.h"
#include "../method.h"
#include "functions.h"
#include "torch_tensors.h"

namespace vlm_fuse {
namespace {

bool attach(const py::capsule& capsule, py::object raise, py::object recorded_error, py::object tensor_type,
            py::object parameter_type, const py::tuple& row_dtypes, const py::tuple& modes) {
  attached.device_type = cuda::emulated() ? dlpack::kCPU : dlpack::kCUDA;
  if (!attach_to(capsule, {raise, recorded_error, tensor_type, parameter_type, row_dtypes, modes})) return false;
  return attached.table->current_work_stream != nullptr;
}

// (how many devices there are, why there is none)
py::tuple devices() {
  std::string reason;
  const int count = cuda::device_count(&reason);
  return py::make_tuple(count, reason);
}

PyMethodDef methods[] = {
    method<py_cuda_usual_tokens, 15>("usual_tokens",
                                     "usual_tokens(input_ids, inputs_embeds, weight, image_embeds, ...)"),
    method<py_cuda_rows_of, 6>("rows_of", "rows_of(input_ids, inputs_embeds, weight, image_embeds, out, source_index)"),
    method<py_cuda_merge_tokens, 5>("merge_tokens", "merge_tokens(call, out, scale, only_features, status)"),
    method<py_cuda_plan_scratch, kBatchFields + 1>("plan_scratch", "plan_scratch(*batch, check)"),
    method<py_cuda_count, kBatchFields + 2>("count", "count(*batch, totals, scratch)"),
    method<py_cuda_plan, kBatchFields + 6>("plan", "plan(*batch, width, source_index, facts, status, fresh, scratch)"),
    method<py_cuda_rows, 13>("rows", "rows(out, text, weight, tokens, scale, features, starts, source_index, ...)"),
    method<py_cuda_rows_backward, 9>("rows_backward", "rows_backward(grad, source_index, text_index, ...)"),
    method<py_cuda_gradients, 9>("gradients", "gradients(grad, source_index, text_index, ...)"),
    method<py_cuda_weight_ids, 9>("weight_ids", "weight_ids(grad, source_index, text_index, ...)"),
    method<py_cuda_weight_gradient, 11>("weight_gradient", "weight_gradient(grad, source_index, text_index, ...)"),
    method<py_cuda_intervals_workspace, 5>("intervals_workspace", "intervals_workspace(document_ids, image_ids, ...)"),
    method<py_cuda_intervals, 11>("intervals", "intervals(document_ids, image_ids, attend, ...)"),
    method<py_cuda_dense, 6>("dense", "dense(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, out)"),
    method<py_cuda_bits, 6>("bits", "bits(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, out)"),
    method<py_cuda_block_map, 16>("block_map", "block_map(kv_lo, kv_hi, kv_lo2, kv_hi2, kv_length, q_block, ...)"),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace
}  // namespace vlm_fuse

PYBIND11_MODULE(_cuda, module, pybind11::mod_gil_not_used()) {
  module.doc() = "CUDA kernels of vlm_fuse; use vlm_fuse.kernels.cuda.";
  module.attr("emulated") = vlm_fuse::cuda::emulated();
  module.def("attach", &vlm_fuse::attach);
  module.def("attach_allocation", &vlm_fuse::attach_allocation);
  module.def("devices", &vlm_fuse::devices);
  if (PyModule_AddFunctions(module.ptr(), vlm_fuse::methods) != 0) throw vlm_fuse::py::error_already_set();
}
