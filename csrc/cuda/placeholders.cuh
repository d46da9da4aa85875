// Placeholders by kind, and runs of them, before any token. Lane c of a warp counts kind c.
#pragma once

#include "tokens.cuh"

namespace vlm_fuse::cuda {

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

// The image of an expanded placeholder, for all lanes.
__device__ inline ExpandedImage expand_token(const Counting& batch, const Token& token, const Ordinal& at,
                                             unsigned counted) {
  if (token.kind < 0) return {-1, {0, 1}};
  return expanded(batch.kind[token.kind], (counted >> token.kind & 1) != 0, token.sample, at.ordinal, at.inside);
}

}  // namespace vlm_fuse::cuda
