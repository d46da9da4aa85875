// The gradient of the embedding weight from rows sorted by id, so that every sum has one order and no two threads write
// one place. A block owns some neighbouring embedding rows: its threads search where the rows of each begin, a warp
// then adds those of one, or, where an id stands in many rows (padding), all warps do, each some columns.
#pragma once

#include "../cpu/batch.h"
#include "elements.cuh"

namespace vlm_fuse::cuda {

constexpr int kWeightThreads = 256;
constexpr unsigned kIdsEach = 32;  // embedding rows a block
constexpr unsigned kFrequent = 64;  // rows of one id from which on the block shares them out

struct WeightArguments {
  RowTable grad;
  char* weight;
  const int32_t* ids;  // ascending
  const int64_t* order;  // the row of grad that each belongs to
  double scale;  // rounded to the weight's type
  unsigned rows;  // of grad, and ids
  unsigned vocabulary;
  unsigned dim;
  DType dtype;
  bool scaled;
  bool accumulate;
};

struct WeightShared {
  unsigned begins[kIdsEach + 1];
};

struct IdArguments {
  const int32_t* source_index;
  const int32_t* text_index;
  Integers tokens;
  int64_t token_count;
  int64_t vocabulary;
  int32_t* ids;
  unsigned rows;
  bool add;
};

// A thread takes one row.
__global__ void __launch_bounds__(kWeightThreads) ids_kernel(const __grid_constant__ IdArguments arguments) {
  const unsigned row = blockIdx.x * kWeightThreads + threadIdx.x;
  if (row >= arguments.rows) return;
  const int64_t token = row_sources(row, arguments.source_index, arguments.text_index, arguments.add).text;
  const int64_t id = token >= 0 && token < arguments.token_count ? arguments.tokens[token] : -1;
  arguments.ids[row] = id >= 0 && id < arguments.vocabulary ? static_cast<int32_t>(id) : -1;
}

// The first of the sorted ids that is not below `id`.
__device__ inline unsigned first_of(const WeightArguments& arguments, int32_t id) {
  unsigned low = 0, high = arguments.rows;
  while (low < high) {
    const unsigned middle = (low + high) / 2;
    if (arguments.ids[middle] < id)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// One row of grad; zeros, which change no sum that began at zero, from `end` on.
template <class Wide>
__device__ void load_sorted(const WeightArguments& arguments, const RowReader& reader, unsigned at, unsigned end,
                            unsigned first, unsigned size, Wide* values) {
  if (at >= end) {
#pragma unroll
    for (unsigned e = 0; e < kPack; ++e) values[e] = Wide(0);
    return;
  }
  int64_t row = arguments.order[at];
  if (row < 0 || row >= arguments.grad.rows) row = 0;
  load_pack(arguments.grad.row(row), reader, first, size, values);
}

// Columns from first_column on, kLanes * kPack at a time and `step` apart, of one embedding row.
template <class Wide>
__device__ void write_embedding(const WeightArguments& arguments, unsigned id, unsigned begin, unsigned end,
                                unsigned first_column, unsigned step) {
  const RowReader reader = {arguments.grad.dtype, arguments.grad.step, false, 1.0};
  const RowReader before = {arguments.dtype, size_of(arguments.dtype), false, 1.0};
  char* to = arguments.weight + static_cast<int64_t>(id) * arguments.dim * size_of(arguments.dtype);
#pragma unroll 1
  for (unsigned first = first_column + lane() * kPack; first < arguments.dim; first += step) {
    const unsigned size = pack_size(first, arguments.dim);
    Wide total[kPack] = {};
#pragma unroll 1
    for (unsigned at = begin; at < end; at += 2) {
      Wide one[kPack], two[kPack];
      load_sorted(arguments, reader, at, end, first, size, one);
      load_sorted(arguments, reader, at + 1, end, first, size, two);
#pragma unroll
      for (unsigned e = 0; e < kPack; ++e) total[e] += one[e];
#pragma unroll
      for (unsigned e = 0; e < kPack; ++e) total[e] += two[e];
    }
    if (arguments.scaled) {
#pragma unroll
      for (unsigned e = 0; e < kPack; ++e) total[e] *= static_cast<Wide>(arguments.scale);
    }
    if (arguments.accumulate) {
      Wide there[kPack];
      load_pack(to, before, first, size, there);
#pragma unroll
      for (unsigned e = 0; e < kPack; ++e) total[e] = there[e] + total[e];
    }
    store_pack(to, arguments.dtype, first, size, total);
  }
}

template <class Wide>
__global__ void __launch_bounds__(kWeightThreads, sizeof(Wide) == 8 ? 2 : 4)
    weight_kernel(const __grid_constant__ WeightArguments arguments) {
  WeightShared& shared = shared_memory<WeightShared>();
  const unsigned first = blockIdx.x * kIdsEach;
  if (threadIdx.x <= kIdsEach)
    shared.begins[threadIdx.x] = first_of(arguments, static_cast<int32_t>(first + threadIdx.x));
  __syncthreads();
  const unsigned left = arguments.vocabulary - first;
  const unsigned count = left < kIdsEach ? left : kIdsEach;
#pragma unroll 1
  for (unsigned i = warp(); i < count; i += kWeightThreads / kLanes) {
    const unsigned begin = shared.begins[i], end = shared.begins[i + 1];
    if (end - begin > kFrequent || (begin == end && arguments.accumulate)) continue;
    write_embedding<Wide>(arguments, first + i, begin, end, 0, kLanes * kPack);
  }
#pragma unroll 1
  for (unsigned i = 0; i < count; ++i) {
    const unsigned begin = shared.begins[i], end = shared.begins[i + 1];
    if (end - begin <= kFrequent) continue;
    write_embedding<Wide>(arguments, first + i, begin, end, warp() * kLanes * kPack, kWeightThreads * kPack);
  }
}

}  // namespace vlm_fuse::cuda
