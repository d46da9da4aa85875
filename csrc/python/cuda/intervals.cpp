#include "../../cuda/intervals.h"

#include "../mask_arguments.h"
#include "call.h"
#include "functions.h"

namespace vlm_fuse {

// intervals_workspace(document_ids, image_ids, attend, prefix_lengths, parent_ids) -> elements of int64
PyObject* py_cuda_intervals_workspace(PyObject* const* args) {
  const Call call(args[0], "document_ids");
  return PyLong_FromLongLong((cuda::intervals_workspace(read_mask_rows(args)) + 7) / 8);
}

// intervals(document_ids, image_ids, attend, prefix_lengths, parent_ids, lo, hi, lo2, hi2, workspace, status) -> None
PyObject* py_cuda_intervals(PyObject* const* args) {
  const Call call(args[0], "document_ids");
  const MaskRows rows = read_mask_rows(args);
  const MaskOut out = read_mask_out(args + 5, rows.rows * rows.width);
  const dlpack::Tensor workspace = tensor(args[9], "workspace");
  const int64_t count = elements(workspace);
  if (count * 8 < cuda::intervals_workspace(rows)) refuse(PyExc_ValueError, "workspace: too small");
  cuda::intervals(rows, out, flat<int64_t>(workspace, count, "workspace"), status_record(args[10]), call.stream());
  Py_RETURN_NONE;
}

}  // namespace vlm_fuse
