#include "../cpu/positions.h"

#include "arguments.h"
#include "errors.h"
#include "functions.h"
#include "new_tensors.h"
#include "tensors.h"

namespace vlm_fuse {
namespace {

void read_grid(PyObject* object, int kind, const char* name, MropeTask* task) {
  if (object == Py_None) return;
  const dlpack::Tensor grid = tensor(object, name);
  if (grid.ndim != 2 || grid.shape[1] != 3) refuse(PyExc_ValueError, std::string(name) + ": expected (n, 3)");
  task->counts[kind] = grid.shape[0];
  task->grids[kind] = flat<int64_t>(grid, grid.shape[0] * 3, name);
}

Intervals read_intervals(PyObject* object, int64_t videos) {
  Intervals intervals;
  if (object == Py_None) return intervals;
  const dlpack::Tensor found = tensor(object, "intervals");
  if (elements(found) != videos || !contiguous(found)) refuse(PyExc_ValueError, "intervals: not one for each video");
  intervals.data = found.data;
  if (is_integer(found, 64)) return intervals;
  switch (row_dtype(found, "intervals")) {
    case DType::kF32:
      intervals.type = Intervals::Type::kF32;
      break;
    case DType::kBF16:
      intervals.type = Intervals::Type::kBF16;
      break;
    case DType::kF16:
      intervals.type = Intervals::Type::kF16;
      break;
    case DType::kF64:
      intervals.type = Intervals::Type::kF64;
      break;
  }
  return intervals;
}

MropeTask read_task(PyObject* const* args) {
  MropeTask task;
  const dlpack::Tensor types = tensor(args[0], "types");
  if (types.ndim != 2) refuse(PyExc_ValueError, "types: expected (B, L)");
  task.samples = types.shape[0];
  task.length = types.shape[1];
  task.types = integers(types, 8, "types");
  const int64_t count = task.samples * task.length;
  read_grid(args[1], 0, "image_grid", &task);
  read_grid(args[2], 1, "video_grid", &task);
  task.intervals = read_intervals(args[3], task.counts[1]);
  task.attention_mask = integers_or_none(args[4], 8, count, "attention_mask");
  task.document_ids = integers_or_none(args[5], 32, count, "document_ids");
  task.merge = whole(args[6]);
  if (task.merge < 1) refuse(PyExc_ValueError, "merge: expected at least 1");
  task.intervals.each = whole(args[7]);
  task.split = truth(args[8]);
  return task;
}

}  // namespace

// mrope_position_ids(types, image_grid, video_grid, intervals, attention_mask, document_ids, merge, interval, split,
// status) -> (position_ids, rope_deltas)
PyObject* py_mrope_position_ids(PyObject* const* args) {
  const MropeTask task = read_task(args);
  NewTensor wanted[2] = {{dlpack::kInt, 64, 3, {task.rows(), task.samples, task.length}},
                         {dlpack::kInt, 64, 2, {task.samples, 1}}};
  py::tuple made(2);
  new_tensors(wanted, 2, &PyTuple_GET_ITEM(made.ptr(), 0));
  auto* positions = static_cast<int64_t*>(wanted[0].data);
  auto* deltas = static_cast<int64_t*>(wanted[1].data);
  const int64_t bytes = task.rows() * task.samples * task.length * 8;
  report(without_gil(bytes, [&] { return mrope_position_ids(task, positions, deltas); }), args[9]);
  return made.release().ptr();
}

}  // namespace vlm_fuse
