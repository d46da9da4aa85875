#include "segments.h"

#include <algorithm>

namespace vlm_fuse {
namespace {

class Cutter {
 public:
  explicit Cutter(const MaskIntervals& mask) : mask_(mask), ahead_(static_cast<size_t>(mask.rows + 1)) {}

  void cut(int64_t sample, std::vector<Segment>& out) {
    offset_ = sample * mask_.rows;
    Interval keys[2];
    ahead_.back() = INT32_MAX;
    for (int64_t q = mask_.rows - 1; q >= 0; --q) {
      const size_t at = static_cast<size_t>(q);
      ahead_[at] = ahead_[at + 1];
      if (mask_.at(offset_ + q, keys) > 0) ahead_[at] = smaller(ahead_[at], keys[0].begin);
    }
    int64_t start = 0;
    int32_t reach = 0;
    bool nothing = true;
    for (int64_t q = 0; q < mask_.rows; ++q) {
      const int found = mask_.at(offset_ + q, keys);
      nothing = nothing && found == 0;
      if (found > 0) reach = larger(reach, keys[found - 1].end);
      const bool next_empty = q + 1 < mask_.rows && mask_.at(offset_ + q + 1, keys) == 0;
      if (reach > ahead_[static_cast<size_t>(q) + 1] || (nothing && next_empty)) continue;
      out.push_back(classed(sample, start, q + 1));
      start = q + 1;
      nothing = true;
    }
  }

 private:
  Segment classed(int64_t sample, int64_t begin, int64_t end) const {
    Segment made = {sample, begin, end, 0, 0, SegmentClass::kEmpty, 0};
    int32_t first = INT32_MAX, last = 0, widest = 0;
    bool single = true;
    Interval keys[2];
    for (int64_t q = begin; q < end; ++q) {
      const int found = mask_.at(offset_ + q, keys);
      single = single && found == 1;
      if (found == 0) continue;
      first = smaller(first, keys[0].begin);
      last = larger(last, keys[found - 1].end);
      widest = larger(widest, keys[0].end - keys[0].begin);
    }
    if (last == 0) return made;
    made.key_begin = first;
    made.key_end = last;
    made.kind = SegmentClass::kOther;
    if (!single) return made;
    mask_.at(offset_ + begin, keys);
    const int64_t reach = keys[0].end - first;
    bool causal = true, full = true, windowed = true, windowed_full = end - begin == last - first;
    for (int64_t q = begin; q < end; ++q) {
      mask_.at(offset_ + q, keys);
      const int64_t lo = keys[0].begin, hi = keys[0].end, stop = last - (end - 1 - q), place = first + (q - begin);
      causal = causal && lo == first && hi == stop;
      full = full && lo == first && hi == last;
      windowed = windowed && hi == stop && lo == std::max<int64_t>(first, stop - widest);
      windowed_full = windowed_full && lo == std::max<int64_t>(first, place + 1 - reach) &&
                      hi == std::min<int64_t>(last, place + reach);
    }
    if (causal) {
      made.kind = SegmentClass::kCausal;
    } else if (full) {
      made.kind = SegmentClass::kFull;
    } else if (windowed) {
      made.kind = SegmentClass::kWindowed;
      made.window = widest;
    } else if (windowed_full) {
      made.kind = SegmentClass::kWindowedFull;
      made.window = reach;
    }
    return made;
  }

  const MaskIntervals& mask_;
  std::vector<int32_t> ahead_;  // first key that this row or a later one sees
  int64_t offset_ = 0;
};

}  // namespace

std::vector<Segment> segments(const MaskIntervals& mask) {
  std::vector<Segment> made;
  Cutter cutter(mask);
  for (int64_t sample = 0; sample < mask.samples; ++sample) cutter.cut(sample, made);
  return made;
}

}  // namespace vlm_fuse
