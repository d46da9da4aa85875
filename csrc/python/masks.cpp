#include "errors.h"
#include "functions.h"
#include "mask_arguments.h"

namespace vlm_fuse {

// intervals(document_ids, image_ids, (kind, window, sinks, chunk_size, images), prefix_lengths, parent_ids, lo, hi,
// lo2, hi2, status) -> whether a row has a second interval
PyObject* py_intervals(PyObject* const* args) {
  MaskRows rows = read_mask_rows(args);
  if (rows.one_prefix) {
    rows.prefix = capped(rows.prefix_lengths[0]);
    rows.prefix_lengths = nullptr;
  }
  const int64_t count = rows.rows * rows.width;
  const MaskOut out = read_mask_out(args + 5, count);
  const MaskResult result = without_gil(count * 16, [&] { return intervals(rows, out); });
  report(result.error, args[9]);
  return py::bool_(result.second).release().ptr();
}

}  // namespace vlm_fuse
