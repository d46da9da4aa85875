// The batch as the kernels of the plan take it, its memory, and its tokens.
//
// The tokens are cut into segments of equal length, whatever their samples. A warp owns a segment and reads it 32
// tokens at a time, each lane one; a block owns the segments of its warps, a chunk.
#pragma once

#include "block_sums.cuh"
#include "images.cuh"
#include "plan.h"

namespace vlm_fuse::cuda {

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

__device__ inline uint32_t segment_of(const Counting& batch, int64_t sample) {
  return static_cast<uint32_t>(sample * batch.length) / static_cast<uint32_t>(batch.segment);
}

__device__ inline int64_t segments(const Counting& batch) { return int64_t{batch.chunks} * kPlanWarps; }

// Kept rows before a sample; `row_base`: those before each chunk.
__device__ inline int64_t rows_before_sample(const Counting& batch, const int64_t* row_base, int64_t sample) {
  if (sample >= batch.samples) return row_base[batch.chunks];
  const uint32_t segment = segment_of(batch, sample);
  return row_base[segment / kPlanWarps] + batch.segment_rows[segment] + batch.sample_rows[sample];
}

// --- a token
// ----------------------------------------------------------------------------------------------------------

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

}  // namespace vlm_fuse::cuda
