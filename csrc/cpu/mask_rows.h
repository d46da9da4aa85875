// A mask as the renderings read it: one or two intervals of keys for every query row.
#pragma once

#include <cstdint>
#include <utility>

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
  int at(int64_t row, Interval out[2]) const {
    out[0] = inside(lo[row], hi[row]);
    int count = out[0].begin < out[0].end ? 1 : 0;
    if (lo2 == nullptr) return count;
    Interval next = inside(lo2[row], hi2[row]);
    if (next.begin >= next.end) return count;
    if (count == 1 && next.begin < out[0].begin) std::swap(next, out[0]);
    if (count == 1 && next.begin <= out[0].end) {
      out[0].end = larger(out[0].end, next.end);
    } else {
      out[count++] = next;
    }
    return count;
  }

 private:
  Interval inside(int32_t begin, int32_t end) const {
    return {larger(begin, 0), smaller(end, static_cast<int32_t>(keys))};
  }
};

}  // namespace vlm_fuse
