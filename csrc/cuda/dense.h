// A mask written out on the device, an element or a bit for every pair of query row and key. One launch each.
#pragma once

#include "../cpu/dense.h"
#include "device.h"

namespace vlm_fuse::cuda {

// As on the host.
void dense(const MaskIntervals& mask, const DenseElement& element, char* out, Stream stream);
void bits(const MaskIntervals& mask, uint8_t* out, Stream stream);

}  // namespace vlm_fuse::cuda
