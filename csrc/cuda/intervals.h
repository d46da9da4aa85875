// The intervals of a mask on the device.
#pragma once

#include "../cpu/masks.h"
#include "device.h"

namespace vlm_fuse::cuda {

// Bytes that `intervals` needs besides, at a multiple of 8; they may hold anything before.
int64_t intervals_workspace(const MaskRows& rows);

// One launch where output rows are not longer than 4096, else three. `status`, which may be null, keeps the record of
// the first row that needs more intervals than there are, unless it keeps one already: one launch more, unless there is
// one short output row alone.
void intervals(const MaskRows& rows, const MaskOut& out, void* workspace, int64_t* status, Stream stream);

}  // namespace vlm_fuse::cuda
