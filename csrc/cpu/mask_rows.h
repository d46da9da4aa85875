// A mask as the renderings read it: one or two intervals of keys for every query row.
#pragma once

#include <cstdint>

#include "../intervals.h"

namespace vlm_fuse {

struct MaskIntervals {
  int64_t samples = 0;
  int64_t rows = 0;  // of one sample
  int64_t keys = 0;
  const int32_t* lo = nullptr;
  const int32_t* hi = nullptr;
  const int32_t* lo2 = nullptr;  // both may be null
  const int32_t* hi2 = nullptr;

  // The keys of a row, counted over the samples: none, one or two intervals inside the keys, in order and apart,
  // whatever the tensors hold. Returns how many there are.
  VLM_FUSE_HD int at(int64_t row, Interval out[2]) const {
    out[0] = inside(lo[row], hi[row]);
    const int first = out[0].begin < out[0].end ? 1 : 0;
    if (lo2 == nullptr) return first;
    const Interval next = inside(lo2[row], hi2[row]);
    if (next.begin >= next.end) return first;
    const bool before = first == 0 || next.begin < out[0].begin;
    out[1] = before ? out[0] : next;
    out[0] = before ? next : out[0];
    if (first == 0) return 1;
    if (out[1].begin > out[0].end) return 2;
    out[0].end = larger(out[0].end, out[1].end);
    return 1;
  }

 private:
  VLM_FUSE_HD Interval inside(int32_t begin, int32_t end) const {
    return {larger(begin, 0), smaller(end, static_cast<int32_t>(keys))};
  }
};

}  // namespace vlm_fuse
