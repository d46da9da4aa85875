#include "../cpu/masks.h"

#include <algorithm>

#include "arguments.h"
#include "errors.h"
#include "functions.h"
#include "tensors.h"

namespace vlm_fuse {
namespace {

// A host int, or int64 by document id (a single one without dimensions).
void read_prefix(MaskRows& rows, PyObject* object) {
  if (object == Py_None) return;
  if (PyLong_Check(object)) {
    rows.prefix = static_cast<int32_t>(std::clamp<int64_t>(whole(object), 0, kNoLimit));
    return;
  }
  const dlpack::Tensor found = tensor(object, "prefix_lengths");
  rows.prefix_count = elements(found);
  rows.prefix_lengths = flat<int64_t>(object, rows.prefix_count, "prefix_lengths");
  if (found.ndim == 0) {
    rows.prefix = static_cast<int32_t>(std::clamp<int64_t>(rows.prefix_lengths[0], 0, kNoLimit));
    rows.prefix_lengths = nullptr;
  }
}

}  // namespace

// intervals(document_ids, image_ids, (kind, window, sinks, chunk_size, images), prefix_lengths, parent_ids, lo, hi,
// lo2, hi2, status) -> whether a row has a second interval
PyObject* py_intervals(PyObject* const* args) {
  MaskRows rows;
  const dlpack::Tensor ids = tensor(args[0], "document_ids");
  if (ids.ndim != 2) refuse(PyExc_ValueError, "document_ids: expected (G, W)");
  rows.rows = ids.shape[0];
  rows.width = ids.shape[1];
  const int64_t count = rows.rows * rows.width;
  if (rows.width >= INT32_MAX) refuse(PyExc_ValueError, "document_ids: rows too long for int32 intervals");
  rows.document_ids = flat<int32_t>(args[0], count, "document_ids");
  rows.image_ids = flat_or_null<int32_t>(args[1], count, "image_ids");
  const Items attend(args[2], "attend: expected a tuple of ints");
  if (attend.size() != 5) refuse(PyExc_ValueError, "attend: expected five ints");
  auto setting = [&](int64_t index) {
    return static_cast<int32_t>(std::clamp<int64_t>(whole(attend[index]), 0, kNoLimit));
  };
  rows.attend.full = setting(0) == 1;
  rows.attend.window = setting(1);
  rows.attend.sinks = setting(2);
  rows.attend.chunk_size = setting(3);
  rows.attend.images = static_cast<ImageAttention>(setting(4));
  read_prefix(rows, args[3]);
  if (args[4] != Py_None) {
    const dlpack::Tensor parents = tensor(args[4], "parent_ids");
    rows.parent_count = elements(parents);
    rows.parent_ids = integers(parents, 32, "parent_ids");
  }
  MaskOut out;
  out.lo = flat<int32_t>(args[5], count, "kv_lo");
  out.hi = flat<int32_t>(args[6], count, "kv_hi");
  out.lo2 = flat_or_null<int32_t>(args[7], count, "kv_lo2");
  out.hi2 = flat_or_null<int32_t>(args[8], count, "kv_hi2");
  const MaskResult result = without_gil(count * 16, [&] { return intervals(rows, out); });
  report(result.error, args[9]);
  return py::bool_(result.second).release().ptr();
}

}  // namespace vlm_fuse
