// The intervals of a mask. An output row is cut into slices of up to 4096 rows, a block owns a slice, a warp groups of
// 32 rows: a lane is a row, and what lies before it in its group is found in the warp's ballots. What lies in the
// groups before is scanned over the block's groups, and over the summaries of the slices before.
//
// What a row has to know of rows behind it (where its document, its image and the holes in it end) comes from tables
// that are written first: by place, an entry at the first row of every document and image, and the holes in order.
#pragma once

#include "intervals.h"
#include "record.cuh"

namespace vlm_fuse::cuda {

constexpr int kGroups = 128;  // of a slice
constexpr int kSliceRows = kGroups * kLanes;  // at most
constexpr int kSliceThreads = 1024;

// What a row knows of the kept rows before it in its output row; -1: there is none.
struct KeptBefore {
  int32_t last_kept;
  int32_t last_start;  // first row of a document
  int32_t holes;       // that have ended
  int32_t last_image;  // first row of an image
};

// Of a slice seen alone. Whether its first kept row starts a document or ends a hole depends on the slices before: it
// is counted as neither.
struct SliceSummary {
  int32_t first_kept;
  KeptBefore at_end;
};

struct MaskTables {
  Interval* holes;                // (output rows, hole_capacity), in order
  unsigned long long* documents;  // (output rows, parent_count): by id, packed; 0: not there
  int32_t* document_end;          // (output rows, width), at the first row
  int32_t* image_end;
  SliceSummary* summaries;        // (output rows, slices)
  int32_t* bad;                   // the first row of a slice that needs too many intervals, else kNoLimit
};

struct MaskTask {
  MaskRows rows;
  MaskOut out;
  MaskTables tables;
  int64_t hole_capacity;
  uint32_t slices;     // of an output row
  int32_t slice_rows;  // a multiple of 32
  int64_t* status;
};

// The slice that a block owns.
struct Slice {
  const int32_t* ids;     // of its output row
  const int32_t* images;  // may be null
  int64_t output_row;
  int32_t number;
  int32_t low, high;  // rows of the slice
  int32_t groups;

  __device__ explicit Slice(const MaskTask& task) {
    const MaskRows& rows = task.rows;
    const uint32_t line = blockIdx.x / task.slices;
    output_row = line;
    number = static_cast<int32_t>(blockIdx.x - line * task.slices);
    ids = rows.document_ids + output_row * rows.width;
    images = rows.image_ids == nullptr ? nullptr : rows.image_ids + output_row * rows.width;
    low = number * task.slice_rows;
    high = smaller(static_cast<int32_t>(rows.width) - low, task.slice_rows) + low;
    groups = (high - low + kLanes - 1) / kLanes;
  }

  __device__ int32_t group_row(int group) const { return low + group * kLanes; }

