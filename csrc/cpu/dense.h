// A mask written out, an element or a bit for every pair of query row and key.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "mask_rows.h"

namespace vlm_fuse {

// (samples, rows, keys) elements of `size` bytes, 8 at most: the one pattern where a row sees a key, else the other.
// Patterns are the element repeated to eight bytes.
struct DenseElement {
  int64_t size;
  uint64_t seen;
  uint64_t unseen;
};

// The smallest finite number of a type, repeated: all bits set but the lowest of the exponent.
inline uint64_t lowest(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 0xff7fffffff7fffffu;
    case DType::kBF16:
      return 0xff7fff7fff7fff7fu;
    case DType::kF16:
      return 0xfbfffbfffbfffbffu;
    case DType::kF64:
      return 0xffefffffffffffffu;
  }
  return 0;
}

void dense(const MaskIntervals& mask, const DenseElement& element, char* out);

// Each sample's rows * keys bits in order, the first one lowest, padded with zeros to a byte.
void bits(const MaskIntervals& mask, uint8_t* out);

}  // namespace vlm_fuse
