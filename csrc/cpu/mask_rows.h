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

  // The keys of a row, counted over the samples: at most two intervals within the keys, one after the other and the
  // first not empty unless both are, whatever the tensors hold. Returns how many there are.
  int at(int64_t row, Interval out[2]) const {
    const int32_t most = static_cast<int32_t>(keys);
    int count = 0;
    out[0] = {larger(lo[row], 0), smaller(hi[row], most)};
    if (out[0].begin < out[0].end) count = 1;
    if (lo2 != nullptr) {
      const Interval second = {larger(lo2[row], count == 1 ? out[0].end : 0), smaller(hi2[row], most)};
      if (second.begin < second.end) out[count++] = second;
    }
    return count;
  }
};

}  // namespace vlm_fuse
