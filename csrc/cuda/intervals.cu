#include <algorithm>
#include <type_traits>

#include "intervals.cuh"
#include "intervals.h"
#include "launch.cuh"

namespace vlm_fuse::cuda {
namespace {

int64_t slices_of(const MaskRows& rows, int64_t slice_rows) { return (rows.width + slice_rows - 1) / slice_rows; }

// A long output row is cut into as many slices as make work for all processors, none of them shorter than this.
constexpr int64_t kLeastRows = kSliceThreads;

int64_t slice_rows_of(const MaskRows& rows) {
  if (rows.width <= kSliceRows) return kSliceRows;
  const int64_t each = rows.rows * rows.width / (2 * current_device().processors);
  return std::clamp<int64_t>((each + kLanes - 1) / kLanes * kLanes, kLeastRows, kSliceRows);
}

// A hole lies between two kept rows.
int64_t hole_capacity(const MaskRows& rows) { return rows.width / 2 + 1; }

// The tables one behind another from an address on; returns where they end. Those of eight bytes come first.
uintptr_t lay_out(const MaskRows& rows, uintptr_t at, MaskTables* tables) {
  auto take = [&](auto*& table, int64_t count) {
    table = reinterpret_cast<std::remove_reference_t<decltype(table)>>(at);
    at += static_cast<uintptr_t>(count) * sizeof *table;
  };
  take(tables->documents, rows.rows * rows.parent_count);
  take(tables->holes, rows.rows * hole_capacity(rows));
  take(tables->document_end, rows.rows * rows.width);
  take(tables->image_end, rows.image_ids == nullptr ? 0 : rows.rows * rows.width);
  take(tables->summaries, rows.rows * slices_of(rows, kLeastRows));
  take(tables->bad, rows.rows * slices_of(rows, kLeastRows));
  return at;
}

}  // namespace

int64_t intervals_workspace(const MaskRows& rows) {
  MaskTables tables;
  return static_cast<int64_t>(lay_out(rows, 0, &tables));
}

void intervals(const MaskRows& rows, const MaskOut& out, void* workspace, int64_t* status, Stream stream) {
  if (rows.rows == 0 || rows.width == 0) return;
  MaskTask task = {};
  task.rows = rows;
  task.out = out;
  if (rows.attend.images == ImageAttention::kCausal) task.rows.image_ids = nullptr;
  task.hole_capacity = hole_capacity(rows);
  task.slice_rows = static_cast<int32_t>(slice_rows_of(rows));
  task.slices = static_cast<uint32_t>(slices_of(rows, task.slice_rows));
  task.status = status;
  lay_out(rows, reinterpret_cast<uintptr_t>(workspace), &task.tables);
  const int64_t slices = rows.rows * task.slices;
  const int64_t threads = (rows.width + kLanes - 1) / kLanes * kLanes;
  const Grid grid = {slices, static_cast<int>(threads < kSliceThreads ? threads : kSliceThreads), sizeof(SliceShared)};
  if (task.slices == 1) {
    launch(short_rows_kernel, grid, stream, task);
  } else {
    launch(slice_summaries_kernel, grid, stream, task);
    launch(slice_tables_kernel, grid, stream, task);
    launch(long_rows_kernel, grid, stream, task);
  }
  if (status == nullptr || slices == 1) return;
  launch(report_intervals_kernel, {1, kSliceThreads, sizeof(SliceShared)}, stream, task, static_cast<int32_t>(slices));
}

}  // namespace vlm_fuse::cuda
