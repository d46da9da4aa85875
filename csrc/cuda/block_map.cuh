// The class of every block of a mask from the bounds of the rows, and the lists of a BlockMask from the classes.
//
// classes_kernel: a block of threads owns a block of query rows. It counts, in two difference arrays over the blocks of
// keys, how many rows touch one and how many cover it, 2048 blocks of keys at a time; the classes are kept in memory, a
// byte each, and then listed, a warp a part of the line.
// column_lists_kernel: a block of threads owns 32 blocks of keys, a warp one. The classes go through shared memory, 128
// blocks of rows at a time, so that they are read along the lines.
#pragma once

#include "block_map.h"
#include "device.cuh"

namespace vlm_fuse::cuda {

constexpr int kClassThreads = 256;
constexpr int kClassWarps = kClassThreads / kLanes;
constexpr int kColumnsEach = 8;  // of a lane
constexpr int kTileColumns = kClassThreads * kColumnsEach;

constexpr int kListThreads = 1024;
constexpr int kTileLines = 128;

constexpr uint8_t kPartial = 1, kFull = 2;

struct BlockMapTask {
  MaskIntervals mask;
  uint32_t q_size, kv_size;
  int32_t kv_shift;  // -1: kv_size is not a power of two
  uint32_t lines;  // blocks of query rows
  uint32_t columns;  // blocks of keys
  int64_t pitch;  // bytes from one line of classes to the next
  uint8_t* classes;
  BlockMapOut out;

  __device__ int32_t divide(uint32_t key) const {
    return static_cast<int32_t>(kv_shift >= 0 ? key >> kv_shift : key / kv_size);
  }
  __device__ int32_t down(int32_t key) const { return divide(static_cast<uint32_t>(key)); }
  __device__ int32_t up(int32_t key) const { return divide(static_cast<uint32_t>(key) + kv_size - 1); }
};

// Both lists of one block of rows, or of keys, while they are written in order.
struct ListPair {
  int32_t* partial;
  int32_t* full;
  uint32_t partials, fulls;  // in all
  uint32_t partial_before = 0, full_before = 0;

  __device__ ListPair(const BlockLists& partial_lists, const BlockLists& full_lists, int64_t line, uint32_t length,
                      uint32_t partials, uint32_t fulls)
      : partial(partial_lists.indices + line * length),
        full(full_lists.indices + line * length),
        partials(partials),
        fulls(fulls) {}

  // The 32 entries from `first` on, one a lane; the chosen ones go to the front, the others behind all of those.
  __device__ void append(uint32_t first, uint32_t length, uint8_t kind) {
    const uint32_t entry = first + static_cast<uint32_t>(lane()), earlier = (1u << lane()) - 1;
    const uint32_t partial_here = __ballot_sync(kAllLanes, kind == kPartial),
                   full_here = __ballot_sync(kAllLanes, kind == kFull);
    const uint32_t partial_rank = partial_before + static_cast<uint32_t>(__popc(partial_here & earlier));
    const uint32_t full_rank = full_before + static_cast<uint32_t>(__popc(full_here & earlier));
    if (entry < length) {
      partial[kind == kPartial ? partial_rank : partials + entry - partial_rank] = static_cast<int32_t>(entry);
      full[kind == kFull ? full_rank : fulls + entry - full_rank] = static_cast<int32_t>(entry);
    }
    partial_before += static_cast<uint32_t>(__popc(partial_here));
    full_before += static_cast<uint32_t>(__popc(full_here));
  }
};

// --- classes, and lists of blocks of keys ----------------------------------------------------------------------------

struct ClassesShared {
  // one place more, which counts for nothing, and up to a multiple of 16 bytes
  int32_t touching[kTileColumns + 4];
  int32_t covering[kTileColumns + 4];
  int32_t touching_before[kClassWarps];
  int32_t covering_before[kClassWarps];
  uint32_t partials[kClassWarps];
  uint32_t fulls[kClassWarps];
};

// By a whole warp, whose rows mostly begin and end in the same block of keys.
__device__ inline void add_at(int32_t* counts, int32_t at, int32_t value) {
  const int32_t of_first = __shfl_sync(kAllLanes, at, 0);
  const bool same = __all_sync(kAllLanes, at == of_first) != 0;
  if (!same)
    atomicAdd(counts + at, value);
  else if (lane() == 0)
    atomicAdd(counts + at, value * kLanes);
}

// One more from `begin` to `end`, blocks of keys, of which the tile has those from `first` on.
__device__ inline void add_run(int32_t* counts, int32_t begin, int32_t end, uint32_t first) {
  auto place = [&](int32_t column) { return smaller(larger(column - static_cast<int32_t>(first), 0), kTileColumns); };
  const int32_t from = place(begin), upto = place(end);
  add_at(counts, from < upto ? from : kTileColumns, 1);
  add_at(counts, from < upto ? upto : kTileColumns, -1);
}

// Counts become running sums within a lane; returns their total.
__device__ inline int32_t load_sums(const int32_t* counts, int32_t sums[kColumnsEach]) {
  int32_t total = 0;
#pragma unroll
  for (int i = 0; i < kColumnsEach; i += 4) {
    const int4 four = *reinterpret_cast<const int4*>(counts + i);
    sums[i] = total += four.x;
    sums[i + 1] = total += four.y;
    sums[i + 2] = total += four.z;
    sums[i + 3] = total += four.w;
  }
  return total;
}

__device__ inline int32_t sum_of_warps_before(const int32_t* totals) {
  int32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kClassWarps; ++i) sum += i < warp() ? totals[i] : 0;
  return sum;
}

