// The counters that PyTorch raises at every write in place.
#pragma once

#include "attached.h"

namespace vlm_fuse {

// Of tokens, attention_mask, document_ids and labels; True for one that is None. Empty where one has no counter (a
// tensor made under inference mode).
py::tuple versions(PyObject* const* tensors);

}  // namespace vlm_fuse