  // Whether row + 1 lies in the same image as `row`, which is one of an image.
  __device__ bool image_goes_on(int32_t row, int32_t width) const {
    return row + 1 < width && images[row + 1] == images[row] && ids[row + 1] == ids[row];
  }
};

struct SliceShared {
  uint32_t kept[kGroups];  // a bit a row
  uint32_t starts[kGroups];
  uint32_t hole_ends[kGroups];
  uint32_t images[kGroups];  // first rows of images
  KeptBefore before[kGroups];
  KeptBefore at_begin;  // of the slice
  KeptBefore at_end;
  int32_t holes;  // of the whole output row
  int32_t bad[kSliceThreads / kLanes];
};

__device__ inline int warps() { return static_cast<int>(blockDim.x / kLanes); }
__device__ inline bool first_thread() { return threadIdx.x == 0; }
__device__ inline KeptBefore nothing_before() { return {-1, -1, 0, -1}; }

__device__ inline uint32_t earlier_rows() { return (1u << lane()) - 1; }
__device__ inline uint32_t rows_so_far() { return kAllLanes >> (kLanes - 1 - lane()); }

// The last row of a group among those of `bits`, or `otherwise`.
__device__ inline int32_t last_row(uint32_t bits, int32_t group_row, int32_t otherwise) {
  return bits == 0 ? otherwise : group_row + kLanes - 1 - __clz(static_cast<int>(bits));
}

struct Larger {
  static constexpr int32_t kNothing = -1;
  __device__ static int32_t of(int32_t a, int32_t b) { return larger(a, b); }
};

struct Sum {
  static constexpr int32_t kNothing = 0;
  __device__ static int32_t of(int32_t a, int32_t b) { return a + b; }
};

// By one warp: `field` of every group, its own value at first, becomes that of all before it, from the slice's begin
// on; at_end gets that of all.
template <class Operation>
__device__ void scan_groups(SliceShared& shared, int groups, int32_t KeptBefore::* field) {
  int32_t carry = shared.at_begin.*field;
  for (int first = 0; first < groups; first += kLanes) {
    const int group = first + lane();
    int32_t value = group < groups ? shared.before[group].*field : Operation::kNothing;
#pragma unroll
    for (int offset = 1; offset < kLanes; offset *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, value, offset);
      if (lane() >= offset) value = Operation::of(other, value);
    }
    const int32_t others = __shfl_up_sync(kAllLanes, value, 1);
    if (group < groups) shared.before[group].*field = lane() == 0 ? carry : Operation::of(carry, others);
    carry = Operation::of(carry, __shfl_sync(kAllLanes, value, kLanes - 1));
  }
  if (lane() == 0) shared.at_end.*field = carry;
}

// Every group's rows that are kept, that start a document or an image or end a hole, and what lies before the group.
// Some thread has written at_begin, and a barrier lies in between.
__device__ inline void scan_slice(SliceShared& shared, const Slice& slice) {
  for (int group = warp(); group < slice.groups; group += warps()) {
    const int32_t row = slice.group_row(group) + lane();
    const uint32_t kept = __ballot_sync(kAllLanes, row < slice.high && slice.ids[row] >= 0);
    if (lane() == 0) {
      shared.kept[group] = kept;
      shared.before[group].last_kept = last_row(kept, slice.group_row(group), -1);
    }
  }
  __syncthreads();
  if (warp() == 0) scan_groups<Larger>(shared, slice.groups, &KeptBefore::last_kept);
  __syncthreads();
  for (int group = warp(); group < slice.groups; group += warps()) {
    const int32_t first = slice.group_row(group), row = first + lane();
    const uint32_t bits = shared.kept[group];
    const bool kept = (bits >> lane() & 1) != 0;
    const int32_t previous = last_row(bits & earlier_rows(), first, shared.before[group].last_kept);
    const int32_t id = kept ? slice.ids[row] : -1;
    const bool start = kept && (previous < 0 || slice.ids[previous] != id);
    bool image = false;
    if (slice.images != nullptr && kept) {
      image = slice.images[row] >= 0 && !(row > 0 && slice.image_goes_on(row - 1, slice.high));
    }
    const uint32_t starts = __ballot_sync(kAllLanes, start);
    const uint32_t hole_ends = __ballot_sync(kAllLanes, kept && !start && previous < row - 1);
    const uint32_t images = __ballot_sync(kAllLanes, image);
    if (lane() == 0) {
      shared.starts[group] = starts;
      shared.hole_ends[group] = hole_ends;
      shared.images[group] = images;
      shared.before[group].last_start = last_row(starts, first, -1);
      shared.before[group].holes = __popc(hole_ends);
      shared.before[group].last_image = last_row(images, first, -1);
    }
  }
  __syncthreads();
  if (warp() == 0) {
    scan_groups<Larger>(shared, slice.groups, &KeptBefore::last_start);
    scan_groups<Sum>(shared, slice.groups, &KeptBefore::holes);
    scan_groups<Larger>(shared, slice.groups, &KeptBefore::last_image);
  }
  __syncthreads();
}

