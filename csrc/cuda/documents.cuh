// Documents before any token. What depends on the token before, which may be far back, is found by joining what
// stretches of tokens have.
#pragma once

#include "tokens.cuh"

namespace vlm_fuse::cuda {

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

}  // namespace vlm_fuse::cuda
