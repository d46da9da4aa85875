// Where a layout puts the rows of a sample.
#pragma once

#include <algorithm>

#include "batch.h"

namespace vlm_fuse {

// A stretch of output rows; `count` may be less than what was asked for where the width is too small.
struct Place {
  int64_t row;
  int64_t count;
};

class Placement {
 public:
  Placement(const Batch& batch, int64_t width) : batch_(batch), width_(width) {}

  // Padding in front of the sample's rows; `rows` matters to left padding alone.
  Place enter(int64_t sample, int64_t rows) {
    if (batch_.layout == Layout::kPacked) return {end_, 0};
    begin_ = sample * width_;
    end_ = begin_;
    const int64_t front = batch_.left && batch_.layout == Layout::kPadded ? std::max<int64_t>(width_ - rows, 0) : 0;
    end_ += front;
    return {begin_, front};
  }

  Place next(int64_t count) {
    const Place place = {end_, std::clamp<int64_t>(begin_ + width_ - end_, 0, count)};
    end_ += place.count;
    return place;
  }

  // What the sample leaves of its output row; `packed`: only after the last sample.
  Place rest() { return next(width_); }

 private:
  const Batch& batch_;
  int64_t width_;
  int64_t begin_ = 0;  // of this output row
  int64_t end_ = 0;    // next row to write
};

}  // namespace vlm_fuse
