// The batch that a token plan is made from, and the record of an error. Mirrors vlm_fuse/batch.py.
#pragma once

#include <cstdint>
#include <vector>

#include "../rows.h"

namespace vlm_fuse {

enum class Scheme { kPlaceholders = 0, kExpand = 1, kImagesFirst = 2 };
enum class Layout { kKeep = 0, kPadded = 1, kPacked = 2 };

// An integer tensor of any width that is read element by element; absent where data is null.
struct Integers {
  const void* data = nullptr;
  int32_t bytes = 0;  // of one element

  VLM_FUSE_HD explicit operator bool() const { return data != nullptr; }

  VLM_FUSE_HD int64_t operator[](int64_t index) const {
    switch (bytes) {
      case 1:
        return static_cast<const int8_t*>(data)[index];
      case 2:
        return static_cast<const int16_t*>(data)[index];
      case 4:
        return static_cast<const int32_t*>(data)[index];
      default:
        return static_cast<const int64_t*>(data)[index];
    }
  }
};

struct Kind {
  int64_t token;
  int64_t first_row;
  int64_t rows;
  int64_t images;               // -1: sizes not known
  int64_t rows_each;            // -1: listed in `sizes`
  const int64_t* sizes;         // `images` of them
  const int64_t* counts;        // rows that each sample owns; null: not given

  VLM_FUSE_HD bool sizes_known() const { return images >= 0; }
  int64_t size(int64_t image) const {
    const int64_t rows_of_image = rows_each >= 0 ? rows_each : sizes[image];
    return rows_of_image > 0 ? rows_of_image : 0;
  }
};

struct Batch {
  int64_t samples = 0;         // B
  int64_t length = 0;          // T
  Integers tokens;             // one byte each: a placeholder mask
  Integers attention_mask;
  Integers document_ids;
  Integers labels;
  std::vector<Kind> kinds;
  Scheme scheme = Scheme::kPlaceholders;
  Layout layout = Layout::kKeep;
  bool left = false;           // padding_side == "left"
  bool unused = false;         // unused_features == "allow"
};

enum ErrorCode : int64_t {
  kFine = 0,
  kTooFewRows = 1,
  kTooManyRows = 2,
  kCountsDiffer = 3,
  kImageCut = 4,
  kDocumentReturns = 5,
  kTooLong = 6,
  kOutsideVocabulary = 7,
  kTooManyIntervals = 8,
  kBadGrid = 9,
  kNoGrid = 10,
  kGridCut = 11,
  kGridUnused = 12,
  kUnknownType = 13,
};

struct Record {
  int64_t code = kFine;
  int64_t sample = 0;
  int64_t kind = 0;
  int64_t placeholders = 0;
  int64_t rows = 0;
  int64_t total_placeholders = 0;
  int64_t total_rows = 0;
  int64_t extra = 0;
};

}  // namespace vlm_fuse
