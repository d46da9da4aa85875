// The usual batch merged from its token ids in one launch: rows, source_index, and what a training step reads.
#pragma once

#include "../cpu/batch.h"
#include "../cpu/merge.h"
#include "device.h"

namespace vlm_fuse::cuda {

// What the launch writes beside the rows; null: not wanted.
struct TokenFacts {
  int32_t* source_index = nullptr;
  int32_t* text_index = nullptr;
  int64_t* position_ids = nullptr;
  int32_t* document_ids = nullptr;
  uint8_t* attention_mask = nullptr;
  void* labels = nullptr;  // of the width of batch.labels
  int32_t* cu_seqlens = nullptr;
  int32_t* kv_lo = nullptr;  // of a causal mask without padding inside documents
  int32_t* kv_hi = nullptr;
  int32_t window = 0;        // of that mask, 0: none
};

// Samples of which one launch can keep account.
constexpr int64_t kMostSamples = 1024;

// Bytes of workspace that the call needs on the current device: none where it has clusters. Holds anything at first.
int64_t merge_tokens_workspace(const Batch& batch);

// `batch`: one kind of placeholder, scheme "placeholders", no counts, no document ids, layout "keep" or "packed",
// 1 to kMostSamples samples, not empty. merge.source_index is not read. `status`: the record of the first error, may be
// null.
void merge_tokens(const Batch& batch, const Merge& merge, int64_t width, const TokenFacts& facts, void* workspace,
                  int64_t* status, Stream stream);

}  // namespace vlm_fuse::cuda
