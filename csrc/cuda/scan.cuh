// Counting along the tokens: placeholders by kind, runs of them, kept rows and documents, before any token.
//
// The tokens are cut into segments of equal length, whatever their samples. A warp owns a segment and reads it 32
// tokens at a time, each lane one; a block owns the segments of its warps, a chunk. A first launch writes what each
// chunk holds and what its segments hold before each other; the next one sums the chunks before its own. What depends
// on the token before, which may be far back, is combined the same way (DocumentRuns). Lane c of a warp counts kind c.
#pragma once

#include "device.cuh"
#include "images.cuh"
#include "plan.h"

namespace vlm_fuse::cuda {

constexpr int kPlanWarps = 8;
constexpr int kPlanThreads = kPlanWarps * kLanes;
constexpr int kPlanBlocks = 3;  // that a processor runs at once
constexpr int kMostChunks = 1024;

// The documents of a stretch of tokens. Whether the first kept token begins one is known only to those who see what is
// before; it is left out of `starts` and `last_start`, and has no rows of the stretch before it.
struct DocumentRuns {
  int64_t rows;
  int64_t last_start;  // rows before the last document that begins, -1: none
  int64_t first_id, last_id;
  int32_t first_sample, last_sample;  // of the first and last kept token, -1: none
  int32_t last_token;
  int32_t starts;
  int32_t falls;  // whether an id is below the one before it in its sample
};

// The batch as kernels take it, and their memory. A sample without tokens has one that is not kept, and is not read.
struct Counting {
  Integers tokens, attention_mask, document_ids;
  int32_t samples, length, count;
  int32_t kinds;
  int32_t segment, chunks;
  bool no_tokens;
  bool open;    // documents are counted: samples where no ids are given
  bool runs;    // runs of placeholders are counted
  bool counts;  // some kind may have counts
  Scheme scheme;

  int32_t* placeholders;         // (kinds, chunks) in each chunk
  int32_t* runs_of_chunk;        // the same of runs
  int32_t* segment_placeholders;  // (kinds, segments) before each segment, in its chunk
  int32_t* segment_runs;
  int32_t* sample_placeholders;  // (kinds, samples) before each sample, in the segment in which it begins
  int64_t* rows;                 // (chunks,)
  int64_t* segment_rows;
  int64_t* sample_rows;
  DocumentRuns* documents;       // (chunks,)
  DocumentRuns* segment_documents;
  KindRows* front;               // (kinds, samples) rows of images_first
  int32_t* table;                // documents by sample and id: the first token of each (check.cuh); null: not wanted
  int64_t table_size;            // a power of two
  int32_t* returning;            // the first token of a document that was there before, INT32_MAX: none
  CountedKind kind[kMostKinds];
};

// --- sums over a block -----------------------------------------------------------------------------------------------

struct Scanned {
  int64_t before;  // over the threads before this one
  int64_t total;
};

__device__ inline Scanned block_scan(int64_t value, int64_t (&of_warps)[kPlanWarps]) {
  const int64_t upto = warp_scan(value);
  if (lane() == kLanes - 1) of_warps[warp()] = upto;
  __syncthreads();
  int64_t before = 0, total = 0;
  for (int w = 0; w < kPlanWarps; ++w) {
    before += w < warp() ? of_warps[w] : 0;
    total += of_warps[w];
  }
  __syncthreads();
  return {before + upto - value, total};
}

// table[i]: the sum of the values before i, for i = 0 .. count <= kMostChunks.
template <class Value, class Sum>
__device__ void sums_before(const Value* values, int count, Sum* table, int64_t (&of_warps)[kPlanWarps]) {
  constexpr int kEach = kMostChunks / kPlanThreads;
  const int first = static_cast<int>(threadIdx.x) * kEach;
  int64_t mine[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    mine[i] = first + i < count ? values[first + i] : 0;
    sum += mine[i];
  }
  const Scanned scanned = block_scan(sum, of_warps);
  sum = scanned.before;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (first + i < count) table[first + i] = static_cast<Sum>(sum);
    sum += mine[i];
  }
  if (threadIdx.x == 0) table[count] = static_cast<Sum>(scanned.total);
  __syncthreads();
}

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

// --- tokens ----------------------------------------------------------------------------------------------------------

// The token of a lane; one that is not there is not kept, and begins nothing.
struct Token {
  int32_t number;  // in the batch
  int32_t sample;
  int32_t column;  // in its sample
  int32_t kind;  // -1: text
  int64_t document;  // the id that was given, else 0
  bool here, kept;
};

