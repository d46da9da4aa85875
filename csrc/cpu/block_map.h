// Which blocks of query rows and keys a mask touches, and which it covers whole, without a visit to the elements.
#pragma once

#include <cstdint>

#include "mask_rows.h"

namespace vlm_fuse {

struct Blocks {
  int64_t q_size;   // query rows of a block
  int64_t kv_size;  // keys of a block
};

VLM_FUSE_HD int64_t block_count(int64_t length, int64_t size) { return (length + size - 1) / size; }

// Rows of block numbers: the chosen ones in order, then all others in order, and how many are chosen.
struct BlockLists {
  int32_t* counts;
  int32_t* indices;
};

// The layout of FlexAttention's BlockMask: for every block of rows its partial and its full blocks of keys, then for
// every block of keys its partial and full blocks of rows.
struct BlockMapOut {
  BlockLists kv, full_kv, q, full_q;
};

void block_map(const MaskIntervals& mask, const Blocks& blocks, const BlockMapOut& out);

}  // namespace vlm_fuse
