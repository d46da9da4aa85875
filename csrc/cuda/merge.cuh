// Rows of a ready plan: a warp takes a few neighbouring rows. One block more than the rows need looks for token ids
// outside the embedding table.
#pragma once

#include "row_source.cuh"
#include "vocabulary.cuh"

namespace vlm_fuse::cuda {

template <class Numbers, int Capacity>
__device__ void write_rows(const RowArguments& rows, const TableList<Capacity>& features, unsigned first_warp,
                           unsigned warps) {
#pragma unroll 1
  for (unsigned first = first_warp * rows.rows_each; first < rows.rows; first += warps * rows.rows_each) {
    const unsigned count = rows.rows - first < rows.rows_each ? rows.rows - first : rows.rows_each;
    const unsigned row = first + lane();
    RowSource own = {0, 0, -1, true};
    if (static_cast<unsigned>(lane()) < count) {
      own = row_source(rows, features, row_sources(row, rows.source_index, rows.text_index, rows.add));
    }
    write_rows_of_lanes<Numbers>(rows, features, own, row, count);
  }
}

template <class Numbers, int Capacity>
__global__ void __launch_bounds__(kRowThreads, sizeof(Numbers) == 8 ? 2 : 4)
    rows_kernel(const __grid_constant__ RowArguments rows, const __grid_constant__ TableList<Capacity> features) {
  if (rows.status != nullptr && blockIdx.x + 1 == gridDim.x) {
    report_outside(rows, shared_memory<OutsideShared>());
    return;
  }
  constexpr unsigned kWarps = kRowThreads / kLanes;
  const unsigned blocks = gridDim.x - (rows.status != nullptr ? 1 : 0);
  write_rows<Numbers>(rows, features, blockIdx.x * kWarps + warp(), blocks * kWarps);
}

}  // namespace vlm_fuse::cuda