__device__ inline int32_t kind_of(const Counting& batch, int64_t number) {
  if (batch.scheme == Scheme::kImagesFirst || batch.kinds == 0 || batch.no_tokens) return -1;
  const int64_t value = batch.tokens[number];
  if (batch.tokens.bytes == 1) return value != 0 ? 0 : -1;
  int32_t kind = -1;
  for (int c = batch.kinds; c-- > 0;) kind = value == batch.kind[c].given.token ? c : kind;
  return kind;
}

__device__ inline Token read_token(const Counting& batch, int64_t number, int64_t end) {
  Token token = {0, 0, 1, -1, 0, number < end, false};
  if (!token.here) return token;
  token.number = static_cast<int32_t>(number);
  token.sample = static_cast<int32_t>(static_cast<uint32_t>(number) / static_cast<uint32_t>(batch.length));
  token.column = token.number - token.sample * batch.length;
  token.kept = !batch.no_tokens;
  if (batch.no_tokens) return token;
  token.kind = kind_of(batch, number);
  if (batch.attention_mask) token.kept = batch.attention_mask[number] != 0;
  if (batch.document_ids) {
    token.document = batch.document_ids[number];
    token.kept = token.kept && token.document >= 0;
  }
  return token;
}

// Whether the token before stands in the same run: its neighbour in sample and document, of the same kind.
__device__ inline bool joins_run(const Counting& batch, const Token& token) {
  int32_t kind = __shfl_up_sync(kAllLanes, token.kind, 1);
  int64_t document = __shfl_up_sync(kAllLanes, token.document, 1);
  if (!token.here || token.column == 0 || token.kind < 0) return false;
  if (lane() == 0) {
    kind = kind_of(batch, int64_t{token.number} - 1);
    document = batch.document_ids ? batch.document_ids[int64_t{token.number} - 1] : 0;
  }
  return kind == token.kind && document == token.document;
}

// --- placeholders ----------------------------------------------------------------------------------------------------

// Lane c: of kind c, at the next 32 tokens.
struct KindWalk {
  int32_t next;  // placeholders so far
  int32_t at_sample;  // those before the open sample
};

struct Ordinal {
  int32_t ordinal;  // placeholders of the token's kind before it
  int32_t inside;  // those in its sample
};

// `begins`: the lanes with a sample's first token.
__device__ inline Ordinal number_placeholders(const Counting& batch, KindWalk& walk, const Token& token,
                                              unsigned begins) {
  Ordinal found = {0, 0};
  if (!__any_sync(kAllLanes, token.kind >= 0)) {
    if (begins != 0) walk.at_sample = walk.next;
    return found;
  }
  const unsigned begun = begins & lanes_upto();
  for (int c = 0; c < batch.kinds; ++c) {
    const unsigned placeholders = __ballot_sync(kAllLanes, token.kind == c);
    const int32_t next = __shfl_sync(kAllLanes, walk.next, c);
    int32_t at_sample = __shfl_sync(kAllLanes, walk.at_sample, c);
    if (begun != 0) at_sample = next + __popc(placeholders & lanes_below(last_lane(begun)));
    if (token.kind == c) {
      found.ordinal = next + __popc(placeholders & lanes_before());
      found.inside = found.ordinal - at_sample;
    }
    if (lane() == c) {
      if (begins != 0) walk.at_sample = next + __popc(placeholders & lanes_below(last_lane(begins)));
      walk.next = next + __popc(placeholders);
    }
  }
  return found;
}

// The number of the token's run among those of its kind; `next_run`: lane c, of kind c.
__device__ inline int32_t number_runs(const Counting& batch, int32_t& next_run, const Token& token, bool joins) {
  int32_t found = 0;
  for (int c = 0; c < batch.kinds; ++c) {
    const unsigned begins = __ballot_sync(kAllLanes, token.kind == c && !joins);
    const int32_t next = __shfl_sync(kAllLanes, next_run, c);
    if (token.kind == c) found = next + __popc(begins & lanes_upto()) - 1;
    if (lane() == c) next_run = next + __popc(begins);
  }
  return found;
}

// Which kinds have counts, a bit each.
__device__ inline unsigned counted_kinds(const Counting& batch) {
  bool counted = false;
  if (batch.counts && lane() < batch.kinds) {
    const int64_t* counts = batch.kind[lane()].given.counts;
    counted = counts != nullptr && counts[0] >= 0;
  }
  return __ballot_sync(kAllLanes, counted);
}

// Placeholders (and runs) of every kind before a block's chunk, and before the sample in which the chunk begins.
struct KindBases {
  int32_t chunk[kMostKinds];
  int32_t sample[kMostKinds];
  int32_t runs[kMostKinds];
};

__device__ inline uint32_t segment_of(const Counting& batch, int64_t sample) {
  return static_cast<uint32_t>(sample * batch.length) / static_cast<uint32_t>(batch.segment);
}

__device__ inline int64_t segments(const Counting& batch) { return int64_t{batch.chunks} * kPlanWarps; }

