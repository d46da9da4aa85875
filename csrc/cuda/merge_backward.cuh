// A block owns some neighbouring rows of one gradient. It first finds the row of grad that each of them is: the blocks
// of a cluster read source_index together, each a share, and note what they find in the shared memory of the row's
// owner. Then its warps copy, a row each. Rows that nobody noted are zeros. No memory beside the gradients is written.
#pragma once

#include <type_traits>

#include "../cpu/table.h"
#include "elements.cuh"

namespace vlm_fuse::cuda {

constexpr int kGradientThreads = 256;
constexpr int kGradientCluster = 8;
constexpr unsigned kMostOwned = 1024;  // rows of gradient a block
constexpr int kGradients = 64;         // of one launch, within the 4 KiB of arguments

struct GradientTarget {
  char* data;
  unsigned rows;
  unsigned owned;        // rows that have numbers of their own; those behind are zeros
  int32_t first;         // number of its first feature row
  unsigned first_block;  // blocks of the targets before
  DType dtype;
};

struct GradientArguments {
  RowTable grad;
  const int32_t* source_index;
  const int32_t* text_index;
  unsigned dim;
  unsigned rows_each;  // that a block owns
  unsigned blocks;     // that own rows; a grid may have more, to fill its last cluster
  int targets;
  bool add;
  bool has_text;  // the first target is the text's
};

struct GradientList {
  GradientTarget targets[kGradients];
};

struct GradientShared {
  unsigned noted[kMostOwned];
};

constexpr unsigned kNobody = 0xffffffffu;

// Where rows may be sums (several rows of grad of one text row) the first is noted, else the last.
__device__ inline unsigned note_of(unsigned row, bool text) { return text ? row : kNobody - 1 - row; }

// The last target that begins at or before `value`, going by `member`.
template <class Value, Value GradientTarget::* Member>
__device__ int target_of(const GradientArguments& arguments, const GradientList& list, int first, Value value) {
  int low = first, high = arguments.targets;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (list.targets[middle].*Member <= value)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// Notes the row of grad with the block of the cluster that owns gradient row `index` of the target.
__device__ inline void note(GradientShared& shared, const GradientArguments& arguments, const GradientTarget& target,
                            unsigned index, unsigned row, bool text) {
  const unsigned part = index / arguments.rows_each;
  const unsigned rank = target.first_block + part - (blockIdx.x - cluster_rank());
  if (rank >= static_cast<unsigned>(cluster_size())) return;
  atomicMin(in_block(&shared.noted[index - part * arguments.rows_each], static_cast<int>(rank)), note_of(row, text));
}

__device__ inline void note_rows(GradientShared& shared, const GradientArguments& arguments, const GradientList& list) {
  const unsigned rows = static_cast<unsigned>(arguments.grad.rows);
  const unsigned threads = cluster_size() * kGradientThreads;
  const int first_feature = arguments.has_text ? 1 : 0;
#pragma unroll 4
  for (unsigned row = cluster_rank() * kGradientThreads + threadIdx.x; row < rows; row += threads) {
    const RowSources sources = row_sources(row, arguments.source_index, arguments.text_index, arguments.add);
    if (arguments.has_text && sources.text >= 0 && sources.text < list.targets[0].rows) {
      note(shared, arguments, list.targets[0], static_cast<unsigned>(sources.text), row, true);
    }
    if (sources.feature < 0 || first_feature == arguments.targets) continue;
    const int32_t k = static_cast<int32_t>(sources.feature);
    const GradientTarget& target =
        list.targets[target_of<int32_t, &GradientTarget::first>(arguments, list, first_feature, k)];
    if (k < target.first || static_cast<unsigned>(k - target.first) >= target.owned) continue;
    note(shared, arguments, target, static_cast<unsigned>(k - target.first), row, false);
  }
}

// Rows `row` .. of grad that stand for text row `token`, added up.
template <class Wide>
__device__ void write_sum(const GradientArguments& arguments, char* to, DType dtype, unsigned row, unsigned count) {
  const RowReader reader = {arguments.grad.dtype, arguments.grad.step, false, 1.0};
#pragma unroll 1
  for (unsigned first = lane() * kPack; first < arguments.dim; first += kLanes * kPack) {
    const unsigned size = pack_size(first, arguments.dim);
    Wide total[kPack], more[kPack];
    load_pack(arguments.grad.row(row), reader, first, size, total);
#pragma unroll 1
    for (unsigned r = 1; r < count; ++r) {
      load_pack(arguments.grad.row(row + r), reader, first, size, more);
#pragma unroll
      for (unsigned e = 0; e < kPack; ++e) total[e] += more[e];
    }
    store_pack(to, dtype, first, size, total);
  }
}

// How many rows of grad, from the first on, stand for its text row: those of an expanded placeholder, side by side.
__device__ inline unsigned rows_of_token(const GradientArguments& arguments, unsigned row, unsigned token) {
  unsigned count = 1;
  while (row + count < arguments.grad.rows &&
         row_sources(row + count, arguments.source_index, arguments.text_index, true).text == token) {
    ++count;
  }
  return count;
}

template <class Numbers>
__device__ void write_gradient(const GradientArguments& arguments, const GradientTarget& target, bool text,
                               unsigned index, unsigned noted) {
  const unsigned bytes = arguments.dim * static_cast<unsigned>(size_of(target.dtype));
  char* to = target.data + static_cast<int64_t>(index) * bytes;
  if (noted == kNobody) return copy_bytes(to, nullptr, bytes);
  const unsigned row = note_of(noted, text);
  if constexpr (std::is_same_v<Numbers, void>) {
    copy_bytes(to, arguments.grad.row(row), bytes);
  } else {
    const bool sums = text && arguments.add && arguments.text_index != nullptr;
    const unsigned count = sums ? rows_of_token(arguments, row, index) : 1;
    if (count == 1 && target.dtype == arguments.grad.dtype && arguments.grad.step == size_of(target.dtype)) {
      return copy_bytes(to, arguments.grad.row(row), bytes);
    }
    write_sum<Numbers>(arguments, to, target.dtype, row, count);
  }
}

// Blocks that a multiprocessor holds at least: as many as there are registers for without spills.
template <class Numbers>
constexpr int kGradientBlocks = std::is_same_v<Numbers, void> ? 4 : (std::is_same_v<Numbers, double> ? 2 : 3);

// Numbers: what is computed in, void where all rows are copied as they are.
template <class Numbers>
__global__ void __launch_bounds__(kGradientThreads, kGradientBlocks<Numbers>)
    gradients_kernel(const __grid_constant__ GradientArguments arguments, const __grid_constant__ GradientList list) {
  GradientShared& shared = shared_memory<GradientShared>();
  for (unsigned i = threadIdx.x; i < arguments.rows_each; i += kGradientThreads) shared.noted[i] = kNobody;
  cluster_barrier();
  note_rows(shared, arguments, list);
  cluster_barrier();
  if (blockIdx.x >= arguments.blocks) return;
  const int number = target_of<unsigned, &GradientTarget::first_block>(arguments, list, 0, blockIdx.x);
  const GradientTarget& target = list.targets[number];
  const unsigned first = (blockIdx.x - target.first_block) * arguments.rows_each;
  const unsigned left = target.rows - first;
  const unsigned count = left < arguments.rows_each ? left : arguments.rows_each;
#pragma unroll 1
  for (unsigned i = warp(); i < count; i += kGradientThreads / kLanes) {
    write_gradient<Numbers>(arguments, target, arguments.has_text && number == 0, first + i, shared.noted[i]);
  }
}

}  // namespace vlm_fuse::cuda