// The classes of the tile's blocks of keys from `first` on.
__device__ inline void write_classes(ClassesShared& shared, const BlockMapTask& task, int64_t first_row,
                                     int64_t last_row, uint32_t first, uint8_t* classes) {
  const uint32_t span = task.columns - first < kTileColumns ? task.columns - first : kTileColumns;
  for (uint32_t i = threadIdx.x; i < kTileColumns + 4; i += kClassThreads) {
    if (i < span + kColumnsEach) shared.touching[i] = shared.covering[i] = 0;
  }
  __syncthreads();
  for (int64_t row = first_row + static_cast<int64_t>(threadIdx.x) - lane(); row < last_row; row += kClassThreads) {
    Interval keys[2];
    const int count = row + lane() < last_row ? task.mask.at(row + lane(), keys) : 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i == 1 && task.mask.lo2 == nullptr) break;
      const Interval run = i < count ? keys[i] : Interval{0, 0};
      add_run(shared.touching, task.down(run.begin), task.up(run.end), first);
      add_run(shared.covering, task.up(run.begin), task.down(run.end), first);
    }
  }
  __syncthreads();
  const uint32_t own = threadIdx.x * kColumnsEach;  // of the tile
  const bool here = own < span;
  int32_t touching[kColumnsEach] = {}, covering[kColumnsEach] = {};
  const int32_t touching_total = here ? load_sums(shared.touching + own, touching) : 0;
  const int32_t covering_total = here ? load_sums(shared.covering + own, covering) : 0;
  const int32_t touching_upto = warp_scan(touching_total), covering_upto = warp_scan(covering_total);
  if (lane() == kLanes - 1) {
    shared.touching_before[warp()] = touching_upto;
    shared.covering_before[warp()] = covering_upto;
  }
  __syncthreads();
  if (!here) return;
  const int32_t touching_base = sum_of_warps_before(shared.touching_before) + touching_upto - touching_total;
  const int32_t covering_base = sum_of_warps_before(shared.covering_before) + covering_upto - covering_total;
  // a block that reaches beyond the last row is never full
  const int32_t whole = last_row - first_row == task.q_size ? static_cast<int32_t>(task.q_size) : INT32_MAX;
  uint32_t packed[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kColumnsEach; ++i) {
    const bool full = covering_base + covering[i] == whole, touched = touching_base + touching[i] > 0;
    const uint32_t kind = own + i < span ? (full ? kFull : (touched ? kPartial : 0)) : 0;
    packed[i / 4] |= kind << (i % 4 * 8);
  }
  *reinterpret_cast<uint2*>(classes + first + own) = make_uint2(packed[0], packed[1]);
}

