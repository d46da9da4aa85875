// Token ids outside the embedding table: one block looks at all rows in order, so that the first bad one is reported
// whatever else runs.
#pragma once

#include "record.cuh"
#include "row_source.cuh"

namespace vlm_fuse::cuda {

constexpr int kRowThreads = 256;

struct OutsideShared {
  unsigned first_bad[kRowThreads / kLanes];
};

__device__ inline void report_outside(const RowArguments& rows, OutsideShared& shared) {
  constexpr unsigned kAhead = 8, kNone = 0xffffffffu;  // rows a thread looks at before the block compares
  unsigned bad = kNone;
#pragma unroll 1
  for (unsigned first = 0; first < rows.rows && bad == kNone; first += kRowThreads * kAhead) {
    unsigned own = kNone;
#pragma unroll
    for (unsigned i = kAhead; i-- > 0;) {
      const unsigned row = first + i * kRowThreads + threadIdx.x;
      if (row >= rows.rows) continue;
      const int64_t token = row_sources(row, rows.source_index, rows.text_index, rows.add).text;
      if (token < 0 || token >= rows.token_count) continue;
      const int64_t id = rows.tokens[token];
      if (id < 0 || id >= rows.text.rows) own = row;
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      const unsigned other = __shfl_xor_sync(kAllLanes, own, offset);
      own = other < own ? other : own;
    }
    __syncthreads();  // the round before has been read
    if (lane() == 0) shared.first_bad[warp()] = own;
    __syncthreads();
    for (const unsigned found : shared.first_bad) bad = found < bad ? found : bad;
  }
  if (bad == kNone || threadIdx.x != 0) return;
  const int64_t token = row_sources(bad, rows.source_index, rows.text_index, rows.add).text;
  flag(rows.status, {kOutsideVocabulary, token, 0, 0, 0, 0, rows.text.rows, rows.tokens[token]});
}

__global__ void __launch_bounds__(kRowThreads) vocabulary_kernel(const __grid_constant__ RowArguments rows) {
  report_outside(rows, shared_memory<OutsideShared>());
}

}  // namespace vlm_fuse::cuda
