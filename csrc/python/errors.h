// Errors that the kernels find, on their way to Python.
#pragma once

#include "../cpu/batch.h"
#include "attached.h"

namespace vlm_fuse {

// `status`: None; RAISE: an exception at once; or the tensor that keeps the first record.
void report(const Record& record, PyObject* status);

}  // namespace vlm_fuse
