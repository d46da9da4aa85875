// The Batch of vlm_fuse/batch.py, field by field.
#pragma once

#include "../cpu/batch.h"
#include "attached.h"

namespace vlm_fuse {

constexpr int kBatchFields = 11;

Batch read_batch(PyObject* const* fields);

// Groups of output rows.
inline int64_t output_rows(const Batch& batch) { return batch.layout == Layout::kPacked ? 1 : batch.samples; }

}  // namespace vlm_fuse
