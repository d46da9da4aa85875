// What a token plan holds, as new tensors.
#pragma once

#include "../cpu/batch.h"
#include "attached.h"

namespace vlm_fuse {

// (G, width) int32. `status`: of `report`, for what is wrong with the batch.
py::object new_source_index(const Batch& batch, int64_t width, PyObject* status);

// What a training step reads: labels (where there are any), position_ids, document_ids, attention_mask, cu_seqlens.
py::tuple make_step_facts(const Batch& batch, int64_t width);

}  // namespace vlm_fuse
