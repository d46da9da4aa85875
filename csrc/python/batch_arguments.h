// The Batch of vlm_fuse/batch.py, field by field.
#pragma once

#include "../cpu/batch.h"
#include "attached.h"

namespace vlm_fuse {

constexpr int kBatchFields = 11;

// `on_host`: whether the memory of the tensors can be read; else counts below 0 are left to the kernels.
Batch read_batch(PyObject* const* fields, bool on_host = true);

// Groups of output rows.
inline int64_t output_rows(const Batch& batch) { return batch.layout == Layout::kPacked ? 1 : batch.samples; }

}  // namespace vlm_fuse
