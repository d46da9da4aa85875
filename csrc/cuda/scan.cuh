// The launches that count: placeholders by kind, runs of them, kept rows and documents.
//
// A first launch writes what each chunk holds and what its segments hold before each other; the next one sums the
// chunks before its own.
#pragma once

#include "documents.cuh"
#include "placeholders.cuh"

namespace vlm_fuse::cuda {

// --- sizes and counts
// -------------------------------------------------------------------------------------------------

// Some neighbouring numbers of a list, 0 behind its end. What is below 0 counts as 0, and what is absurd is cut, so
// that no sum of them overflows.
template <int kEach>
__device__ void read_sizes(const int64_t* values, int64_t first, int64_t count, int64_t (&to)[kEach]) {
  constexpr int64_t kHuge = int64_t{1} << 40;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int64_t value = first + i < count ? values[first + i] : 0;
    to[i] = value < 0 ? 0 : at_most(value, kHuge);
  }
}

// ends[i] = values[0] + .. + values[i], by a whole block, which reads ahead.
__device__ inline void cumulate(const int64_t* values, int64_t count, int64_t* ends, int64_t (&of_warps)[kPlanWarps]) {
  constexpr int64_t kMost = int64_t{1} << 61;
  constexpr int kEach = 8;
  int64_t carry = 0, mine[kEach], next[kEach];
  int64_t first = static_cast<int64_t>(threadIdx.x) * kEach;
  read_sizes(values, first, count, next);
  for (int64_t base = 0; base < count; base += kEach * kPlanThreads, first += kEach * kPlanThreads) {
    int64_t sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) sum += mine[i] = next[i];
    read_sizes(values, first + kEach * kPlanThreads, count, next);
    const Scanned scanned = block_scan(sum, of_warps);
    sum = carry + scanned.before;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      sum += mine[i];
      if (first + i < count) ends[first + i] = at_most(sum, kMost);
    }
    carry = at_most(carry + scanned.total, kMost);
  }
}

// --- tokens
// -----------------------------------------------------------------------------------------------------------

struct CountShared {
  int64_t of_warps[kPlanWarps];
  int64_t rows[kPlanWarps];
  DocumentRuns documents[kPlanWarps];
  int32_t placeholders[kPlanWarps][kMostKinds];
  int32_t runs[kPlanWarps][kMostKinds];
  KindBases bases;
};

// Rows that stand in front of a sample's tokens, written down for the next launch.
__device__ inline int64_t count_front(const Counting& batch, int32_t sample, unsigned counted) {
  int64_t rows = 0;
  for (int c = 0; c < batch.kinds; ++c) {
    const KindRows own = rows_in_front(batch.kind[c], (counted >> c & 1) != 0, sample);
    batch.front[int64_t{c} * batch.samples + sample] = own;
    rows += own.count;
  }
  return rows;
}