// A warp sums one kind at a time. Without a barrier at the end.
__device__ inline void sum_kinds(const Counting& batch, int chunk, KindBases& bases) {
  const int64_t low = int64_t{chunk} * kPlanWarps * batch.segment;
  const int64_t sample = low < batch.count ? static_cast<uint32_t>(low) / static_cast<uint32_t>(batch.length) : 0;
  const int64_t segment = batch.counts && low < batch.count ? segment_of(batch, sample) : 0;
  for (int c = warp(); c < batch.kinds; c += kPlanWarps) {
    const int32_t* placeholders = batch.placeholders + int64_t{c} * batch.chunks;
    const int32_t* runs = batch.runs_of_chunk + int64_t{c} * batch.chunks;
    int32_t before = 0, at_sample = 0, runs_before = 0;
    for (int i = lane(); i < chunk; i += kLanes) {
      const int32_t here = placeholders[i];
      before += here;
      at_sample += i < segment / kPlanWarps ? here : 0;
      if (batch.runs) runs_before += runs[i];
    }
    before = warp_sum(before);
    at_sample = warp_sum(at_sample);
    runs_before = warp_sum(runs_before);
    if (lane() != 0) continue;
    if (batch.counts && low < batch.count) {
      at_sample += batch.segment_placeholders[c * segments(batch) + segment];
      at_sample += batch.sample_placeholders[int64_t{c} * batch.samples + sample];
    }
    bases.chunk[c] = before;
    bases.sample[c] = at_sample;
    bases.runs[c] = runs_before;
  }
}

// Where a warp stands before its segment, which begins at token `low` of `sample`.
__device__ inline KindWalk walk_from(const Counting& batch, const KindBases& bases, int chunk, int64_t low,
                                     int64_t sample) {
  KindWalk walk = {0, 0};
  const int c = lane();
  if (c >= batch.kinds) return walk;
  const int64_t of_kind = c * segments(batch);
  walk.next = bases.chunk[c] + batch.segment_placeholders[of_kind + int64_t{chunk} * kPlanWarps + warp()];
  if (!batch.counts || low >= batch.count) return walk;
  const int64_t segment = segment_of(batch, sample);
  if (sample * batch.length < int64_t{chunk} * kPlanWarps * batch.segment) {
    walk.at_sample = bases.sample[c];
  } else {
    walk.at_sample = bases.chunk[c] + batch.segment_placeholders[of_kind + segment] +
                     batch.sample_placeholders[int64_t{c} * batch.samples + sample];
  }
  return walk;
}

// --- documents -------------------------------------------------------------------------------------------------------

__device__ inline DocumentRuns no_documents() { return {0, -1, 0, 0, -1, -1, -1, 0, 0}; }

// Two stretches, one behind the other.
__device__ inline DocumentRuns joined(const DocumentRuns& a, const DocumentRuns& b) {
  DocumentRuns both = a;
  both.rows = a.rows + b.rows;
  if (b.first_sample < 0) return both;
  if (b.last_start >= 0) both.last_start = a.rows + b.last_start;
  both.last_id = b.last_id;
  both.last_sample = b.last_sample;
  both.last_token = b.last_token;
  both.falls = a.falls | b.falls;
  if (a.first_sample < 0) {
    both.first_id = b.first_id;
    both.first_sample = b.first_sample;
    both.starts = b.starts;
    return both;
  }
  const bool same_sample = a.last_sample == b.first_sample;
  const bool begins = !same_sample || a.last_id != b.first_id;
  if (begins && b.last_start < 0) both.last_start = a.rows;
  both.starts = a.starts + begins + b.starts;
  both.falls |= same_sample && b.first_id < a.last_id;
  return both;
}

__device__ inline DocumentRuns of_lane_below(const DocumentRuns& runs, unsigned offset) {
  DocumentRuns other;
  other.rows = __shfl_down_sync(kAllLanes, runs.rows, offset);
  other.last_start = __shfl_down_sync(kAllLanes, runs.last_start, offset);
  other.first_id = __shfl_down_sync(kAllLanes, runs.first_id, offset);
  other.last_id = __shfl_down_sync(kAllLanes, runs.last_id, offset);
  other.first_sample = __shfl_down_sync(kAllLanes, runs.first_sample, offset);
  other.last_sample = __shfl_down_sync(kAllLanes, runs.last_sample, offset);
  other.last_token = __shfl_down_sync(kAllLanes, runs.last_token, offset);
  other.starts = __shfl_down_sync(kAllLanes, runs.starts, offset);
  other.falls = __shfl_down_sync(kAllLanes, runs.falls, offset);
  return other;
}