// By one warp: what lies before the slice, from the summaries of all slices of its output row, and the row's holes.
__device__ inline void join_summaries(SliceShared& shared, const MaskTask& task, const Slice& slice) {
  const SliceSummary* summaries = task.tables.summaries + slice.output_row * task.slices;
  KeptBefore before = nothing_before();
  int32_t last_kept = -1, holes = 0;  // of all slices so far
  for (int32_t first = 0; first < static_cast<int32_t>(task.slices); first += kLanes) {
    const int32_t number = first + lane();
    SliceSummary mine = {-1, nothing_before()};
    if (number < static_cast<int32_t>(task.slices)) mine = summaries[number];
    int32_t kept = mine.at_end.last_kept;
#pragma unroll
    for (int offset = 1; offset < kLanes; offset *= 2) {
      const int32_t other = __shfl_up_sync(kAllLanes, kept, offset);
      if (lane() >= offset) kept = larger(kept, other);
    }
    const int32_t others = __shfl_up_sync(kAllLanes, kept, 1);
    const int32_t previous = lane() == 0 ? last_kept : larger(last_kept, others);
    if (mine.first_kept >= 0) {
      const bool start = previous < 0 || slice.ids[previous] != slice.ids[mine.first_kept];
      if (start) mine.at_end.last_start = larger(mine.at_end.last_start, mine.first_kept);
      if (!start && previous < mine.first_kept - 1) ++mine.at_end.holes;
    }
    last_kept = larger(last_kept, __shfl_sync(kAllLanes, kept, kLanes - 1));
    holes += warp_sum(mine.at_end.holes);
    if (number >= slice.number) mine.at_end = nothing_before();
    before.last_kept = larger(before.last_kept, warp_max(mine.at_end.last_kept));
    before.last_start = larger(before.last_start, warp_max(mine.at_end.last_start));
    before.holes += warp_sum(mine.at_end.holes);
    before.last_image = larger(before.last_image, warp_max(mine.at_end.last_image));
  }
  if (lane() == 0) {
    shared.at_begin = before;
    shared.holes = holes;
  }
}

// --- the tables ------------------------------------------------------------------------------------------------------

// Documents by id are not there at first. The slices of an output row share them.
__device__ inline void clear_documents(const MaskTask& task, const Slice& slice) {
  const int64_t count = task.rows.parent_count, step = static_cast<int64_t>(task.slices) * blockDim.x;
  unsigned long long* documents = task.tables.documents + slice.output_row * count;
  for (int64_t i = static_cast<int64_t>(slice.number) * blockDim.x + threadIdx.x; i < count; i += step)
    documents[i] = 0;
}

__device__ inline void end_document(const MaskTask& task, const Slice& slice, Interval document) {
  task.tables.document_end[slice.output_row * task.rows.width + document.begin] = document.end;
  const int32_t id = slice.ids[document.begin];
  if (id >= task.rows.parent_count) return;
  // an id that returns, which is an error of the caller's, stands for its last document
  atomicMax(task.tables.documents + slice.output_row * task.rows.parent_count + id,
            static_cast<unsigned long long>(document.begin + 1ll) << 32 | static_cast<uint32_t>(document.end));
}

__device__ inline Interval document_of(const MaskTask& task, const Slice& slice, int64_t id) {
  const int64_t count = task.rows.parent_count;
  const unsigned long long packed = id < 0 || id >= count ? 0 : task.tables.documents[slice.output_row * count + id];
  if (packed == 0) return {0, 0};
  return {static_cast<int32_t>((packed >> 32) - 1), static_cast<int32_t>(packed & 0xffffffffu)};
}

