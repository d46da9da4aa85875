// The token plan on the host.
#pragma once

#include <cstdint>

#include "batch.h"

namespace vlm_fuse {

struct Counts {
  int64_t widest = 0;     // kept rows of the longest sample
  int64_t rows = 0;       // kept rows
  int64_t documents = 0;  // runs of a document id; samples where no ids are given
};

// `placeholders`: one number a kind.
Counts count(const Batch& batch, int64_t* placeholders);

// Fills source_index of `output_rows` rows of `width`. Returns what is wrong with the batch, if `check`.
Record plan(const Batch& batch, int64_t width, bool check, int32_t* source_index);

// Facts of the output rows, (G, width) each; null: not wanted.
struct Facts {
  int32_t* text_index = nullptr;
  int64_t* position_ids = nullptr;
  int32_t* document_ids = nullptr;
  int32_t* image_ids = nullptr;
  int8_t* kind_ids = nullptr;
  uint8_t* attention_mask = nullptr;
  void* labels = nullptr;          // of the width of batch.labels
  int32_t* cu_seqlens = nullptr;   // `sequences` + 1 of them
  int64_t sequences = 0;
};

void facts(const Batch& batch, int64_t width, const Facts& out);

}  // namespace vlm_fuse
