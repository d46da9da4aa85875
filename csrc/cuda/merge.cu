#include "launch.cuh"
#include "merge.cuh"
#include "merge.h"
#include "merge_arguments.cuh"

namespace vlm_fuse::cuda {
namespace {

template <int Capacity>
void launch_rows(const Merge& merge, const RowArguments& rows, size_t first_table, int64_t blocks, Stream stream) {
  TableList<Capacity> features = {};
  const auto& tables = merge.features.all();
  for (size_t i = first_table; i < tables.size() && features.count < Capacity; ++i)
    features.tables[features.count++] = tables[i];
  Grid grid = {blocks + (rows.status != nullptr), kRowThreads};
  if (rows.status != nullptr) grid.shared = sizeof(OutsideShared);
  with_numbers(merge,
               [&](auto numbers) { launch(rows_kernel<decltype(numbers), Capacity>, grid, stream, rows, features); });
}

}  // namespace

void merge_rows(const Merge& merge, int64_t* status, Stream stream) {
  if (merge.out.rows == 0 || merge.dim == 0) return;
  RowArguments rows = arguments_of(merge, status);
  const int64_t warps = current_device().processors * 32;  // that run at the same time
  const int64_t each = merge.out.rows / (2 * warps);
  rows.rows_each = static_cast<unsigned>(each < 1 ? 1 : (each > kMostRows ? kMostRows : each));
  constexpr int64_t kWarps = kRowThreads / kLanes;
  const int64_t blocks = (merge.out.rows + rows.rows_each * kWarps - 1) / (rows.rows_each * kWarps);
  const size_t tables = merge.features.all().size();
  rows.others = true;
  if (tables <= kOneTable) return launch_rows<kOneTable>(merge, rows, 0, blocks, stream);
  for (size_t first = 0; first < tables; first += kManyTables) {
    launch_rows<kManyTables>(merge, rows, first, blocks, stream);
    rows.others = false;
    rows.status = nullptr;
  }
}

void check_tokens(const Merge& merge, int64_t* status, Stream stream) {
  if (merge.out.rows == 0 || !merge.tokens) return;
  launch(vocabulary_kernel, {1, kRowThreads, sizeof(OutsideShared)}, stream, arguments_of(merge, status));
}

}  // namespace vlm_fuse::cuda
