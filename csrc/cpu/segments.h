// Where a mask can be cut: runs of query rows that share no key with the rows before or behind.
#pragma once

#include <cstdint>
#include <vector>

#include "mask_rows.h"

namespace vlm_fuse {

enum class SegmentClass : int64_t { kEmpty = 0, kCausal, kFull, kWindowed, kWindowedFull, kOther };

struct Segment {
  int64_t sample;
  int64_t row_begin, row_end;
  int64_t key_begin, key_end;
  SegmentClass kind;
  int64_t window;  // 0: none
};

// The finest cut of every sample; neighbouring rows that see nothing are one segment. O(rows).
std::vector<Segment> segments(const MaskIntervals& mask);

}  // namespace vlm_fuse