// A document is entered where the next one starts, the last one by the last slice; an image by its last row; a hole
// by the row behind it.
__device__ inline void write_tables(SliceShared& shared, const MaskTask& task, const Slice& slice) {
  const int32_t width = static_cast<int32_t>(task.rows.width);
  Interval* holes = task.tables.holes + slice.output_row * task.hole_capacity;
  for (int group = warp(); group < slice.groups; group += warps()) {
    const KeptBefore before = shared.before[group];
    const int32_t first = slice.group_row(group), row = first + lane();
    const uint32_t own = 1u << lane();
    const int32_t previous = last_row(shared.kept[group] & earlier_rows(), first, before.last_kept);
    if ((shared.starts[group] & own) != 0 && previous >= 0) {
      end_document(task, slice,
                   {last_row(shared.starts[group] & earlier_rows(), first, before.last_start), previous + 1});
    }
    if ((shared.hole_ends[group] & own) != 0) {
      holes[before.holes + __popc(shared.hole_ends[group] & earlier_rows())] = {previous + 1, row};
    }
    if (slice.images != nullptr && (shared.kept[group] & own) != 0 && slice.images[row] >= 0 &&
        !slice.image_goes_on(row, width)) {
      const int32_t begin = last_row(shared.images[group] & rows_so_far(), first, before.last_image);
      task.tables.image_end[slice.output_row * width + begin] = row + 1;
    }
  }
  if (first_thread() && slice.high == width && shared.at_end.last_kept >= 0) {
    end_document(task, slice, {shared.at_end.last_start, shared.at_end.last_kept + 1});
  }
}

// --- the rows --------------------------------------------------------------------------------------------------------

// Whether what its document and its place in it are says all about a row.
__device__ inline bool is_plain(const MaskRows& rows, int32_t holes) {
  return holes == 0 && rows.attend.sinks == 0 && rows.prefix == 0 && rows.prefix_lengths == nullptr &&
         rows.parent_count == 0 && rows.image_ids == nullptr;
}

__device__ inline int32_t prefix_of(const MaskRows& rows, int32_t id) {
  if (rows.prefix_lengths == nullptr) return rows.prefix;
  const int32_t entry = rows.one_prefix ? 0 : id;
  const int64_t length = entry < rows.prefix_count ? rows.prefix_lengths[entry] : 0;
  return static_cast<int32_t>(length < 0 ? 0 : (length > kNoLimit ? kNoLimit : length));
}

// Writes the keys of every row of the slice; returns the first that needs too many intervals, to every thread.
__device__ inline int32_t write_intervals(SliceShared& shared, const MaskTask& task, const Slice& slice) {
  const MaskRows& rows = task.rows;
  const MaskOut& out = task.out;
  const int64_t offset = slice.output_row * rows.width;
  const Interval* holes = task.tables.holes + slice.output_row * task.hole_capacity;
  const bool plain = is_plain(rows, shared.holes);
  int32_t bad = kNoLimit;
  for (int group = warp(); group < slice.groups; group += warps()) {
    const int32_t first = slice.group_row(group), row = first + lane();
    Interval keys[2] = {{0, 0}, {0, 0}};
    bool fits = true;
    if ((shared.kept[group] >> lane() & 1) != 0) {
      QueryRow query;
      query.row = row;
      query.document.begin = last_row(shared.starts[group] & rows_so_far(), first, shared.before[group].last_start);
      query.document.end = task.tables.document_end[offset + query.document.begin];
      if (plain) {
        keys[0] = own_document(rows.attend, query);
      } else {
        const int32_t id = slice.ids[row];
        query.image = query.parent = {0, 0};
        if (slice.images != nullptr && slice.images[row] >= 0) {
          query.image.begin = last_row(shared.images[group] & rows_so_far(), first, shared.before[group].last_image);
          query.image.end = task.tables.image_end[offset + query.image.begin];
        }
        query.prefix = prefix_of(rows, id);
        if (id < rows.parent_count) query.parent = document_of(task, slice, rows.parent_ids[id]);
        fits = cut_holes(visible(rows.attend, query), holes, shared.holes, keys);
        fits = fits && (out.lo2 != nullptr || keys[1].begin >= keys[1].end);
      }
    }
    const uint32_t here = __ballot_sync(kAllLanes, !fits);
    if (bad == kNoLimit && here != 0) bad = first + __ffs(static_cast<int>(here)) - 1;
    if (row >= slice.high) continue;
    out.lo[offset + row] = keys[0].begin;
    out.hi[offset + row] = keys[0].end;
    if (out.lo2 == nullptr) continue;
    out.lo2[offset + row] = keys[1].begin;
    out.hi2[offset + row] = keys[1].end;
  }
  if (lane() == 0) shared.bad[warp()] = bad;
  __syncthreads();
  for (int i = 0; i < warps(); ++i) bad = smaller(bad, shared.bad[i]);
  return bad;
}