__global__ void __launch_bounds__(kClassThreads, 4) classes_kernel(const BlockMapTask task) {
  auto& shared = shared_memory<ClassesShared>();
  const uint32_t sample = blockIdx.x / task.lines, line = blockIdx.x - sample * task.lines;
  const int64_t low = static_cast<int64_t>(line) * task.q_size, left = task.mask.rows - low;
  const int64_t first_row = sample * task.mask.rows + low,
                last_row = first_row + (left < task.q_size ? left : task.q_size);
  uint8_t* classes = task.classes + static_cast<int64_t>(blockIdx.x) * task.pitch;
  for (uint32_t first = 0; first < task.columns; first += kTileColumns) {
    __syncthreads();
    write_classes(shared, task, first_row, last_row, first, classes);
  }
  __syncthreads();
  // a warp lists a part of the line, some groups of 32
  const uint32_t groups = (task.columns + kLanes - 1) / kLanes, each = (groups + kClassWarps - 1) / kClassWarps;
  const uint32_t begin = static_cast<uint32_t>(warp()) * each * kLanes;
  const uint32_t end = task.columns - begin < each * kLanes ? task.columns : begin + each * kLanes;
  uint32_t partials = 0, fulls = 0;
  for (uint32_t column = begin + static_cast<uint32_t>(lane()) * 4; begin < task.columns && column < end;
       column += 4 * kLanes) {
    const uint32_t four = *reinterpret_cast<const uint32_t*>(classes + column);
    partials += static_cast<uint32_t>(__popc(four & 0x01010101u * kPartial));
    fulls += static_cast<uint32_t>(__popc(four & 0x01010101u * kFull));
  }
  partials = warp_sum(partials);
  fulls = warp_sum(fulls);
  if (lane() == 0) {
    shared.partials[warp()] = partials;
    shared.fulls[warp()] = fulls;
  }
  __syncthreads();
  partials = fulls = 0;
  uint32_t partials_before = 0, fulls_before = 0;
  for (int i = 0; i < kClassWarps; ++i) {
    partials_before += i < warp() ? shared.partials[i] : 0;
    fulls_before += i < warp() ? shared.fulls[i] : 0;
    partials += shared.partials[i];
    fulls += shared.fulls[i];
  }
  if (threadIdx.x == 0) {
    task.out.kv.counts[blockIdx.x] = static_cast<int32_t>(partials);
    task.out.full_kv.counts[blockIdx.x] = static_cast<int32_t>(fulls);
  }
  if (begin >= task.columns) return;
  ListPair lists(task.out.kv, task.out.full_kv, blockIdx.x, task.columns, partials, fulls);
  lists.partial_before = partials_before;
  lists.full_before = fulls_before;
  for (uint32_t first = begin; first < end; first += kLanes) {
    lists.append(first, task.columns, classes[first + static_cast<uint32_t>(lane())]);
  }
}

// --- lists of blocks of rows -----------------------------------------------------------------------------------------

struct ColumnsShared {
  // a word more a line, so that a warp reads 32 lines without conflicts
  uint32_t tile[kTileLines][kLanes / 4 + 1];
};

// By the whole block of threads: each(first line, class of the lane's line) for every 32 lines of the warp's column.
template <class Each>
__device__ void for_lines(ColumnsShared& shared, const BlockMapTask& task, const uint8_t* classes, Each&& each) {
  const uint32_t line = threadIdx.x / (kLanes / 4), word = threadIdx.x % (kLanes / 4);
  const int column = warp();
  for (uint32_t first = 0; first < task.lines; first += kTileLines) {
    __syncthreads();
    uint32_t four = 0;
    if (line < task.lines - first) {
      four = *reinterpret_cast<const uint32_t*>(classes + static_cast<int64_t>(first + line) * task.pitch + 4 * word);
    }
    shared.tile[line][word] = four;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTileLines; i += kLanes) {
      each(first + static_cast<uint32_t>(i),
           static_cast<uint8_t>(shared.tile[i + lane()][column / 4] >> (column % 4 * 8)));
    }
  }
}

__global__ void __launch_bounds__(kListThreads, 1) column_lists_kernel(const BlockMapTask task) {
  auto& shared = shared_memory<ColumnsShared>();
  const uint32_t tiles = (task.columns + kLanes - 1) / kLanes;
  const uint32_t sample = blockIdx.x / tiles, first = (blockIdx.x - sample * tiles) * kLanes;
  const uint8_t* classes = task.classes + static_cast<int64_t>(sample) * task.lines * task.pitch + first;
  uint32_t partials = 0, fulls = 0;
  for_lines(shared, task, classes, [&](uint32_t, uint8_t kind) {
    partials += kind == kPartial;
    fulls += kind == kFull;
  });
  partials = warp_sum(partials);
  fulls = warp_sum(fulls);
  const uint32_t column = first + static_cast<uint32_t>(warp());
  const bool here = column < task.columns;  // a warp without a column goes along for the barriers
  const int64_t list = static_cast<int64_t>(sample) * task.columns + (here ? column : first);
  if (here && lane() == 0) {
    task.out.q.counts[list] = static_cast<int32_t>(partials);
    task.out.full_q.counts[list] = static_cast<int32_t>(fulls);
  }
  ListPair lists(task.out.q, task.out.full_q, list, task.lines, partials, fulls);
  for_lines(shared, task, classes, [&](uint32_t first_line, uint8_t kind) {
    if (here && first_line < task.lines) lists.append(first_line, task.lines, kind);
  });
}

}  // namespace vlm_fuse::cuda
