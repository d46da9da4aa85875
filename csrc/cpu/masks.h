// The intervals of a mask on the host.
#pragma once

#include <cstdint>

#include "../intervals.h"
#include "batch.h"

namespace vlm_fuse {

struct MaskRows {
  int64_t rows = 0;   // output rows
  int64_t width = 0;
  const int32_t* document_ids = nullptr;
  const int32_t* image_ids = nullptr;  // may be null
  Attend attend;
  int32_t prefix = 0;                         // of every document, or
  const int64_t* prefix_lengths = nullptr;    // by document id
  int64_t prefix_count = 0;
  bool one_prefix = false;                    // prefix_lengths holds a single one, of every document
  Integers parent_ids;                        // by document id, -1: none
  int64_t parent_count = 0;
};

struct MaskOut {
  int32_t* lo = nullptr;
  int32_t* hi = nullptr;
  int32_t* lo2 = nullptr;  // both null: counted as an error where a row needs them
  int32_t* hi2 = nullptr;
};

struct MaskResult {
  Record error;         // of the first row that needs more intervals than there are
  bool second = false;  // a row has a second interval
};

MaskResult intervals(const MaskRows& rows, const MaskOut& out);

}  // namespace vlm_fuse
