// The row op on the device: every output row from its sources.
#pragma once

#include "../cpu/merge.h"
#include "device.h"

namespace vlm_fuse::cuda {

// Writes the rows, in one launch up to 48 feature tables. `status`, which may be null, keeps the record of the first
// row whose token id is not in the embedding table, unless it keeps one already.
void merge_rows(const Merge& merge, int64_t* status, Stream stream);

// The check alone.
void check_tokens(const Merge& merge, int64_t* status, Stream stream);

}  // namespace vlm_fuse::cuda
