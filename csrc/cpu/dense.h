// A mask written out, an element or a bit for every pair of query row and key.
#pragma once

#include <cstdint>

#include "mask_rows.h"

namespace vlm_fuse {

// (samples, rows, keys) elements of `size` bytes, 8 at most: the one pattern where a row sees a key, else the other.
// Patterns are the element repeated to eight bytes.
struct DenseElement {
  int64_t size;
  uint64_t seen;
  uint64_t unseen;
};

void dense(const MaskIntervals& mask, const DenseElement& element, char* out);

// Each sample's rows * keys bits in order, the first one lowest, padded with zeros to a byte.
void bits(const MaskIntervals& mask, uint8_t* out);

}  // namespace vlm_fuse
