// Which blocks of query rows and keys a mask touches, and which it covers whole, on the device.
#pragma once

#include "../cpu/block_map.h"
#include "device.h"

namespace vlm_fuse::cuda {

// Bytes that `block_map` needs besides, at a multiple of 16; they may hold anything before.
int64_t block_map_workspace(const MaskIntervals& mask, const Blocks& blocks);

// Two launches: the classes of all blocks with the lists of the blocks of rows, then those of the blocks of keys.
void block_map(const MaskIntervals& mask, const Blocks& blocks, const BlockMapOut& out, void* workspace, Stream stream);

}  // namespace vlm_fuse::cuda