// The documents of the chunks first .. last - 1, for every thread of the block.
__device__ inline DocumentRuns join_chunks(const DocumentRuns* chunks, int first, int last,
                                           DocumentRuns (&of_warps)[kPlanWarps]) {
  const int each = (last - first + kPlanThreads - 1) / kPlanThreads;
  const int begin = first + static_cast<int>(threadIdx.x) * each;
  DocumentRuns runs = no_documents();
  for (int i = begin; i < begin + each && i < last; ++i) runs = joined(runs, chunks[i]);
  for (unsigned offset = 1; offset < kLanes; offset *= 2) {
    const DocumentRuns behind = of_lane_below(runs, offset);
    if (lane() % (2 * offset) == 0) runs = joined(runs, behind);
  }
  if (lane() == 0) of_warps[warp()] = runs;
  __syncthreads();
  runs = of_warps[0];
  for (int w = 1; w < kPlanWarps; ++w) runs = joined(runs, of_warps[w]);
  __syncthreads();
  return runs;
}

// The document that is open before the next 32 tokens of a warp.
struct OpenDocument {
  int64_t id;
  int64_t row;  // rows before the document
  int32_t sample;  // of the last kept token, -1: there was none
  int32_t token;  // that token
  int32_t runs;  // documents begun
  int32_t falls;
};

__device__ inline OpenDocument after(const DocumentRuns& runs) {
  const bool any = runs.first_sample >= 0;
  return {runs.last_id,
          runs.last_start >= 0 ? runs.last_start : 0,
          runs.last_sample,
          runs.last_token,
          any ? 1 + runs.starts : 0,
          runs.falls};
}

struct DocumentOfToken {
  bool begins;
  int32_t number;  // over the batch
  int32_t previous;  // the last kept token before this one, -1: none
  int64_t row;  // rows before the document
};

// `kept`: the lanes with a kept token; `before`: rows before the token.
__device__ inline DocumentOfToken open_documents(OpenDocument& open, const Token& token, unsigned kept,
                                                 int64_t before) {
  const unsigned earlier = kept & lanes_before();
  const int from = last_lane(earlier);
  int64_t id = __shfl_sync(kAllLanes, token.document, from);
  int32_t sample = __shfl_sync(kAllLanes, token.sample, from);
  int32_t previous = __shfl_sync(kAllLanes, token.number, from);
  if (earlier == 0) {
    id = open.id;
    sample = open.sample;
    previous = open.token;
  }
  const bool same_sample = sample == token.sample;
  DocumentOfToken found;
  found.previous = previous;
  found.begins = token.kept && !(same_sample && id == token.document);
  const unsigned starts = __ballot_sync(kAllLanes, found.begins);
  const unsigned started = starts & lanes_upto();
  found.number = open.runs + __popc(started) - 1;
  found.row = __shfl_sync(kAllLanes, before, last_lane(started));
  if (started == 0) found.row = open.row;
  open.falls |= __any_sync(kAllLanes, token.kept && same_sample && token.document < id) != 0;
  if (kept != 0) {
    open.id = __shfl_sync(kAllLanes, token.document, last_lane(kept));
    open.sample = __shfl_sync(kAllLanes, token.sample, last_lane(kept));
    open.token = __shfl_sync(kAllLanes, token.number, last_lane(kept));
  }
  if (starts != 0) open.row = __shfl_sync(kAllLanes, before, last_lane(starts));
  open.runs += __popc(starts);
  return found;
}

// --- rows ------------------------------------------------------------------------------------------------------------

// Kept rows before a sample; `row_base`: those before each chunk.
__device__ inline int64_t rows_before_sample(const Counting& batch, const int64_t* row_base, int64_t sample) {
  if (sample >= batch.samples) return row_base[batch.chunks];
  const uint32_t segment = segment_of(batch, sample);
  return row_base[segment / kPlanWarps] + batch.segment_rows[segment] + batch.sample_rows[sample];
}

// The image of an expanded placeholder, for all lanes.
__device__ inline ExpandedImage expand_token(const Counting& batch, const Token& token, const Ordinal& at,
                                             unsigned counted) {
  if (token.kind < 0) return {-1, {0, 1}};
  return expanded(batch.kind[token.kind], (counted >> token.kind & 1) != 0, token.sample, at.ordinal, at.inside);
}

// --- the counting launches -------------------------------------------------------------------------------------------

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

// --- totals ----------------------------------------------------------------------------------------------------------

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

__device__ inline int64_t block_max(int64_t value, int64_t (&of_warps)[kPlanWarps]) {
  value = warp_max(value);
  if (lane() == 0) of_warps[warp()] = value;
  __syncthreads();
  for (int w = 0; w < kPlanWarps; ++w) value = of_warps[w] > value ? of_warps[w] : value;
  __syncthreads();
  return value;
}

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