// --- errors ----------------------------------------------------------------------------------------------------------

// By one thread.
__device__ inline void report_row(int64_t* status, int64_t flat_row, int32_t row) {
  flag(status, {kTooManyIntervals, flat_row, 0, 0, 0, 0, 0, row});
}

// By the whole block, behind the rows. A slice that is all there is says itself what is wrong with it.
__device__ inline void keep_bad_row(const MaskTask& task, const Slice& slice, int32_t bad) {
  if (task.status == nullptr || !first_thread()) return;
  if (gridDim.x > 1)
    task.tables.bad[blockIdx.x] = bad;
  else if (bad != kNoLimit)
    report_row(task.status, slice.output_row * task.rows.width + bad, bad);
}

// One block, which owns the status.
__global__ void __launch_bounds__(kSliceThreads, 1) report_intervals_kernel(const MaskTask task, int32_t slices) {
  auto& shared = shared_memory<SliceShared>();
  int32_t nearest = -1;  // counted from the end, so that the first is the largest
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < slices; i += static_cast<int32_t>(blockDim.x)) {
    if (task.tables.bad[i] != kNoLimit) nearest = larger(nearest, slices - 1 - i);
  }
  nearest = warp_max(nearest);
  if (lane() == 0) shared.bad[warp()] = nearest;
  __syncthreads();
  if (!first_thread()) return;
  for (int i = 0; i < warps(); ++i) nearest = larger(nearest, shared.bad[i]);
  if (nearest < 0) return;
  const int32_t slice = slices - 1 - nearest, row = task.tables.bad[slice];
  report_row(task.status, static_cast<uint32_t>(slice) / task.slices * task.rows.width + row, row);
}

// --- output rows of one slice ----------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kSliceThreads, 1) short_rows_kernel(const MaskTask task) {
  auto& shared = shared_memory<SliceShared>();
  const Slice slice(task);
  clear_documents(task, slice);
  if (first_thread()) shared.at_begin = nothing_before();
  __syncthreads();
  scan_slice(shared, slice);
  if (first_thread()) shared.holes = shared.at_end.holes;
  write_tables(shared, task, slice);
  __syncthreads();
  keep_bad_row(task, slice, write_intervals(shared, task, slice));
}

// --- longer ones, in three launches ----------------------------------------------------------------------------------

__global__ void __launch_bounds__(kSliceThreads, 1) slice_summaries_kernel(const MaskTask task) {
  auto& shared = shared_memory<SliceShared>();
  const Slice slice(task);
  clear_documents(task, slice);
  if (first_thread()) shared.at_begin = nothing_before();
  __syncthreads();
  scan_slice(shared, slice);
  if (!first_thread()) return;
  SliceSummary summary = {-1, shared.at_end};
  for (int group = 0; group < slice.groups && summary.first_kept < 0; ++group) {
    if (shared.kept[group] == 0) continue;
    summary.first_kept = slice.group_row(group) + __ffs(static_cast<int>(shared.kept[group])) - 1;
  }
  if (summary.at_end.last_start == summary.first_kept) summary.at_end.last_start = -1;
  task.tables.summaries[blockIdx.x] = summary;
}

__global__ void __launch_bounds__(kSliceThreads, 1) slice_tables_kernel(const MaskTask task) {
  auto& shared = shared_memory<SliceShared>();
  const Slice slice(task);
  if (warp() == 0) join_summaries(shared, task, slice);
  __syncthreads();
  scan_slice(shared, slice);
  write_tables(shared, task, slice);
}

__global__ void __launch_bounds__(kSliceThreads, 1) long_rows_kernel(const MaskTask task) {
  auto& shared = shared_memory<SliceShared>();
  const Slice slice(task);
  if (warp() == 0) join_summaries(shared, task, slice);
  __syncthreads();
  scan_slice(shared, slice);
  keep_bad_row(task, slice, write_intervals(shared, task, slice));
}

}  // namespace vlm_fuse::cuda
