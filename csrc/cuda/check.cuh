// What is wrong with a batch: the first bad sample, then totals, then a width that is too small, as csrc/cpu/checks.h.
//
// One block beside those of plan_kernel looks at every sample, a thread each, kind after kind. A document that returns
// is found along the way by a table of the documents of the batch, into which each block puts those that begin in its
// chunk: only numbers of tokens are written, and only the lowest stays, so that no order matters. finish_kernel then
// decides.
#pragma once

#include "record.cuh"
#include "scan.cuh"

namespace vlm_fuse::cuda {

// What a kind has wrong in one sample.
struct Wrong {
  int64_t code;
  int64_t placeholders;
  int64_t rows;
};

// Of a kind without counts: `taken` placeholders (images) before the sample, `reached` after it, `total` in the batch.
__device__ inline Wrong wrong_rows(const Counting& batch, const CountedKind& kind, bool unused, int64_t taken,
                                   int64_t reached, int64_t total) {
  const bool by_row = batch.scheme == Scheme::kPlaceholders;
  const int64_t there = by_row ? kind.given.rows : (kind.given.images > 0 ? kind.given.images : 0);
  if (by_row && kind.given.sizes_known() && reached <= there && !(unused && reached == total) &&
      !is_border(kind, reached)) {
    const int64_t begun =
        image_start(kind, images_beginning(kind, reached)) - image_start(kind, images_beginning(kind, taken));
    return {kImageCut, reached - taken, begun};
  }
  if (reached > there) return {kTooFewRows, reached - taken, there - at_most(taken, there)};
  return {kFine, 0, 0};
}

// Of a kind with counts.
__device__ inline Wrong wrong_counts(const Counting& batch, const CountedKind& kind, bool unused, int64_t sample,
                                     int64_t placeholders) {
  const int64_t owned = kind.given.counts[sample], end = kind.count_ends[sample];
  const int64_t begin = sample > 0 ? kind.count_ends[sample - 1] : 0;
  if (batch.scheme != Scheme::kPlaceholders && end <= kind.given.rows && !is_border(kind, end)) {
    return {kImageCut, placeholders, owned};
  }
  if (batch.scheme == Scheme::kImagesFirst) return {kFine, 0, 0};
  int64_t wanted = placeholders;
  if (batch.scheme == Scheme::kExpand) {
    const int64_t first = images_beginning(kind, begin), last = first + placeholders;
    if (last <= kind.given.images)
      wanted = image_start(kind, last) - image_start(kind, first);
    else
      wanted = at_most(kind.given.rows > owned ? kind.given.rows : owned, INT64_MAX - 1) + 1;
  }
  if (wanted > owned || (wanted < owned && !unused)) return {kCountsDiffer, wanted, owned};
  return {kFine, 0, 0};
}

// `fresh`: the record has not been written yet, and is this call's alone.
__device__ inline void report(int64_t* status, bool fresh, const Record& record) {
  if (!fresh) return flag(status, record);
  status[0] = record.code;
  write_fields(status, record);
}

struct CheckShared {
  int64_t of_warps[kPlanWarps];
  int64_t row_base[kMostChunks + 1];
  int32_t kind_base[kMostChunks + 1];
};

// Placeholders of kind c before a sample; `kind_base`: those before each chunk.
__device__ inline int64_t placeholders_before(const Counting& batch, const int32_t* kind_base, int c, int64_t sample) {
  if (sample >= batch.samples) return kind_base[batch.chunks];
  const uint32_t segment = segment_of(batch, sample);
  return int64_t{kind_base[segment / kPlanWarps]} + batch.segment_placeholders[c * segments(batch) + segment] +
         batch.sample_placeholders[int64_t{c} * batch.samples + sample];
}

// One kind in all samples, by the whole block: the record of the first bad sample, or that of the totals (sample -1).
__device__ inline Record check_kind(const Counting& batch, int c, bool counted, bool unused, CheckShared& shared) {
  const CountedKind& kind = batch.kind[c];
  const bool first = batch.scheme == Scheme::kImagesFirst;
  if (!first)
    sums_before(batch.placeholders + int64_t{c} * batch.chunks, batch.chunks, shared.kind_base, shared.of_warps);
  const int64_t images = kind.given.images > 0 ? kind.given.images : 0;
  const int64_t there = batch.scheme == Scheme::kPlaceholders ? kind.given.rows : images;
  const int64_t each = first && !counted && there > 0;  // images_first: an image a sample
  const int64_t total = first ? each * batch.samples : shared.kind_base[batch.chunks];
  const auto wrong_in = [&](int64_t sample) {
    const int64_t taken = first ? each * sample : placeholders_before(batch, shared.kind_base, c, sample);
    const int64_t reached = first ? each * (sample + 1) : placeholders_before(batch, shared.kind_base, c, sample + 1);
    return counted ? wrong_counts(batch, kind, unused, sample, reached - taken)
                   : wrong_rows(batch, kind, unused, taken, reached, total);
  };
  int64_t bad = batch.samples;
  for (int64_t sample = threadIdx.x; sample < batch.samples && bad == batch.samples; sample += kPlanThreads) {
    if (wrong_in(sample).code != kFine) bad = sample;
  }
  bad = -block_max(-bad, shared.of_warps);
  Record record;
  record.kind = c;
  record.total_placeholders = total;
  record.total_rows = counted ? kind.given.rows : there;
  if (bad < batch.samples) {
    const Wrong wrong = wrong_in(bad);
    record.code = wrong.code;
    record.sample = bad;
    record.placeholders = wrong.placeholders;
    record.rows = wrong.rows;
  } else {
    record.sample = -1;
    const int64_t owned = counted ? kind.count_ends[batch.samples - 1] : 0;
    if (counted && (owned > kind.given.rows || (owned < kind.given.rows && !unused))) {
      record.code = kCountsDiffer;
      record.placeholders = owned;
      record.rows = kind.given.rows;
    } else if (!counted && total < there && !unused) {
      record.code = kTooManyRows;
    }
  }
  __syncthreads();  // kind_base is written again for the next kind
  return record;
}

// The record of the batch, by a whole block, but for documents that return.
__device__ inline Record check_batch(const Counting& batch, Layout layout, int64_t width, bool unused,
                                     CheckShared& shared) {
  const unsigned counted = counted_kinds(batch);
  Record record;
  for (int c = 0; c < batch.kinds; ++c) {
    const Record found = check_kind(batch, c, (counted >> c & 1) != 0, unused, shared);
    if (found.code == kFine) continue;
    const bool better = found.sample >= 0 && (record.sample < 0 || found.sample < record.sample);
    if (record.code == kFine || better) record = found;
  }
  if (record.code != kFine || layout == Layout::kKeep) return record;
  sums_before(batch.rows, batch.chunks, shared.row_base, shared.of_warps);
  Longest longest = {shared.row_base[batch.chunks], -1};
  if (layout == Layout::kPadded) longest = longest_sample(batch, shared.row_base, shared.of_warps);
  if (longest.rows > width) {
    record.code = kTooLong;
    record.sample = longest.first;
    record.extra = longest.rows;
  }
  return record;
}

// --- documents that return -------------------------------------------------------------------------------------------

__device__ inline uint64_t mixed(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ull;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebull;
  return bits ^ (bits >> 31);
}

// Puts a document into the table by its first token. The table has twice as many places as there are tokens.
__device__ inline void enter_document(const Counting& batch, const Token& token) {
  const uint64_t last = static_cast<uint64_t>(batch.table_size) - 1;
  uint64_t place = mixed(static_cast<uint64_t>(token.document) ^ mixed(static_cast<uint64_t>(token.sample))) & last;
  for (;; place = (place + 1) & last) {
    const int32_t there = atomicCAS(&batch.table[place], -1, token.number);
    if (there < 0) return;
    const uint32_t sample = static_cast<uint32_t>(there) / static_cast<uint32_t>(batch.length);
    if (static_cast<int32_t>(sample) != token.sample || batch.document_ids[there] != token.document) continue;
    // Of all tokens of a document but the lowest, the lowest is the first that returns.
    const int32_t before = atomicMin(&batch.table[place], token.number);
    atomicMin(batch.returning, before > token.number ? before : token.number);
    return;
  }
}

// One thread: the record that plan_kernel left, or that of a document that returns.
__global__ void __launch_bounds__(kLanes)
    finish_kernel(const __grid_constant__ Counting batch, const int64_t* found, int64_t* status, bool fresh) {
  if (threadIdx.x != 0) return;
  Record record = {found[0], found[1], found[2], found[3], found[4], found[5], found[6], found[7]};
  const int32_t token = *batch.returning;
  if (token != INT32_MAX) {
    const int64_t sample = static_cast<uint32_t>(token) / static_cast<uint32_t>(batch.length);
    const bool of_totals = record.code == kFine || record.code == kTooLong || record.sample < 0;
    if (of_totals || sample < record.sample) {
      record = Record{};
      record.code = kDocumentReturns;
      record.sample = sample;
      record.extra = batch.document_ids[token];
    }
  }
  report(status, fresh, record);
}

}  // namespace vlm_fuse::cuda