// kKinds: placeholders and runs; kRows: rows and documents. Both at once where a token has at most one row; else rows
// can be counted only after the placeholders. The blocks behind the chunks cumulate sizes and counts, a list each.
template <bool kKinds, bool kRows>
__global__ void __launch_bounds__(kPlanThreads, kPlanBlocks) count_kernel(const __grid_constant__ Counting batch) {
  CountShared& shared = shared_memory<CountShared>();
  const int chunk = static_cast<int>(blockIdx.x);
  if (kKinds && chunk >= batch.chunks) {
    const int list = chunk - batch.chunks;
    const CountedKind& kind = batch.kind[list / 2];
    if (list % 2 == 0 && kind.image_ends != nullptr) {
      cumulate(kind.given.sizes, kind.given.images, kind.image_ends, shared.of_warps);
    }
    if (list % 2 == 1 && kind.count_ends != nullptr) {
      cumulate(kind.given.counts, batch.samples, kind.count_ends, shared.of_warps);
    }
    return;
  }
  const int64_t segment = int64_t{chunk} * kPlanWarps + warp();
  const int64_t low = segment * batch.segment;
  const int64_t high = at_most(low + batch.segment, batch.count);
  if (kKinds && batch.table != nullptr) {
    const int64_t step = int64_t{batch.chunks} * kPlanThreads;
    for (int64_t i = int64_t{chunk} * kPlanThreads + threadIdx.x; i < batch.table_size; i += step) batch.table[i] = -1;
    if (chunk == 0 && threadIdx.x == 0) *batch.returning = INT32_MAX;
  }
  KindWalk walk = {0, 0};
  unsigned counted = 0;
  if (kRows && !kKinds) {
    sum_kinds(batch, chunk, shared.bases);
    __syncthreads();
    const int64_t sample = low < batch.count ? static_cast<uint32_t>(low) / static_cast<uint32_t>(batch.length) : 0;
    walk = walk_from(batch, shared.bases, chunk, low, sample);
    counted = counted_kinds(batch);
  }
  int32_t placeholders = 0, runs = 0;  // lane c: of kind c
  int64_t rows = 0;
  OpenDocument open = after(no_documents());
  int64_t first_id = 0;
  int32_t first_sample = -1;
  for (int64_t at = low; at < high; at += kLanes) {
    const Token token = read_token(batch, at + lane(), high);
    const bool begins_sample = token.column == 0;
    const unsigned begins = __ballot_sync(kAllLanes, begins_sample);
    if (kKinds && batch.scheme != Scheme::kImagesFirst) {
      if (begins != 0 || __any_sync(kAllLanes, token.kind >= 0)) {
        for (int c = 0; c < batch.kinds; ++c) {
          const unsigned here = __ballot_sync(kAllLanes, token.kind == c);
          const int32_t before = __shfl_sync(kAllLanes, placeholders, c);
          if (begins_sample) {
            batch.sample_placeholders[int64_t{c} * batch.samples + token.sample] =
                before + __popc(here & lanes_before());
          }
          if (lane() == c) placeholders = before + __popc(here);
        }
      }
      if (batch.runs) {
        const bool joins = joins_run(batch, token);
        if (__any_sync(kAllLanes, token.kind >= 0)) number_runs(batch, runs, token, joins);
      }
    }
    if (kRows) {
      const unsigned kept = __ballot_sync(kAllLanes, token.kept);
      int64_t before, gives;
      if (kKinds) {
        before = rows + __popc(kept & lanes_before());
        gives = token.kept;
        rows += __popc(kept);
      } else {
        gives = token.kept;
        if (batch.scheme == Scheme::kExpand) {
          const Ordinal ordinal = number_placeholders(batch, walk, token, begins);
          if (token.kept) gives = expand_token(batch, token, ordinal, counted).rows.count;
        } else if (begins_sample) {
          gives += count_front(batch, token.sample, counted);
        }
        const int64_t upto = warp_scan(gives);
        before = rows + upto - gives;
        rows += __shfl_sync(kAllLanes, upto, kLanes - 1);
      }
      if (begins_sample) batch.sample_rows[token.sample] = before;
      if (batch.open) {
        if (first_sample < 0 && kept != 0) {
          const int first = __ffs(static_cast<int>(kept)) - 1;
          first_id = __shfl_sync(kAllLanes, token.document, first);
          first_sample = __shfl_sync(kAllLanes, token.sample, first);
        }
        open_documents(open, token, kept, before);
      }
    }
  }
  if (kKinds) {
    shared.placeholders[warp()][lane()] = placeholders;
    shared.runs[warp()][lane()] = runs;
  }
  if (kRows && lane() == 0) {
    shared.rows[warp()] = rows;
    shared.documents[warp()] = {
        rows,       open.runs > 1 ? open.row : -1,     first_id,  open.id, first_sample, open.sample,
        open.token, open.runs > 0 ? open.runs - 1 : 0, open.falls};
  }
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  if (kKinds && thread < batch.kinds) {
    int32_t before = 0, runs_before = 0;
    for (int w = 0; w < kPlanWarps; ++w) {
      const int64_t to = thread * segments(batch) + int64_t{chunk} * kPlanWarps + w;
      batch.segment_placeholders[to] = before;
      before += shared.placeholders[w][thread];
      if (!batch.runs) continue;
      batch.segment_runs[to] = runs_before;
      runs_before += shared.runs[w][thread];
    }
    batch.placeholders[int64_t{thread} * batch.chunks + chunk] = before;
    if (batch.runs) batch.runs_of_chunk[int64_t{thread} * batch.chunks + chunk] = runs_before;
  }
  if (kRows && thread == kLanes) {
    int64_t before = 0;
    for (int w = 0; w < kPlanWarps; ++w) {
      batch.segment_rows[int64_t{chunk} * kPlanWarps + w] = before;
      before += shared.rows[w];
    }
    batch.rows[chunk] = before;
  }
  if (kRows && batch.open && thread == 2 * kLanes) {
    DocumentRuns before = no_documents();
    for (int w = 0; w < kPlanWarps; ++w) {
      batch.segment_documents[int64_t{chunk} * kPlanWarps + w] = before;
      before = joined(before, shared.documents[w]);
    }
    batch.documents[chunk] = before;
  }
}

// --- totals
// -----------------------------------------------------------------------------------------------------------

struct TotalsShared {
  int64_t row_base[kMostChunks + 1];
  int64_t of_warps[kPlanWarps];
  DocumentRuns documents[kPlanWarps];
};

// The longest sample of a block's threads, for all of them; `first`: the first sample of so many rows.
struct Longest {
  int64_t rows;
  int64_t first;
};

__device__ inline Longest longest_sample(const Counting& batch, const int64_t* row_base,
                                         int64_t (&of_warps)[kPlanWarps]) {
  Longest mine = {0, 0};
  for (int64_t sample = threadIdx.x; sample < batch.samples; sample += kPlanThreads) {
    const int64_t rows = rows_before_sample(batch, row_base, sample + 1) - rows_before_sample(batch, row_base, sample);
    if (rows > mine.rows) mine = {rows, sample};
  }
  const int64_t rows = block_max(mine.rows, of_warps);
  const int64_t first = -block_max(mine.rows == rows ? -mine.first : INT64_MIN, of_warps);
  return {rows, first};
}

// One block: kept rows of the longest sample, of all, documents, and the placeholders of each kind.
__global__ void __launch_bounds__(kPlanThreads) totals_kernel(const __grid_constant__ Counting batch, int64_t* totals) {
  TotalsShared& shared = shared_memory<TotalsShared>();
  sums_before(batch.rows, batch.chunks, shared.row_base, shared.of_warps);
  const Longest longest = longest_sample(batch, shared.row_base, shared.of_warps);
  const DocumentRuns documents = join_chunks(batch.documents, 0, batch.chunks, shared.documents);
  if (threadIdx.x == 0) {
    totals[0] = longest.rows;
    totals[1] = shared.row_base[batch.chunks];
    totals[2] = after(documents).runs;
  }
  for (int c = warp(); c < batch.kinds; c += kPlanWarps) {
    int64_t sum = 0;
    if (batch.scheme != Scheme::kImagesFirst) {
      for (int i = lane(); i < batch.chunks; i += kLanes) sum += batch.placeholders[int64_t{c} * batch.chunks + i];
    }
    sum = warp_sum(sum);
    if (lane() == 0) totals[3 + c] = sum;
  }
}

}  // namespace vlm_fuse::cuda
